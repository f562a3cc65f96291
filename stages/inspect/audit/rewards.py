"""Checks of what the reward pays for: length, one part alone, one policy alone.

Correlations are taken within groups, where GRPO compares: a long prompt that asks for a long completion says nothing.
"""

import numpy as np
import polars as pl

from grpo.groups import differ
from stages.inspect.audit.findings import Finding, Outcome, Severity, checked, not_applicable, percent, row_refs
from stages.inspect.audit.run_rows import RunRows
from stages.inspect.audit.thresholds import AuditConfig

COMBINED = "the combined reward"


def reward_length(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether completions are paid by their length: within groups, and over the iterations."""
    check, limits = "reward_length", config.reward_length
    findings, notes = [], []
    for name, frame in by_reward(run).items():
        rows = frame.filter(differ(pl.col("reward")).over("group_id"))
        if len(rows) < config.data.min_answers:
            notes.append(f"{name}: {len(rows)} answers in groups whose rewards differ")
            continue
        length = pl.col("num_characters")
        moving = rows.select((length.max() > length.min()).over("group_id").mean()).item()
        if moving < limits.min_moving_share:
            notes.append(f"{name}: the length varies in {percent(moving)} of the informative groups")
            continue
        strongest = _strongest(rows, config)
        if strongest is None:
            notes.append(f"{name}: too few answers in groups whose rewards differ, in every window")
            continue
        rho, first, last, products = strongest
        notes.append(f"{name}: rank correlation at most {rho:.2f}")
        if abs(rho) < limits.correlation:
            continue
        change = _length_change(run)
        is_drift = change is not None and change * rho > 0 and abs(change) >= limits.length_change
        moved = "too few iterations for a trend" if change is None else f"mean length changed by {percent(change)}"
        severity: Severity = "warning" if is_drift or abs(rho) >= limits.strong_correlation else "info"
        findings.append(
            Finding(
                check,
                severity,
                f"{name} follows the {'length' if rho > 0 else 'brevity'} of answers: rank correlation {rho:.2f} "
                f"within the groups of iterations {first} to {last}; {moved}",
                rho,
                limits.correlation,
                row_refs(products),
            )
        )
    findings += _trend(run, config)
    if not notes:
        return not_applicable(check, "no iteration has rewards")
    if not findings and all("rank correlation" not in note for note in notes):
        return not_applicable(check, "; ".join(notes))
    return checked(check, "; ".join(notes), findings)


def by_reward(run: RunRows) -> dict[str, pl.DataFrame]:
    """Return the scored completions by the combined reward and, where there are several, by each part."""
    frames = {COMBINED: run.scored} if len(run.scored) else {}
    names = run.parts["reward_name"].unique(maintain_order=True).to_list()
    if len(names) > 1:
        unscored = run.completions.drop("reward")
        for name in names:
            part = run.parts.filter(pl.col("reward_name") == name, pl.col("reward").is_not_null())
            rewards = part.select("completion_id", "reward")
            frames[f"reward {name!r}"] = unscored.join(rewards, on="completion_id", maintain_order="left")
    return frames


def _strongest(rows: pl.DataFrame, config: AuditConfig) -> tuple[float, int, int, pl.DataFrame] | None:
    """Return the strongest correlation of a window, the window, and its rows, those that show it best first.

    None when no window has enough completions.
    """
    ranked = rows.with_columns(
        x=pl.col("num_characters").rank().over("group_id"),
        y=pl.col("reward").rank().over("group_id"),
    ).with_columns(pl.col("x", "y") - pl.col("x", "y").mean().over("group_id"))
    x, y = pl.col("x"), pl.col("y")
    sums = (
        ranked.group_by("iteration")
        .agg(xy=(x * y).sum(), xx=(x * x).sum(), yy=(y * y).sum(), rows=pl.len())
        .sort("iteration")
    )
    width = min(len(sums), config.data.window_most)
    rolled = sums.with_columns(pl.col("xy", "xx", "yy", "rows").rolling_sum(width, min_samples=1))
    # a window at the very beginning is shorter, and counts when it has the completions
    known = rolled.with_columns(
        rho=pl.when(pl.col("xx") > 0, pl.col("rows") >= config.data.min_answers).then(
            pl.col("xy") / (pl.col("xx") * pl.col("yy")).sqrt()
        ),
        first=pl.col("iteration").shift(width - 1).fill_null(sums["iteration"][0]),
    ).drop_nulls("rho")
    if not len(known):
        return None
    best = known.sort(pl.col("rho").abs().round(2), "rows", descending=True).row(0, named=True)
    inside = ranked.filter(pl.col("iteration").is_between(best["first"], best["iteration"]))
    sign = 1 if best["rho"] >= 0 else -1
    shown = inside.sort(sign * x * y, y, "completion_id", descending=[True, True, False])
    return float(best["rho"]), best["first"], best["iteration"], shown


def _length_change(run: RunRows) -> float | None:
    early = run.window(run.completions, run.early)["num_characters"].mean()
    late = run.window(run.completions, run.late)["num_characters"].mean()
    return None if early is None or late is None else float(late) / max(float(early), 1e-9) - 1  # type: ignore[arg-type]


def _trend(run: RunRows, config: AuditConfig) -> list[Finding]:
    """Return an info when mean reward and mean length climb together: long reasoning does so without harm."""
    limits = config.reward_length
    series = run.scored.group_by("iteration").agg(pl.col("reward", "num_characters").mean()).sort("iteration")
    change = _length_change(run)
    if len(series) < config.data.min_iterations or change is None or abs(change) < limits.trend_change:
        return []
    rho = series.select(pl.corr("reward", "num_characters", method="spearman")).item()
    if rho is None or np.isnan(rho) or abs(rho) < limits.trend:
        return []
    message = (
        f"mean reward and mean length move together over the iterations (rank correlation {rho:.2f}; the length "
        f"changed by {percent(change)}): compare with the correlation within groups"
    )
    ends = series.filter(pl.col("iteration").is_in([series["iteration"][0], series["iteration"][-1]]))
    return [Finding("reward_length", "info", message, float(rho), limits.trend, row_refs(ends.select("iteration")))]


def dominant_part(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether one reward part decides alone, and whether another falls meanwhile."""
    check, limits = "dominant_part", config.dominant_part
    names = run.parts["reward_name"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        return not_applicable(check, "there is only one reward" if names else "no iteration has rewards")
    shares = _part_shares(run)
    if shares is None or shares["rows"].max() < config.data.min_answers:  # type: ignore[operator]
        return not_applicable(check, "too few answers in groups whose rewards differ")
    top = shares.row(0, named=True)
    note = ", ".join(f"{r['reward_name']} {percent(r['share'])}" for r in shares.iter_rows(named=True))
    if top["share"] < limits.share:
        return checked(check, f"shares of the spread: {note}")
    fallen = _fallen_parts(run, top["reward_name"], limits.fall)
    fell = f"; meanwhile {', '.join(fallen)} fell" if fallen else ""
    combined = (pl.col("reward") - pl.col("reward").mean()).over("group_id")
    frame = run.window(run.informative, run.late or run.iterations)
    frame = frame if len(frame) else run.informative
    shown = frame.sort(combined, "completion_id", descending=[True, False])
    message = f"{top['reward_name']} makes {percent(top['share'])} of the spread of the combined reward{fell} ({note})"
    return checked(
        check,
        f"shares of the spread: {note}",
        [Finding(check, "warning" if fallen else "info", message, top["share"], limits.share, row_refs(shown))],
    )


def _part_shares(run: RunRows) -> pl.DataFrame | None:
    """Return reward_name, share, rows: cov(part, sum) / var(sum) within groups, the largest first; they add up to 1."""
    weight = pl.col("reward_name").replace_strict(run.weights, default=1.0, return_dtype=pl.Float64)
    part = (pl.col("reward") - pl.col("reward").mean()).over("group_id", "reward_name")
    if run.is_normalized_each:
        part = part / (pl.col("reward").std().over("group_id", "reward_name") + 1e-4)
    whole = (
        run.parts.filter(pl.col("reward").is_not_null().all().over("completion_id"))
        .with_columns(part=part * weight)
        .with_columns(whole=pl.col("part").sum().over("completion_id"))
    )
    shares = whole.group_by("reward_name", maintain_order=True).agg(
        share=(pl.col("part") * pl.col("whole")).sum() / (pl.col("whole") ** 2).sum(),
        rows=(pl.col("whole").abs() > 1e-9).sum(),
    )
    known = shares.filter(pl.col("share").is_finite()).sort("share", descending=True)
    return known if len(known) else None


def _fallen_parts(run: RunRows, top: str, fall: float) -> list[str]:
    """Return the other parts whose mean fell by ``fall`` of their early standard deviations."""
    if not run.late:
        return []
    others = run.parts.filter(pl.col("reward_name") != top)
    early = (
        run.window(others, run.early)
        .group_by("reward_name")
        .agg(before=pl.col("reward").mean(), std=pl.col("reward").std())
    )
    late = run.window(others, run.late).group_by("reward_name").agg(after=pl.col("reward").mean())
    both = early.join(late, on="reward_name").filter(
        pl.col("std") > 0, pl.col("before") - pl.col("after") >= fall * pl.col("std")
    )
    return [
        f"{name} from {before:.3g} to {after:.3g}"
        for name, before, after in both.sort("reward_name").select("reward_name", "before", "after").iter_rows()
    ]


def policy_share(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether the completions of one policy take all the positive advantage of groups that several wrote."""
    check, limits = "policy_share", config.policy_share
    mixed = run.informative.filter(pl.col("policy_name").n_unique().over("group_id") > 1)
    if len(mixed) < config.data.min_answers:
        return not_applicable(check, "no groups, or too few informative ones, are written by several policies")
    gain = (pl.col("reward") - pl.col("reward").mean()).over("group_id").clip(lower_bound=0)
    shares = (
        mixed.with_columns(gain=gain)
        .group_by("policy_name")
        .agg(pl.col("gain").sum(), answers=pl.len())
        .with_columns(pl.col("gain") / pl.col("gain").sum(), pl.col("answers") / pl.col("answers").sum())
        .sort("gain", descending=True)
    )
    note = ", ".join(f"{r['policy_name']} {percent(r['gain'])}" for r in shares.iter_rows(named=True))
    top = shares.row(0, named=True)
    if top["gain"] < limits.share or top["gain"] - top["answers"] < limits.excess:
        return checked(check, f"shares of the advantage: {note}")
    # the policy that trains may well be the best one; when another always wins, it is only copied
    severity: Severity = "info" if top["policy_name"] == "current" else "warning"
    shown = mixed.with_columns(gain=gain).filter(pl.col("policy_name") == top["policy_name"])
    message = (
        f"policy {top['policy_name']!r} wrote {percent(top['answers'])} of the answers of mixed groups and took "
        f"{percent(top['gain'])} of the positive advantage"
    )
    refs = row_refs(shown.sort("gain", "completion_id", descending=[True, False]))
    return checked(
        check, f"shares of the advantage: {note}", [Finding(check, severity, message, top["gain"], limits.share, refs)]
    )
