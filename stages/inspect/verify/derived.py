"""Verifies what was computed: rewards, advantages, batches, training records and metrics, derived anew.

`normalize` and `batch` are pure functions: their results are recomputed by the stages' own code and compared exactly.
That second derivation is the check: denominators and advantages follow from the inputs, or are named.
"""

from collections.abc import Collection, Mapping
from typing import Any

import polars as pl

from grpo.batching import full_vocabulary_logprobs, known_tokens, loss_tokens
from pipeline.artifact import Artifact
from pipeline.errors import ConfigError, UntrustedFunction
from pipeline.manifest import canonical_json
from pipeline.reading import shorten
from pipeline.run_dir import RESOLVED_CONFIG, RunDir
from stages import batch, normalize
from stages.check import check_rows
from stages.checks.config import CheckStageConfig
from stages.checks.outcome import blocking, quarantined
from stages.custom_functions import SOURCES, sources
from stages.inspect.audit.by_name import audit_iteration
from stages.inspect.metrics import iteration_metrics
from stages.inspect.verify.files import Catalog, Located
from stages.inspect.verify.ledger import PART, Ledger, Rule, Where, apply_rules, compare
from stages.inspect.verify.rows import fingerprint, scan
from stages.logprobs import NEEDED, forward_rows

TOLERANCE = 1e-9
"""Relative; for sums whose order another version of polars may choose otherwise, and for figures of metrics."""


def check_rewards(ledger: Ledger, item: Located, source: Located) -> None:
    """Check that the rewards cover exactly the completions they claim, and are numbers or errors."""
    where, rewards, completions = item.where, item.artifact, source.artifact
    recipes: Mapping[str, str] = rewards.manifest.config["reward_recipes"]
    functions = pl.DataFrame(
        {"reward_name": list(recipes), "reward_recipe": list(recipes.values())},
        schema={"reward_name": pl.String, "reward_recipe": pl.String},
    )
    keyed = scan(completions).select("completion_id", "group_id").collect(engine="streaming")
    expected = keyed.join(functions, how="cross").select("completion_id", "reward_name", "group_id", "reward_recipe")
    found = scan(rewards).select(*expected.columns, PART).collect(engine="streaming")
    keys = ["completion_id", "reward_name"]
    rows, count = compare(expected, found, keys, limit=ledger.limit, is_ordered=False)
    ledger.checked("rewards", expected.height)
    ledger.wrong_rows("rewards", where, rows, count, sources=[source.where])
    reward, error = pl.col("reward"), pl.col("error")
    rules = [
        Rule("rewards", reward.is_null() & error.is_null(), "neither reward nor error"),
        Rule("rewards", reward.is_not_null() & error.is_not_null(), "a reward and an error", ("reward", "error")),
        Rule("rewards", ~reward.is_finite().fill_null(True), "the reward is not finite", ("reward",)),
    ]
    apply_rules(ledger, where, scan(rewards), rules, "completion_id")


def check_advantages(ledger: Ledger, item: Located, source: Located, more: Mapping[str, Located]) -> None:
    """Recompute the advantages from the rewards, and compare every column and the order.

    ``more`` are the other datasets that the baseline or the scale has read.
    """
    where, advantages, rewards = item.where, item.artifact, source.artifact
    settings = dict(advantages.manifest.config)
    written_by = {SOURCES: settings.pop(SOURCES)} if SOURCES in settings else {}
    config = normalize.NormalizeConfig(**settings)
    try:
        is_same = sources(config.functions()) == written_by
    except UntrustedFunction:
        ledger.skipped("advantages", "a function of normalize lies outside of the library; --trust executes it")
        return
    except ConfigError:
        is_same = False
    if not is_same:
        ledger.skipped("advantages", "a function of normalize is not there as it was")
        return
    expected = normalize.normalize_rows(
        pl.scan_parquet(rewards.files(), glob=False), config, **{name: scan(of.artifact) for name, of in more.items()}
    )
    found = scan(advantages).collect(engine="streaming")
    rows, count = compare(
        expected, found, ["completion_id"], limit=ledger.limit, tolerance=_tolerance(advantages.manifest.environment)
    )
    ledger.checked("advantages", expected.height)
    ledger.wrong_rows("advantages", where, rows, count, sources=[source.where])


def _tolerance(environment: Mapping[str, Any]) -> float:
    """Return 0 where this version of polars has computed the rows: then they are equal to the bit."""
    return 0.0 if environment.get("packages", {}).get("polars") == pl.__version__ else TOLERANCE


