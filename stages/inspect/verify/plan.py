"""The audit of what generate and evaluate decide before an engine is asked: derived anew from config and inputs.

Ids are hashes of the recipe and the prompt's position, seeds hashes of the run's seed and the position: rows that were
removed, added, reordered or taken from elsewhere do not fit.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

import polars as pl

from pipeline.artifact import Artifact
from pipeline.files import identity
from stages.generate import GenerateConfig
from stages.inspect.verify.ledger import PART, Findings, Rule, Where, WrongRow, apply_rules, compare
from stages.inspect.verify.rows import fingerprint, scan
from stages.rollout.base import request_seed

HASHED = {"prompt": "the prompt is not that of the input"}
"""What a differing fingerprint means."""


def check_plan(findings: Findings, where: Where, completions: Artifact, prompts: Artifact) -> None:
    """Derive ids, order, seeds, settings and policies of an iteration's answers anew, and compare."""
    expected = plan(
        scan(prompts).select("prompt_id", "drop_reason", prompt=fingerprint("prompt_token_ids")).collect(),
        completions.manifest.config,
        completions.manifest.recipe,
        {n.removeprefix("policy:"): facts["digest"] for n, facts in completions.manifest.inputs.items()},
    )
    columns = [name for name in expected.columns if name != "prompt"]
    found = scan(completions).select(*columns, PART, prompt=fingerprint("prompt_token_ids"))
    _check_engine(findings, where, completions)
    _compare(findings, "sampling plan", where, completions, expected, found.collect(engine="streaming"))


def _check_engine(findings: Findings, where: Where, completions: Artifact) -> None:
    """Check that each part names one engine: it was written by one process."""
    names = ("engine", "engine_version", "logprobs_mode")
    for part in completions.files():
        rows = pl.scan_parquet(part).select("completion_id", engine=pl.struct(names)).collect(engine="streaming")
        if rows["engine"].n_unique() > 1:
            common = rows["engine"].mode(maintain_order=True)[0]
            odd = [(i, engine) for i, engine in rows.iter_rows() if engine != common]
            named = [WrongRow(i, part.name, f"the engine is {engine}, others have {common}") for i, engine in odd]
            findings.wrong_rows("sampling plan", where, named, len(named))


def _compare(
    findings: Findings, check: str, where: Where, artifact: Artifact, expected: pl.DataFrame, found: pl.DataFrame
) -> None:
    """Compare row by row, unless not one id is right: then it is the recipe that was changed, not the rows."""
    findings.checked(check, expected.height)
    if expected.height and found.join(expected, on="completion_id", how="semi").is_empty():
        folder = PurePosixPath(where.path)
        inputs = [normpath((folder / facts["path"]).as_posix()) for facts in artifact.manifest.inputs.values()]
        text = (
            f"no id follows from the recipe: a setting in the manifest or one of {', '.join(inputs)} "
            "was changed after the answers were written"
        )
        findings.wrong_rows(check, where, [WrongRow("all", None, text)], 1)
        return
    rows, count = compare(expected, found, ["completion_id"], limit=findings.limit, hashed=HASHED)
    findings.wrong_rows(check, where, rows, count)


def plan(prompts: pl.DataFrame, config: Mapping[str, Any], recipe: str, digests: Mapping[str, str]) -> pl.DataFrame:
    """Return what generate decides before an engine is asked, one row per answer, in order.

    ``prompts`` has prompt_id, drop_reason and prompt, in order; ``digests`` are the policies' by member name.
    """
    settings = GenerateConfig(**{k: v for k, v in config.items() if k in GenerateConfig.model_fields})
    used = prompts.filter(pl.col("drop_reason").is_null()).drop("drop_reason").with_row_index("position")
    groups = [identity(recipe, *row) for row in used.select("position", "prompt_id").iter_rows()]
    used = used.with_columns(pl.Series("group_id", groups, dtype=pl.String))
    frames = []
    first = 0
    for member in settings.plan():
        indices = pl.DataFrame(
            {"completion_index": range(first, first + member.count)}, schema={"completion_index": pl.Int32}
        )
        first += member.count
        rows = used.join(indices, how="cross", maintain_order="left_right")
        seeds = _seeds(config["seed"], config["iteration"], rows)
        frames.append(
            rows.select(
                answer_id(),
                "group_id",
                "prompt_id",
                "completion_index",
                pl.lit(member.name).alias("policy_name"),
                pl.lit(digests[member.name]).alias("policy_digest"),
                pl.lit(config["policy_iterations"][member.name], pl.Int32).alias("policy_iteration"),
                seeds,
                pl.lit(settings.temperature, pl.Float32).alias("temperature"),
                pl.lit(settings.top_p, pl.Float32).alias("top_p"),
                pl.lit(settings.top_k, pl.Int32).alias("top_k"),
                pl.lit(settings.min_p, pl.Float32).alias("min_p"),
                "prompt",
            )
        )
    return pl.concat(frames)


