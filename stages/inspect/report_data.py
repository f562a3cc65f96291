"""What a report of a run says, as plain data: measures by iteration, distributions, groups to read. Read-only.

Everything comes from the artifacts that `RunDir.open` finds; what an iteration does not have is left out. Columns that
only `metrics.parquet` still knows, because their artifacts were removed, are taken from there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHECKPOINTS, DATASETS, INITIAL
from pipeline.errors import UsageError
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from stages.evaluate import summarize
from stages.inspect.metrics import (
    STAGE_DATASETS,
    completion_measures,
    reward_measures,
    step_measures,
    token_mean,
    training_measures,
    zero_variance_share,
)
from stages.inspect.report_groups import TokenText, choose_groups, encoded_size, group_views

FINDING_ROWS = 20
"""Rows of a finding that link to their group."""
HEAT_BINS = 24
HEAT_COLUMNS = 90
"""Most columns of a distribution; more iterations share columns."""
COUNTS = ("completions", "groups", "shown_groups", "shown_completions")
LARGEST = 1e100
"""Larger magnitudes are not drawn: the width of a range that holds them could be infinite."""

Data = dict[str, pl.LazyFrame]
Values = dict[str, float | None]
Series = dict[str, list[float | None]]


class FindingRow(BaseModel):
    """Where a finding was made; a finding about a whole group or iteration leaves the narrower ids out."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    iteration: int
    group_id: str | None = None
    completion_id: str | None = None


class Finding(BaseModel):
    """One thing that an audit found; errors are shown first, then warnings, else the order is kept."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    check: str
    severity: str
    """error, warning or info; any other word is shown as it is."""
    message: str
    rows: list[FindingRow] = []


@dataclass(frozen=True, slots=True)
class Heat:
    """A distribution by iteration: ``shares[column][bin]``; values beyond the edges count in the outer bins."""

    edges: list[float]
    spans: list[tuple[int, int]]
    """First and last iteration of each column."""
    shares: list[list[float]]
    outside: int
    """Number of values beyond the edges."""
    not_numbers: int = 0
    """Number of values that are NaN; they are in no bin."""


@dataclass(slots=True)
class Report:
    """A run for a reader. Lists in ``series`` and ``families`` run along ``iterations``; None = not stored."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    iterations: list[int] = field(default_factory=list)
    series: Series = field(default_factory=dict)
    families: dict[str, Series] = field(default_factory=dict)
    """parts, errors, members, drops, seconds: a series for each reward, policy name, drop reason or stage."""
    rewards: Heat | None = None
    advantages: Heat | None = None
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    findings: list[Finding] | None = None
    absent: dict[str, int] = field(default_factory=dict)
    """Dataset -> number of iterations without it."""
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Dataset -> number of iterations that read it from another run."""
    initial: Values = field(default_factory=dict)
    """The evaluation of the initial policy."""
    max_tokens: int | None = None
    pass_threshold: float | None = None
    num_checked: int = 0
    """Number of iterations with checks."""
    failed_checks: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `checks` with their iteration, in order."""


def read_findings(text: str, where: object) -> list[Finding]:
    """Return the findings of a JSON list, or of JSON lines.

    Raises:
        UsageError: when a finding lacks check, severity or message, or the text is no JSON.
    """
    try:
        if not text.lstrip().startswith("["):
            text = "[" + ",".join(line for line in text.splitlines() if line.strip()) + "]"
        return TypeAdapter(list[Finding]).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the text"
        raise UsageError(
            f"{where} does not hold an audit's findings ({place}: {first['msg']}): expected a JSON list or JSON lines "
            'of {"check", "severity", "message", "rows": [{"iteration", "group_id", "completion_id"}]}'
        ) from error