def check_checks(ledger: Ledger, item: Located, sources: Mapping[str, Located], *, has_trained: bool) -> None:
    """Make the checks again over their inputs, and compare every column; note training on what one of them holds."""
    where, checks = item.where, item.artifact
    settings = dict(checks.manifest.config)
    config = CheckStageConfig(checks=settings.pop("checks"))
    frames = {name: pl.scan_parquet(source.artifact.files(), glob=False) for name, source in sources.items()}
    expected = check_rows(config, frames, settings, audit_iteration)
    found = scan(checks).collect()
    rows, count = compare(
        expected, found, ["name"], limit=ledger.limit, tolerance=_tolerance(checks.manifest.environment)
    )
    ledger.checked("checks", expected.height)
    ledger.wrong_rows("checks", where, rows, count, sources=[source.where for source in sources.values()])
    if has_trained:
        for name in blocking(found)["name"]:
            ledger.wrong("checks", where, "this check holds the iteration, and a policy has trained on it", row=name)


def check_quarantine(ledger: Ledger, catalog: Catalog, tables: Mapping[str, Any]) -> None:
    """Check that batches leave out what the checks of the run's config keep from training: they decide rows."""
    wanted = [check for check in tables.get("checks", []) if check["severity"] == "quarantine"]
    for (_, dataset), item in catalog.items():
        manifest = item.artifact.manifest
        if not item.is_own or dataset not in ("checks", "batches"):
            continue
        ledger.checked("checks", int(dataset == "checks" or bool(wanted)))
        if dataset == "batches" and wanted and "checks" not in manifest.inputs:
            ledger.wrong("checks", item.where, "the config has checks of severity quarantine, and it was made without")
        made = [check for check in manifest.config.get("checks", []) if check["severity"] == "quarantine"]
        if dataset == "checks" and canonical_json(made) != canonical_json(wanted):
            text = f"the checks of severity quarantine are {shorten(made)}, {RESOLVED_CONFIG} says {shorten(wanted)}"
            ledger.wrong("checks", item.where, text)


def check_batches(
    ledger: Ledger, item: Located, completions: Located, advantages: Located, checks: Located | None
) -> None:
    """Recompute the batches from their inputs, and compare every column and the order."""
    where, batches = item.where, item.artifact
    settings = dict(batches.manifest.config)
    seed, iteration = settings.pop("seed"), settings.pop("iteration")
    is_offline = settings.pop("is_offline", False)
    expected = batch.batch_rows(
        slim(completions.artifact),
        scan(advantages.artifact).select("completion_id", "advantage", "drop_reason").collect(),
        batch.BatchConfig(**settings),
        seed=seed,
        iteration=iteration,
        is_offline=is_offline,
        quarantined=quarantined(checks.artifact.read()) if checks is not None else (),
    )
    columns = [name for name in expected.columns if name not in _LISTS]
    content = fingerprint(*_LISTS).alias("content")
    found = scan(batches).select(*columns, PART, content).collect(engine="streaming")
    wanted = expected.select(*columns, content="sampling_logprobs")
    rows, count = compare(
        wanted,
        found,
        ["completion_id", "optimizer_step"],
        limit=ledger.limit,
        tolerance=_tolerance(batches.manifest.environment),
        hashed={"content": f"{' or '.join(_LISTS)} differ from the completion's"},
    )
    ledger.checked("batches", expected.height)
    ledger.wrong_rows("batches", where, rows, count, sources=[s.where for s in (completions, advantages, checks) if s])


_LISTS = ("prompt_token_ids", "completion_token_ids", "loss_mask", "sampling_logprobs")


def slim(completions: Artifact) -> pl.DataFrame:
    """Return completions that `batch_rows` orders as it would the real ones, in a fraction of their memory. Read-only.

    Lists of tokens become lists of bits of the same lengths, and a fingerprint of what the trainer reads takes the
    place of sampling_logprobs, which `batch_rows` hands through.
    """
    frame = pl.scan_parquet(completions.files(), glob=False)
    has_mass = frame.select(pl.col("kept_mass").is_not_null().any()).collect(engine="streaming").item()
    logprobs = full_vocabulary_logprobs(has_kept_mass=has_mass)
    content = fingerprint("prompt_token_ids", "completion_token_ids", "loss_mask", logprobs)
    columns = [n for n in frame.collect_schema().names() if n not in ("completion", "kept_mass", *_LISTS)]
    bits = pl.List(pl.Boolean)
    return frame.select(
        *columns,
        "loss_mask",
        pl.col("prompt_token_ids", "completion_token_ids").cast(bits),
        content.alias("sampling_logprobs"),
        pl.lit(None, pl.List(pl.Float32)).alias("kept_mass"),
    ).collect(engine="streaming")


