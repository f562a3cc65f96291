"""Checks of what became of the groups: saturation, completions against their references, prompts lost again."""

import polars as pl

from grpo.groups import differ
from stages.inspect.audit.findings import Finding, Outcome, Severity, checked, not_applicable, percent, row_refs
from stages.inspect.audit.run_rows import RunRows, mean
from stages.inspect.audit.thresholds import AuditConfig

NO_TREND = "too few iterations for a trend"


def saturation(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether groups tell nothing any more, and whether something backs that they all pass."""
    check, limits = "saturation", config.saturation
    groups = _groups(run)
    if not len(groups):
        return not_applicable(check, "no iteration has rewards")
    if not run.late:
        return not_applicable(check, NO_TREND)
    early, late = run.window(groups, run.early), run.window(groups, run.late)
    if not len(early) or not len(late):
        return not_applicable(check, "the first or the last iterations have no rewards")
    flat, failing = mean(late, "has_zero_variance"), mean(late, "is_failing")
    spread_before, spread = mean(early, "std"), mean(late, "std")
    ratio = spread / spread_before if spread_before > 0 else 1.0
    note = (
        f"late groups without spread: {percent(flat)}, of them not passing {percent(failing)}; spread within groups "
        f"{spread_before:.3g} -> {spread:.3g}"
    )
    findings = []
    grown = failing - mean(early, "is_failing")
    if flat >= limits.flat_share or ratio <= limits.std_ratio:
        unbacked = _unbacked(run, late, config)
        severity: Severity = "warning" if unbacked else "info"
        message = f"{note}; " + (unbacked or "training has little left to compare")
        shown = late.filter(pl.col("has_zero_variance")).sort("iteration", "group_id", descending=[True, False])
        findings.append(Finding(check, severity, message, flat, limits.flat_share, row_refs(shown)))
    if grown >= limits.failing_growth:
        message = (
            f"groups whose members all get the same reward below {run.pass_threshold:g} grew from "
            f"{percent(failing - grown)} to {percent(failing)}: the policy stopped trying anything else"
        )
        shown = late.filter(pl.col("is_failing")).sort("iteration", "group_id", descending=[True, False])
        findings.append(Finding(check, "warning", message, grown, limits.failing_growth, row_refs(shown)))
    return checked(check, note, findings)


def _groups(run: RunRows) -> pl.DataFrame:
    """Return one row per scored group of two or more: has_zero_variance, is_failing, std, pass_rate, agreement."""
    reward = pl.col("reward")
    return (
        run.scored.group_by("iteration", "group_id", "prompt_id", maintain_order=True)
        .agg(
            (~differ(reward)).alias("has_zero_variance"),
            reward.std().alias("std"),
            (reward >= run.pass_threshold).mean().alias("pass_rate"),
            pl.col("agrees").mean().alias("agreement"),
            pl.len().alias("num_completions"),
        )
        .filter(pl.col("num_completions") > 1)
        .with_columns(is_failing=pl.col("has_zero_variance") & (pl.col("pass_rate") == 0))
    )


def _unbacked(run: RunRows, late: pl.DataFrame, config: AuditConfig) -> str:
    """Return in words that neither references nor held-out questions confirm the passing groups, else nothing."""
    passing = late.filter(pl.col("has_zero_variance"), pl.col("pass_rate") > 0)
    if not len(passing):
        return ""
    if references_are_usable(run, config):
        agreement = mean(passing, "agreement")
        if 1 - agreement >= config.saturation.unbacked_gap:
            return f"but {percent(agreement)} of the answers of passing groups name the reference answer"
        return ""
    evaluations = run.evaluations.filter(pl.col("decoding") == "sampled", pl.col("is_correct").is_not_null())
    recent = evaluations.filter(pl.col("iteration") == pl.col("iteration").max())
    if len(recent) and mean(late, "pass_rate") - mean(recent, "is_correct") >= config.saturation.unbacked_gap:
        return f"but {percent(mean(recent, 'is_correct'))} of the answers to held-out questions pass"
    return ""


def references_are_usable(run: RunRows, config: AuditConfig) -> bool:
    """Return whether references have a form that completions name word by word, in some iteration at least."""
    per_iteration = run.completions.group_by("iteration").agg(pl.col("agrees").mean())["agrees"]
    best = per_iteration.max()
    return best is not None and float(best) >= config.reference.min_agreement  # type: ignore[arg-type]


def reward_against_reference(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether the reward rises while completions name their reference less, or passes what does not name it."""
    check, limits = "reward_against_reference", config.reference
    rows = run.scored.filter(pl.col("agrees").is_not_null())
    if not len(rows):
        return not_applicable(check, "no scored answer has a reference")
    if not references_are_usable(run, config):
        return not_applicable(
            check, f"never {percent(limits.min_agreement)} of the answers name their reference: it has another form"
        )
    early, late = run.window(rows, run.early), run.window(rows, run.late)
    if min(len(early), len(late)) < config.data.min_answers:
        return not_applicable(check, NO_TREND)
    before, after = mean(early, "agrees"), mean(late, "agrees")
    reward_before, reward_after = mean(early, "reward"), mean(late, "reward")
    gap_before, gap = (_passing(frame, run) - mean(frame, "agrees") for frame in (early, late))
    note = (
        f"answers that name the reference {percent(before)} -> {percent(after)}, mean reward {reward_before:.3g} -> "
        f"{reward_after:.3g}"
    )
    shown = late.filter(~pl.col("agrees")).sort("reward", "completion_id", descending=[True, False])
    findings = []
    if before - after >= limits.agreement_fall and reward_after > reward_before:
        message = f"the reward rises while fewer answers are right: {note}"
        findings.append(Finding(check, "warning", message, before - after, limits.agreement_fall, row_refs(shown)))
    elif gap >= limits.gap:
        severity: Severity = "warning" if gap - gap_before >= limits.gap / 2 else "info"
        message = (
            f"{percent(gap)} more of the late answers pass than name the reference (at first {percent(gap_before)})"
        )
        findings.append(Finding(check, severity, message, gap, limits.gap, row_refs(shown)))
    return checked(check, note, findings)


def _passing(frame: pl.DataFrame, run: RunRows) -> float:
    return float(frame.select((pl.col("reward") >= run.pass_threshold).mean()).item())


def class_change(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether prompts that were solved are unsolved when they come again."""
    check, limits = "class_change", config.class_change
    groups = _groups(run)
    if not len(groups):
        return not_applicable(check, "no iteration has rewards")
    # several rows of a source may hold the same question: its text says what it is
    named = groups.join(
        run.prompts.select("iteration", "prompt_id", "prompt"), on=["iteration", "prompt_id"], how="left"
    )
    visits = (
        named.group_by("iteration", "prompt")
        .agg(pl.col("pass_rate").mean(), pl.col("group_id").min())
        .sort("prompt", "iteration")
        .with_columns(
            before=pl.col("pass_rate").shift(1).over("prompt"), seen=pl.col("iteration").shift(1).over("prompt")
        )
    )
    solved = visits.filter(pl.col("before") >= limits.solved)
    if len(solved) < limits.min_visits:
        return not_applicable(check, f"{len(solved)} solved prompts came again, {limits.min_visits} are needed")
    lost = solved.filter(pl.col("pass_rate") <= limits.unsolved)
    won = visits.filter(pl.col("before") <= limits.unsolved, pl.col("pass_rate") >= limits.solved)
    share = len(lost) / len(solved)
    note = (
        f"{len(lost)} of {len(solved)} solved prompts were unsolved at their next visit; {len(won)} went the other way"
    )
    if share < limits.info_share:
        return checked(check, note)
    severity: Severity = "warning" if share >= limits.share and len(lost) > len(won) else "info"
    refs = row_refs(lost.sort("iteration", "group_id", descending=[True, False]))
    threshold = limits.share if severity == "warning" else limits.info_share
    return checked(check, note, [Finding(check, severity, note, share, threshold, refs)])
