"""Verifies what generate and evaluate decide before an engine is asked: derived anew by the stages' own functions.

Ids are hashes of the recipe and the prompt's position, seeds hashes of the run's seed and the position: rows that were
removed, added, reordered or taken from elsewhere do not fit.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import polars as pl

from pipeline.artifact import Artifact
from pipeline.schema import SCHEMAS
from stages import evaluate, generate
from stages.generate import GenerateConfig
from stages.inspect.verify.ledger import PART, Ledger, Rule, Where, WrongRow, apply_rules, compare
from stages.inspect.verify.rows import fingerprint, scan
from stages.members import Author

HASHED = {"prompt": "the prompt is not that of the input"}
"""What a differing fingerprint means."""


def check_plan(ledger: Ledger, where: Where, completions: Artifact, prompts: Artifact) -> None:
    """Derive ids, order, seeds, settings and policies of an iteration's completions anew, and compare."""
    expected = plan(
        scan(prompts).select("prompt_id", "drop_reason", prompt=fingerprint("prompt_token_ids")).collect(),
        completions.manifest.config,
        completions.manifest.recipe,
        {n.removeprefix("policy:"): facts["digest"] for n, facts in completions.manifest.inputs.items()},
    )
    columns = [name for name in expected.columns if name != "prompt"]
    found = scan(completions).select(*columns, PART, prompt=fingerprint("prompt_token_ids"))
    _check_engine(ledger, where, completions)
    _compare(ledger, "sampling plan", where, completions, expected, found.collect(engine="streaming"))


def _check_engine(ledger: Ledger, where: Where, completions: Artifact) -> None:
    """Check that each part names one engine: it was written by one process."""
    names = ("engine", "engine_version", "logprobs_mode")
    for part in completions.files():
        rows = (
            pl.scan_parquet(part, glob=False)
            .select("completion_id", engine=pl.struct(names))
            .collect(engine="streaming")
        )
        if rows["engine"].n_unique() > 1:
            common = rows["engine"].mode(maintain_order=True)[0]
            odd = [(i, engine) for i, engine in rows.iter_rows() if engine != common]
            named = [WrongRow(i, part.name, f"the engine is {engine}, others have {common}") for i, engine in odd]
            ledger.wrong_rows("sampling plan", where, named, len(named))


def _compare(
    ledger: Ledger, check: str, where: Where, artifact: Artifact, expected: pl.DataFrame, found: pl.DataFrame
) -> None:
    """Compare row by row, unless not one id is right: then it is the recipe that was changed, not the rows."""
    ledger.checked(check, expected.height)
    if expected.height and found.join(expected, on="completion_id", how="semi").is_empty():
        folder = PurePosixPath(where.path)
        inputs = [normpath((folder / facts["path"]).as_posix()) for facts in artifact.manifest.inputs.values()]
        text = (
            f"no id follows from the recipe: a setting in the manifest or one of {', '.join(inputs)} "
            "was changed after the answers were written"
        )
        ledger.wrong_rows(check, where, [WrongRow("all", None, text)], 1)
        return
    rows, count = compare(expected, found, ["completion_id"], limit=ledger.limit, hashed=HASHED)
    ledger.wrong_rows(check, where, rows, count)


def plan(prompts: pl.DataFrame, config: Mapping[str, Any], recipe: str, digests: Mapping[str, str]) -> pl.DataFrame:
    """Return what generate decides before an engine is asked, one row per completion, in order.

    ``prompts`` has prompt_id, drop_reason and prompt, in order; ``digests`` are the policies' by member name.
    """
    settings = GenerateConfig(**{k: v for k, v in config.items() if k in GenerateConfig.model_fields})
    asked, frames, first = _asked(prompts), [], 0
    for member in settings.plan():
        indices = range(first, first + member.count)
        first += member.count
        # the path is not read: no engine is asked
        author = Author(member.name, Path(), digests[member.name], config["policy_iterations"][member.name])
        numbers = {"seed": config["seed"], "iteration": config["iteration"]}
        frames.append(generate.planned_rows(asked, settings, author, indices, recipe=recipe, **numbers))
    return _in_order(frames, "completions")


def _in_order(frames: list[pl.DataFrame], dataset: str) -> pl.DataFrame:
    rows = pl.concat(frames)
    return rows.select(*(name for name in SCHEMAS[dataset].names if name in rows.columns), "prompt")


def _asked(prompts: pl.DataFrame) -> pl.DataFrame:
    return prompts.filter(pl.col("drop_reason").is_null()).drop("drop_reason").with_row_index("position")


def evaluation_plan(prompts: pl.DataFrame, config: Mapping[str, Any], recipe: str, digest: str) -> pl.DataFrame:
    """Return what evaluate decides before an engine is asked, one row per completion, in order.

    ``prompts`` has prompt_id, drop_reason and prompt, in order; ``digest`` is the policy's.
    """
    frames = [
        evaluate.planned_rows(
            _asked(prompts),
            count,
            recipe=recipe,
            decoding=decoding,
            seed=config["seed"],
            temperature=config["temperature"],
            policy_digest=digest,
            policy_iteration=config["policy_iteration"],
        )
        for decoding, count in ((evaluate.GREEDY, 1), ("sampled", config["num_samples"]))
    ]
    return _in_order(frames, "evaluations")


def check_evaluations(ledger: Ledger, where: Where, evaluations: Artifact, prompts: Artifact) -> None:
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
    _compare(ledger, "evaluations", where, evaluations, expected, found)
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
    apply_rules(ledger, where, scan(evaluations), rules, "completion_id")