def check_logprobs_rows(ledger: Ledger, item: Located, completions: Located, rewards: Located) -> None:
    """Check that logprobs have a row per policy and completion that may train, with a number for each token."""
    where, found, manifest = item.where, scan(item.artifact), item.artifact.manifest
    lengths = {"tokens": pl.col("completion_token_ids").list.len(), "trained": loss_tokens().cast(pl.UInt32)}
    every = manifest.config.get("every_group", False)
    may_train = forward_rows(
        scan(completions.artifact).select(NEEDED).collect(engine="streaming"),
        None if every else scan(rewards.artifact).select("group_id", "reward_name", "reward").collect(),
        manifest.config["microbatch_tokens"],
    ).select("completion_id", **lengths)
    policies = {n.partition(":")[2]: of["digest"] for n, of in manifest.inputs.items() if n.startswith("policy:")}
    named = pl.DataFrame({"policy_name": list(policies), "policy_digest": list(policies.values())})
    expected = may_train.join(named, how="cross")
    logprobs = pl.col("logprobs")
    numbers = logprobs.list.eval(pl.element().is_finite().fill_null(False).cast(pl.UInt32)).list.sum()
    stored = found.select(
        "completion_id",
        "policy_name",
        "policy_digest",
        PART,
        tokens=logprobs.list.len(),
        trained=numbers.cast(pl.UInt32),
    ).collect(engine="streaming")
    keys = ["policy_name", "completion_id"]
    rows, count = compare(
        expected.select(stored.drop(PART).columns), stored, keys, limit=ledger.limit, is_ordered=False
    )
    ledger.checked("records", expected.height)
    ledger.wrong_rows("records", where, rows, count, sources=[completions.where, rewards.where])
    is_odd = logprobs.list.eval((pl.element() > 1e-6) | ~pl.element().is_finite()).list.any()
    rules = [Rule("records", is_odd.fill_null(False), "a log probability is above 0, or not finite")]
    apply_rules(ledger, where, found, rules, "completion_id")


def check_records(ledger: Ledger, item: Located, stepped: Located, source: Located) -> None:
    """Check that training records cover the rows that trained, and that the optimizer steps are their sums."""
    where, records, steps, batches = item.where, item.artifact, stepped.artifact, source.artifact
    tokens = loss_tokens().cast(pl.Int32)  # the trainer counts them by itself, after collating
    kept = scan(batches).filter(pl.col("drop_reason").is_null())
    keys = ["completion_id", "optimizer_step"]
    known = known_tokens().cast(pl.Int32)
    expected = kept.select(*keys, num_tokens=tokens, known_tokens=known).collect(engine="streaming")
    found = scan(records).select(*expected.columns, "loss", PART).collect(engine="streaming")
    rows, count = compare(expected, found, keys, limit=ledger.limit, is_ordered=False)
    ledger.checked("records", expected.height)
    ledger.wrong_rows("records", where, rows, count, sources=[source.where])
    _check_figures(ledger, where, records)
    sums = found.group_by("optimizer_step", maintain_order=True).agg(
        pl.col("loss").sum(), pl.col("num_tokens").cast(pl.Int64).sum(), pl.len().cast(pl.Int64).alias("num_rows")
    )
    stored = scan(steps).select(*sums.columns, PART).collect()
    rows, count = compare(sums, stored, ["optimizer_step"], limit=ledger.limit, is_ordered=False, tolerance=TOLERANCE)
    ledger.checked("records", sums.height)
    ledger.wrong_rows("records", stepped.where, rows, count, sources=[where])


