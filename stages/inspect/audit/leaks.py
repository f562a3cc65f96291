"""Checks of completions that need not be found: given in the prompt, copied from it, remembered, or evaluated on."""

import polars as pl

from stages.inspect.audit.findings import Finding, Outcome, Severity, checked, graded, not_applicable, percent, row_refs
from stages.inspect.audit.run_rows import RunRows, mean
from stages.inspect.audit.text import numbered
from stages.inspect.audit.thresholds import AuditConfig
from stages.ngrams import names_reference, normalized, plain, sequences, words


def prompt_copy(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether completions repeat long pieces of their prompt, and whether that has grown."""
    check, limits = "prompt_copy", config.prompt_copy
    late = _copied(run, run.late, limits.words, limits.overlap)
    if len(late) < config.data.min_answers:
        return not_applicable(check, f"too few answers of {limits.words} words or more")
    share = mean(late, "is_copy")
    note = f"{percent(share)} of the late answers of {limits.words} words or more stand mostly in their prompt"
    grown = None
    if run.early:
        early = _copied(run, run.early, limits.words, limits.overlap)
        before = mean(early, "is_copy")
        grown, note = share - before, f"{note} (at first {percent(before)})"
    if share < limits.share:
        return checked(check, note)
    severity: Severity = "warning" if grown is not None and grown >= limits.growth else "info"
    shown = late.filter("is_copy").sort("reward", "completion_id", descending=[True, False], nulls_last=True)
    return checked(check, note, [Finding(check, severity, note, share, limits.share, row_refs(shown))])


def _copied(run: RunRows, window: list[int], length: int, overlap: float) -> pl.DataFrame:
    """Return the completions of a window that are long enough, with is_copy."""
    rows = numbered(run, window)
    told = sequences(rows.select("row", units=words(pl.col("completion"))), "units", length)
    # a prompt is cut up once, however many completions it has
    prompts = rows.unique("prompt", keep="first", maintain_order=True).select(pl.col("row").alias("asked"), "prompt")
    given = sequences(prompts.select("asked", units=words(pl.col("prompt"))), "units", length, key="asked").unique()
    owned = rows.select("row", "prompt").join(prompts, on="prompt").select("row", "asked")
    marked = given.with_columns(is_given=pl.lit(True))
    shares = (
        told.join(owned, on="row")
        .join(marked, on=["asked", "sequence"], how="left")
        .group_by("row", maintain_order=True)
        .agg(copied=pl.col("is_given").fill_null(False).mean())
    )
    return rows.join(shares, on="row", maintain_order="left").with_columns(is_copy=pl.col("copied") >= overlap)


def reference_in_prompt(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether prompts contain their own reference answer, and whether completions profit from it."""
    check, limits = "reference_in_prompt", config.reference_leak
    asked = run.prompts.with_columns(
        bare=normalized(pl.col("reference")).str.strip_chars(" "),
        is_given=names_reference(pl.col("prompt"), pl.col("reference")),
    ).filter(pl.col("bare").str.len_chars() >= limits.min_characters, pl.col("is_given").is_not_null())
    if len(asked) < limits.min_prompts:
        return not_applicable(check, f"{len(asked)} prompts have a reference of {limits.min_characters} characters")
    num_references = asked["bare"].n_unique()
    if num_references < limits.min_references:
        return not_applicable(check, f"only {num_references} different references: a choice among given answers")
    # a leak that begins later must not drown in the iterations before it
    per_iteration = asked.group_by("iteration").agg(pl.col("is_given").mean(), pl.len()).sort("iteration")
    share = mean(asked, "is_given")
    recent = run.window(asked, run.late or run.iterations)
    late = mean(recent, "is_given")
    highest = max(share, late)
    note = f"{percent(share)} of {len(asked)} prompts contain their reference answer (late: {percent(late)})"
    if highest < limits.info_share:
        return checked(check, note)
    rows = run.completions.join(
        asked.select("iteration", "prompt_id", "is_given"), on=["iteration", "prompt_id"], maintain_order="left"
    )
    profit = rows.group_by("is_given").agg(pl.col("agrees").mean())
    told = {given: agrees for given, agrees in profit.iter_rows() if agrees is not None}
    note += f"; answers to them name it in {percent(told.get(True, 0.0))} of cases"
    note += f", answers to the others in {percent(told[False])}" if False in told else ""
    first = per_iteration.filter(pl.col("is_given") >= limits.info_share)
    note += f"; first in iteration {first['iteration'][0]}" if len(first) else ""
    severity, threshold = graded(highest, limits.info_share, limits.share)
    shown = rows.filter("is_given", "agrees").sort("iteration", "completion_id", descending=[True, False])
    shown = shown if len(shown) else rows.filter("is_given")
    return checked(check, note, [Finding(check, severity, note, highest, threshold, row_refs(shown))])


def reference_verbatim(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether completions repeat long reference answers word by word, as if remembered."""
    check, limits = "reference_verbatim", config.reference_leak
    recent = run.window(run.texts, run.late) if run.late else run.texts
    rows = recent.with_columns(
        is_verbatim=names_reference(pl.col("completion"), pl.col("reference")),
        is_given=names_reference(pl.col("prompt"), pl.col("reference")),
    ).filter(words(pl.col("reference")).list.len() >= limits.verbatim_words)
    if len(rows) < config.data.min_answers:
        return not_applicable(check, f"too few answers have a reference of {limits.verbatim_words} words or more")
    share = mean(rows, "is_verbatim")
    note = f"{percent(share)} of the late answers repeat a reference of {limits.verbatim_words} words or more"
    if share < limits.verbatim_share:
        return checked(check, note)
    shown = rows.filter("is_verbatim").sort("reward", "completion_id", descending=[True, False], nulls_last=True)
    given = mean(shown, "is_given")
    message = f"{note} word by word; of these {percent(given)} have it in their prompt"
    return checked(check, note, [Finding(check, "warning", message, share, limits.verbatim_share, row_refs(shown))])


def held_out_leak(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether held-out questions, by id or by text, or their long reference answers are in the training data."""
    check, limits = "held_out_leak", config.held_out
    if not len(run.held_out):
        return not_applicable(check, "the run has no held-out prompts")
    held_out = run.held_out.with_columns(text=plain(pl.col("prompt")))
    training = run.prompts.with_columns(text=plain(pl.col("prompt")))
    seen = training.filter(
        pl.col("text").is_in(held_out["text"].implode()) | pl.col("prompt_id").is_in(held_out["prompt_id"].implode())
    )
    leaked = held_out.filter(
        pl.col("text").is_in(seen["text"].implode()) | pl.col("prompt_id").is_in(seen["prompt_id"].implode())
    )
    share = leaked.height / held_out.height
    note = f"{leaked.height} of {held_out.height} held-out questions stand among the training prompts"
    findings = []
    if share > limits.info_share:
        severity, threshold = graded(share, limits.info_share, limits.share)
        rows = run.completions.join(seen, on=["iteration", "prompt_id"], how="semi", maintain_order="left")
        groups = rows.unique("group_id", keep="first", maintain_order=True).select("iteration", "group_id")
        findings.append(Finding(check, severity, note, share, threshold, row_refs(groups)))
    findings += _remembered(run, config)
    return checked(check, note, findings)


def _remembered(run: RunRows, config: AuditConfig) -> list[Finding]:
    """Return a finding when training completions contain long reference answers of held-out questions."""
    long = run.held_out.filter(words(pl.col("reference")).list.len() >= config.reference_leak.verbatim_words).select(
        wanted=normalized(pl.col("reference"))
    )
    if not len(long):
        return []
    told = normalized(pl.col("completion"))
    hits = run.texts.filter(told.str.contains_any(long["wanted"].implode()), names_reference(
        pl.col("completion"), pl.col("reference")).fill_null(False).not_())  # fmt: skip
    if not len(hits):
        return []
    message = f"{len(hits)} training answers contain the long reference answer of a held-out question, not their own"
    return [Finding("held_out_leak", "warning", message, float(len(hits)), 0.0, row_refs(hits))]
