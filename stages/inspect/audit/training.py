"""Checks of the course of training: sudden jumps, cut completions, held-out against training questions."""

import polars as pl

from stages.inspect.audit.findings import (
    Finding,
    Outcome,
    RowRef,
    Severity,
    checked,
    graded,
    not_applicable,
    percent,
    row_refs,
)
from stages.inspect.audit.run_rows import RunRows, mean
from stages.inspect.audit.thresholds import AuditConfig

MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def jumps(run: RunRows, config: AuditConfig) -> Outcome:
    """Return the iterations at which reward, length, entropy or KL changed as they never did otherwise."""
    check = "jumps"
    series = run.completions.group_by("iteration").agg(
        reward=pl.col("reward").mean(), length=pl.col("num_tokens").cast(pl.Float64).mean()
    )
    series = series.join(run.training, on="iteration", how="left").sort("iteration")
    if len(series) < config.data.min_iterations:
        return not_applicable(check, "too few iterations for a trend")
    found: dict[int, list[tuple[str, float, float, float]]] = {}
    for name, floor in _floors(run, series, config).items():
        steps = series.select(
            "iteration",
            before=pl.col(name).shift(1),
            after=pl.col(name),
            change=pl.col(name).diff(),
            floor=floor,
        ).drop_nulls()
        if len(steps) < config.data.min_iterations - 1:
            continue
        middle = pl.col("change").median()
        deviation = MAD_TO_STD * (pl.col("change") - middle).abs().median()
        is_jump = (pl.col("change").abs() >= pl.col("floor")) & (
            (pl.col("change") - middle).abs() >= config.jumps.deviations * deviation
        )
        for row in steps.filter(is_jump).iter_rows(named=True):
            found.setdefault(row["iteration"], []).append((name, row["before"], row["after"], row["change"]))
    findings = []
    for iteration, changes in sorted(found.items()):
        names = {name for name, *_ in changes}
        # the iteration's own KL is measured by the update that follows its completions
        near = names | {name for other in (iteration - 1, iteration + 1) for name, *_ in found.get(other, [])}
        is_fall = any(name == "reward" and change < 0 for name, _, _, change in changes)
        # reward and entropy move together wherever something is learned quickly; reward and length need not
        is_odd = is_fall or "kl" in names or {"reward", "length"} <= near
        severity: Severity = "warning" if is_odd else "info"
        words = ", ".join(f"{name} {before:.3g} -> {after:.3g}" for name, before, after, _ in changes)
        message = f"iteration {iteration}: {words}"
        findings.append(Finding(check, severity, message, changes[0][3], config.jumps.deviations, [RowRef(iteration)]))
    return checked(check, f"{len(findings)} jumps in {len(series)} iterations", findings)


def _floors(run: RunRows, series: pl.DataFrame, config: AuditConfig) -> dict[str, pl.Expr]:
    """Return the smallest change of each number that counts."""
    limits = config.jumps
    low, high = run.scored.select(low=pl.col("reward").quantile(0.01), high=pl.col("reward").quantile(0.99)).row(0)
    floors = {
        "reward": pl.lit(limits.reward * max((high or 0.0) - (low or 0.0), 1e-6)),
        "length": limits.length * pl.col("length").shift(1),
        "entropy": pl.max_horizontal(limits.entropy * pl.col("entropy").shift(1), pl.lit(limits.entropy_floor)),
        "kl": pl.lit(limits.kl),
    }
    return {name: floor for name, floor in floors.items() if series[name].null_count() < len(series)}


def truncated(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether many of the latest completions were cut at max_tokens."""
    check, limits = "truncated", config.truncated
    recent = run.window(run.completions, run.late or run.iterations)
    if len(recent) < config.data.min_answers:
        return not_applicable(check, f"{len(recent)} answers are too few for a share")
    cut = recent.filter(pl.col("finish_reason") == "length")
    share = len(cut) / len(recent)
    note = f"{percent(share)} of the late answers are cut at max_tokens"
    if run.early:
        first = run.window(run.completions, run.early)
        note += f" (at first {percent(float(first.select((pl.col('finish_reason') == 'length').mean()).item()))})"
    if share < limits.info_share:
        return checked(check, note)
    severity, threshold = graded(share, limits.info_share, limits.share)
    refs = row_refs(cut.sort("reward", "iteration", "completion_id", descending=[True, True, False], nulls_last=True))
    return checked(check, note, [Finding(check, severity, note, share, threshold, refs)])


def timed_out(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether rewards run out of time, so that completions escape a verdict."""
    check, limits = "timed_out", config.timed_out
    rows = run.window(run.parts, run.late or run.iterations)
    if not len(rows):
        return not_applicable(check, "no iteration has rewards")
    shares = rows.group_by("reward_name", maintain_order=True).agg(pl.col("has_timed_out").mean())
    findings = []
    for name, share in shares.iter_rows():
        if share >= limits.info_share:
            severity, threshold = graded(share, limits.info_share, limits.share)
            message = f"the reward {name!r} ran out of time for {percent(share)} of the answers"
            shown = rows.filter(pl.col("reward_name") == name, "has_timed_out").sort("iteration", "completion_id")
            findings.append(Finding(check, severity, message, share, threshold, row_refs(shown)))
    note = ", ".join(f"{name} {percent(share)}" for name, share in shares.iter_rows())
    return checked(check, f"answers whose reward ran out of time: {note}", findings)


def evaluation_gap(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether the last evaluation's pass rates are far from that of the same policy's training completions."""
    check, limits = "evaluation_gap", config.evaluation_gap
    known = run.evaluations.drop_nulls("is_correct")
    if not len(known):
        return not_applicable(check, "the run has no scored evaluations")
    updates = int(known["iteration"].max())  # type: ignore[arg-type]
    # the policy after k updates writes the completions of iteration k; of the last policy k - 1 is the nearest
    own = run.scored.filter(pl.col("iteration").is_in([updates, updates - 1]))
    own = own.filter(pl.col("iteration") == pl.col("iteration").max())
    if len(own) < config.data.min_answers:
        return not_applicable(check, f"too few scored training answers near iteration {updates}")
    training = float(own.select((pl.col("reward") >= run.pass_threshold).mean()).item())
    last = known.filter(pl.col("iteration") == updates)
    rates = {
        kind: mean(rows, "is_correct")
        for kind in ("greedy", "sampled")
        if len(rows := last.filter(pl.col("decoding") == kind)) >= config.data.min_answers
    }
    if not rates:
        return not_applicable(check, f"the evaluation after {updates} updates has too few answers")
    note = f"after {updates} updates: training {training:.3f}" + "".join(f", {k} {v:.3f}" for k, v in rates.items())
    findings = []
    bounds = {
        "sampled": (-limits.sampled, limits.sampled),
        "greedy": (-limits.greedy_below, limits.greedy_above),
    }
    for kind, rate in rates.items():
        gap, (below, above) = rate - training, bounds[kind]
        if below < gap < above:
            continue
        # greedy decoding is often far better than sampling: only its falling short is a sign
        severity: Severity = "info" if kind == "greedy" and gap > 0 else "warning"
        wanted = pl.col("is_correct") if gap > 0 else ~pl.col("is_correct")
        shown = last.filter(pl.col("decoding") == kind, wanted).sort("completion_id")
        message = (
            f"held-out {kind} answers pass {percent(rate)}, the training answers of iteration {own['iteration'][0]} "
            f"{percent(training)} (rows: the evaluation after {updates} updates)"
        )
        findings.append(Finding(check, severity, message, gap, above if gap > 0 else below, row_refs(shown)))
    return checked(check, note, findings)