def _check_figures(ledger: Ledger, where: Where, records: Artifact) -> None:
    """Check what no record of an update can be."""
    tokens = pl.col("num_tokens")
    mean, highest = pl.col("importance_ratio_mean"), pl.col("importance_ratio_max")
    floats = ("importance_ratio_mean", "importance_ratio_max", "correction_weight_mean", "entropy_mean", "loss")
    rules = [
        Rule("records", ~pl.col(name).is_finite().fill_null(True), f"{name} is not finite", (name,)) for name in floats
    ]
    rules += [
        Rule("records", (pl.col(name) < 0) | (pl.col(name) > tokens), f"{name} is impossible", (name, "num_tokens"))
        for name in ("clipped_low_tokens", "clipped_high_tokens", "bounded_tokens", "masked_tokens")
    ]
    shown = ("importance_ratio_mean", "importance_ratio_max")
    is_odd = ((mean > highest * (1 + 1e-6)) | (mean < 0)).fill_null(False)
    rules.append(Rule("records", is_odd, "the mean ratio is impossible", shown))
    for name in ("entropy_mean", "correction_weight_mean", "logprob_difference_max"):
        rules.append(Rule("records", (pl.col(name) < -1e-6).fill_null(False), f"{name} is negative", (name,)))
    has_one_step = scan(records).select(pl.col("optimizer_step").n_unique() <= 1).collect().item()
    manifest = records.manifest
    is_proximal = "logprobs" not in manifest.inputs and manifest.config.get("proximal") != "sampler"
    if has_one_step and is_proximal:  # before the first step the current policy is the proximal one
        is_odd = ((mean - 1).abs() > 1e-6) | ((highest - 1).abs() > 1e-6)
        rules.append(Rule("records", is_odd.fill_null(False), "in a single step every ratio is 1", shown))
    lists = ("trainer_logprobs", "sampling_logprobs", "importance_ratios", "correction_weights", "entropies")
    lengths = [pl.col(name).list.len() for name in lists]
    is_other = pl.any_horizontal((length != lengths[0]).fill_null(False) for length in lengths)
    rules.append(Rule("records", is_other, "the lists of tokens differ in length"))
    apply_rules(ledger, where, scan(records), rules, "completion_id")


def check_metrics(
    ledger: Ledger,
    run: RunDir,
    finished: list[int],
    intact: set[int],
    pass_threshold: float,
    catalog: Catalog,
    noted_before: Collection[int],
) -> None:
    """Recompute the metrics of the finished iterations whose artifacts are ``intact``, and compare every figure.

    The last finished iteration may have none yet: a run can be killed before they are written. ``noted_before`` are
    the iterations with figures before the artifacts were opened: a run that is being written adds others meanwhile.
    """
    where = Where(run.metrics.name, "metrics")
    if not run.metrics.is_file():
        if len(finished) > 1:
            ledger.wrong("metrics", where, f"the file is gone, but {len(finished)} iterations are finished")
        return
    stored = {row["iteration"]: row for row in run.read_metrics().to_dicts()}
    for iteration in sorted({*noted_before} - {*finished}):
        ledger.wrong("metrics", where, "figures of an iteration that is not finished", row=f"iteration {iteration}")
    for iteration in finished:
        if iteration not in stored:
            if iteration != finished[-1]:
                ledger.wrong("metrics", where, "the iteration has no figures", row=f"iteration {iteration}")
        elif iteration in intact:
            ledger.checked("metrics")
            expected = iteration_metrics(run, iteration, pass_threshold)
            for name, value in expected.items():
                if not _is_same(stored[iteration].get(name), value):
                    of = "" if (source := _source(catalog, iteration, name)) is None else f" from {source}"
                    found = f"{name} is {shorten(stored[iteration].get(name))}, recomputed{of} {shorten(value)}"
                    ledger.wrong("metrics", where, found, row=f"iteration {iteration}")
        else:
            ledger.skipped("metrics", "an artifact of the iteration is damaged or missing")


METRIC_SOURCES = {
    "advantages": ("reward_mean", "reward_std", "pass_rate", "zero_variance_share"),
    "rewards": ("rewards",),
    "completions": (
        "completion_tokens_mean",
        "truncated_share",
        "num_completions",
        "entropy",
        "generate_tokens_per_second",
    ),
    "training_records": (
        "num_trained",
        "num_tokens",
        "entropy_trained",
        "kl_to_sampler",
        "kl_to_reference",
        "clip_low_share",
        "clip_high_share",
        "bounded_share",
    ),
    "checks": ("num_failed_checks", "num_quarantined"),
    "optimizer_steps": ("loss", "grad_norm", "learning_rate"),
    "evaluations": ("eval_pass_at_1", "eval_pass_rate", "eval_pass_at_k"),
}
"""Dataset -> the figures that come from it."""


def _source(catalog: Catalog, iteration: int, figure: str) -> str | None:
    """Return the artifact that a figure comes from."""
    dataset = next((name for name, figures in METRIC_SOURCES.items() if figure in figures), "")
    found = catalog.get((iteration, dataset))
    return None if found is None else found.where.path


def _is_same(found: Any, expected: Any) -> bool:
    """Return whether two figures, or lists of figures, are equal up to the order of a sum."""
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) <= TOLERANCE * max(abs(expected), 1e-3)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_is_same(found[k], expected[k]) for k in found)
    return bool(found == expected)