def answer_id() -> pl.Expr:
    """Return the completion_id of each row's group_id and completion_index."""
    index = pl.col("completion_index").cast(pl.String).str.zfill(3)
    return pl.format("{}-{}", "group_id", index).alias("completion_id")


def _seeds(seed: int, iteration: int, rows: pl.DataFrame) -> pl.Series:
    numbers = rows.select("position", "completion_index").iter_rows()
    return pl.Series("seed", [request_seed(seed, iteration, p, i) for p, i in numbers], dtype=pl.Int64)


def evaluation_plan(prompts: pl.DataFrame, config: Mapping[str, Any], recipe: str, digest: str) -> pl.DataFrame:
    """Return what evaluate decides before an engine is asked, one row per answer, in order.

    ``prompts`` has prompt_id, drop_reason and prompt, in order; ``digest`` is the policy's.
    """
    used = prompts.filter(pl.col("drop_reason").is_null()).drop("drop_reason").with_row_index("position")
    frames = []
    for decoding, count in (("greedy", 1), ("sampled", config["num_samples"])):
        groups = [identity(recipe, decoding, *row) for row in used.select("position", "prompt_id").iter_rows()]
        indices = pl.DataFrame({"completion_index": range(count)}, schema={"completion_index": pl.Int32})
        rows = used.with_columns(pl.Series("group_id", groups, dtype=pl.String)).join(
            indices, how="cross", maintain_order="left_right"
        )
        frames.append(
            rows.select(
                answer_id(),
                "group_id",
                "prompt_id",
                pl.lit(decoding).alias("decoding"),
                "completion_index",
                pl.lit(digest).alias("policy_digest"),
                pl.lit(config["policy_iteration"], pl.Int32).alias("policy_iteration"),
                _seeds(config["seed"], -1, rows),  # as in evaluate: no training request has that iteration
                pl.lit(0.0 if decoding == "greedy" else config["temperature"], pl.Float32).alias("temperature"),
                "prompt",
            )
        )
    return pl.concat(frames)


def check_evaluations(findings: Findings, where: Where, evaluations: Artifact, prompts: Artifact) -> None:
    """Derive the plan of an evaluation anew, compare it, and check is_correct against the reward."""
    config = evaluations.manifest.config
    held = fingerprint("messages", "reference_answer").alias("prompt")
    expected = evaluation_plan(
        scan(prompts).select("prompt_id", "drop_reason", held).collect(),
        config,
        evaluations.manifest.recipe,
        evaluations.manifest.inputs["policy"]["digest"],
    )
    columns = [name for name in expected.columns if name != "prompt"]
    found = scan(evaluations).select(*columns, PART, held).collect(engine="streaming")
    _compare(findings, "evaluations", where, evaluations, expected, found)
    is_right = pl.col("reward") >= config["pass_threshold"]
    shown = ("reward", "is_correct")
    rules = [
        Rule("evaluations", is_right.ne_missing(pl.col("is_correct")), "is_correct does not follow", shown),
        Rule("evaluations", pl.col("reward").is_null() & pl.col("error").is_null(), "neither reward nor error"),
        Rule("evaluations", ~pl.col("reward").is_finite().fill_null(True), "the reward is not finite", ("reward",)),
    ]
    if all(config["normalize"]["weights"].values()):  # else a reward of weight 0 may have failed
        both = pl.col("reward").is_not_null() & pl.col("error").is_not_null()
        rules.append(Rule("evaluations", both, "a reward and an error", ("reward", "error")))
    apply_rules(findings, where, scan(evaluations), rules, "completion_id")