def collect(
    run: RunDir, findings: list[Finding] | None = None, *, groups: int = 12, most_bytes: int = 10_000_000, seed: int = 0
) -> Report:
    """Return the report of a run with ``groups`` groups of each iteration at most. Read-only.

    The groups take up to ``most_bytes`` of JSON, spread evenly over the iterations; those that an audit names come
    first. ``seed`` picks the sampled ones.
    """
    settings = run.settings()
    threshold = settings.get("evaluate", {}).get("pass_threshold")
    iterations = run.iterations()
    report = Report(
        name=run.root.resolve().name,
        facts=_facts(run, settings),
        iterations=iterations,
        findings=findings,
        max_tokens=settings.get("generate", {}).get("max_tokens"),
        pass_threshold=threshold,
    )
    if is_finished(run.place(INITIAL, "evaluations")):
        report.initial = summarize(open_artifact(run.place(INITIAL, "evaluations")).read())
    flagged = _flagged(findings or [])
    tokens = TokenText(run)
    used = 0
    scored: list[pl.DataFrame] = []
    for position, iteration in enumerate(iterations):
        data = _open(run, iteration, report, position)
        values, families = measure(data, iteration, threshold)
        _add(report.series, values, position)
        for family, members in families.items():
            _add(report.families.setdefault(family, {}), members, position)
        if "checks" in data:
            failed = data["checks"].filter(~pl.col("passed")).collect().to_dicts()
            report.num_checked += 1
            report.failed_checks += [{"iteration": iteration, **row} for row in failed]
        if "advantages" in data:
            scored.append(data["advantages"].select("reward", "advantage").collect())
        else:
            scored.append(pl.DataFrame(schema={"reward": pl.Float64, "advantage": pl.Float64}))
        chosen, num_groups = choose_groups(data, flagged.get(iteration, set()), groups, f"{seed}:{iteration}")
        report.counts["groups"] += num_groups
        report.counts["completions"] += int(values.get("num_completions") or 0)
        shown = []
        for view in group_views(data, iteration, chosen, tokens, _completions(findings or [])):
            size = encoded_size(view)
            if used + size <= (most_bytes if view["is_flagged"] else most_bytes * (position + 1) // len(iterations)):
                used += size
                shown.append(view)
        report.groups[iteration] = shown
        report.counts["shown_groups"] += len(shown)
        report.counts["shown_completions"] += sum(len(view["members"]) for view in shown)
    for mapping in (report.series, *report.families.values()):
        for values_ in mapping.values():
            values_ += [None] * (len(iterations) - len(values_))
    _fill_from_metrics(run, report)
    report.rewards = heat([frame["reward"] for frame in scored], iterations)
    report.advantages = heat([frame["advantage"] for frame in scored], iterations)
    return report


def _facts(run: RunDir, settings: dict[str, Any]) -> dict[str, str]:
    seen = run.environments()
    environment = seen[-1] if seen else {}
    packages = environment.get("packages", {})
    last = next((k for k in reversed(run.iterations()) if _find(run, k, "policy")), None)
    policy = _find(run, last, "policy") if last is not None else None
    listed = settings.get("score", {}).get("rewards")
    tables = [table for table in listed if isinstance(table, dict)] if isinstance(listed, list) else []
    rewards = ", ".join(f"{table.get('name')} ({table.get('function')})" for table in tables)
    facts = {
        "model": settings.get("policy", {}).get("model"),
        "prompts": settings.get("prompts", {}).get("source"),
        "rewards": rewards,
        "seed": settings.get("seed"),
        "iterations planned": settings.get("iterations"),
        "digest of the last policy": f"{policy.digest} (iteration {last})" if policy else None,
        "last written (UTC)": policy.manifest.started_at[:19].replace("T", " ") if policy else None,
        "commit": environment.get("git_commit"),
        "uncommitted changes": "yes" if environment.get("git_diff_sha256") else "none" if environment else None,
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "processor": ", ".join([environment.get("processor") or "", *environment.get("accelerators", [])]).strip(", "),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _find(run: RunDir, iteration: int, dataset: str) -> Artifact | None:
    return run.open(iteration, dataset) if run.has(iteration, dataset) else None


def _open(run: RunDir, iteration: int, report: Report, position: int) -> Data:
    data: Data = {}
    seconds: Values = {}
    for dataset in DATASETS:
        artifact = _find(run, iteration, dataset)
        if artifact is None:
            report.absent[dataset] = report.absent.get(dataset, 0) + 1
            continue
        is_here = artifact.path.resolve() == run.place(iteration, dataset).resolve()
        if not is_here:
            report.elsewhere[dataset] = report.elsewhere.get(dataset, 0) + 1
        if dataset in STAGE_DATASETS and is_here:  # another run's seconds are not this run's
            stage = artifact.manifest.stage
            seconds[stage] = (seconds.get(stage) or 0.0) + artifact.manifest.seconds
        if dataset not in CHECKPOINTS:
            data[dataset] = artifact.scan()
    _add(report.families.setdefault("seconds", {}), seconds, position)
    return data


def _add(series: Series, values: Values, position: int) -> None:
    for name, value in values.items():
        column = series.setdefault(name, [])
        column += [None] * (position - len(column))
        column.append(value)


def measure(data: Data, iteration: int, pass_threshold: float | None) -> tuple[Values, dict[str, Values]]:
    """Return the measures of one iteration, and those that exist once per name; absent datasets give none."""
    values: Values = {}
    families: dict[str, Values] = {}
    if "completions" in data:
        values |= _row(data["completions"], _completion_measures(iteration))
        families["members"] = _shares(data["completions"], "policy_name")
    if "advantages" in data:
        values |= _row(data["advantages"], _reward_measures(pass_threshold))
        values |= _row(zero_variance_share(data["advantages"]), {"zero_variance_share": pl.all()})
        values.setdefault("num_completions", values.pop("num_rows"))
    if "rewards" in data:
        parts = (
            data["rewards"]
            .group_by("reward_name", maintain_order=True)
            .agg(pl.col("reward").mean().alias("mean"), (pl.col("error").is_not_null().mean()).alias("failed"))
            .collect()
        )
        families["parts"] = dict(zip(parts["reward_name"], parts["mean"], strict=True))
        families["errors"] = dict(zip(parts["reward_name"], parts["failed"], strict=True))
    source = data.get("batches", data.get("advantages"))
    if source is not None:
        families["drops"] = _shares(source.with_columns(pl.col("drop_reason").fill_null("trained")), "drop_reason")
    if "training_records" in data:
        values |= _training_measures(data["training_records"])
    if "optimizer_steps" in data:
        values |= _row(data["optimizer_steps"], step_measures() | {"grad_norm_max": pl.col("grad_norm").max()})
    if "evaluations" in data:
        values |= summarize(data["evaluations"].collect())
    return values, families


def _row(frame: pl.LazyFrame, expressions: dict[str, pl.Expr]) -> Values:
    return frame.select(**expressions).collect().row(0, named=True)


def _shares(frame: pl.LazyFrame, column: str) -> Values:
    counts = frame.group_by(column, maintain_order=True).len().collect()
    return {name: n / counts["len"].sum() for name, n in counts.iter_rows()}


def _completion_measures(iteration: int) -> dict[str, pl.Expr]:
    age = iteration - pl.col("policy_iteration")
    return completion_measures() | {
        "completion_tokens_p95": pl.col("completion_token_ids").list.len().quantile(0.95, "nearest"),
        "age_mean": age.mean(),
        "age_max": age.max(),
    }


def _reward_measures(pass_threshold: float | None) -> dict[str, pl.Expr]:
    measures = reward_measures(0.0 if pass_threshold is None else pass_threshold)
    if pass_threshold is None:
        del measures["pass_rate"]
    return measures | {"unscored_share": pl.col("reward").is_null().mean(), "num_rows": pl.len()}


def _training_measures(records: pl.LazyFrame) -> Values:
    weight = pl.col("correction_weight_mean")
    measured = _row(
        records,
        training_measures()
        | {
            "importance_ratio_mean": token_mean("importance_ratio_mean"),
            "importance_ratio_max": pl.col("importance_ratio_max").max(),
            "logprob_difference_max": pl.col("logprob_difference_max").max(),
            "masked_share": pl.col("masked_tokens").sum() / pl.col("num_tokens").sum(),
            "correction_weight_mean": token_mean("correction_weight_mean"),
            # Kish: (sum of w)^2 / (n * sum of w^2)
            "ess_rows": weight.sum() ** 2 / (weight.count() * (weight**2).sum()),
        },
    )
    recorded = records.select(w=pl.col("correction_weights").explode()).drop_nulls().collect()["w"].cast(pl.Float64)
    if len(recorded):
        weights = recorded.to_numpy()
        measured["ess_tokens"] = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
    return {name: value if value is None or np.isfinite(value) else None for name, value in measured.items()}


def _fill_from_metrics(run: RunDir, report: Report) -> None:
    if not run.metrics.is_file():
        return
    metrics = run.read_metrics()
    stored = {row["iteration"]: row for row in metrics.to_dicts()}
    names = [
        name
        for name, type_ in metrics.schema.items()
        if type_.is_numeric() and name not in ("iteration", "num_completions", "num_trained", "num_tokens")
    ]
    for name in names:
        known = report.series.setdefault(name, [None] * len(report.iterations))
        for position, iteration in enumerate(report.iterations):
            if known[position] is None and iteration in stored:
                known[position] = stored[iteration][name]


def heat(columns: list[pl.Series], iterations: list[int]) -> Heat | None:
    """Return how the values of each iteration are spread; None when there are none.

    If a thousandth of the values would stretch the range fourfold, it goes to the outer bins.
    """
    known = [c.drop_nulls() for c in columns]
    values = [c.drop_nans().to_numpy() for c in known]
    everything = np.concatenate(values) if values else np.zeros(0)
    not_numbers = sum(len(c) for c in known) - len(everything)
    if not len(everything) + not_numbers:
        return None
    usual = everything[np.abs(everything) <= LARGEST]
    low, high = (float(usual.min()), float(usual.max())) if len(usual) else (0.0, 0.0)
    inner_low, inner_high = (float(x) for x in np.quantile(usual, (0.001, 0.999))) if len(usual) else (0.0, 0.0)
    if 0 < inner_high - inner_low < (high - low) / 4:
        low, high = inner_low, inner_high
    if high - low <= max(abs(low), abs(high)) * 1e-9:
        margin = max(0.5, abs(low) / 100)
        low, high = low - margin, high + margin
    edges = np.linspace(low, high, HEAT_BINS + 1)
    spans, shares = [], []
    for positions in np.array_split(np.arange(len(iterations)), min(HEAT_COLUMNS, len(iterations))):
        together = np.concatenate([values[p] for p in positions])
        counts, _ = np.histogram(np.clip(together, low, high), edges)
        spans.append((iterations[positions[0]], iterations[positions[-1]]))
        shares.append([float(x) for x in counts / max(len(together), 1)])
    outside = int(((everything < low) | (everything > high)).sum())
    return Heat([float(x) for x in edges], spans, shares, outside, not_numbers)


def _flagged(findings: Iterable[Finding]) -> dict[int, set[str]]:
    """Return iteration -> group ids that the shown rows of a finding name."""
    flagged: dict[int, set[str]] = {}
    for finding in findings:
        for row in finding.rows[:FINDING_ROWS]:
            if row.group_id is not None:
                flagged.setdefault(row.iteration, set()).add(row.group_id)
    return flagged


def _completions(findings: Iterable[Finding]) -> set[str]:
    return {row.completion_id for finding in findings for row in finding.rows if row.completion_id is not None}
