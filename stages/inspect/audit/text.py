"""Checks of the texts by themselves: the same text again, within a completion, in a group, or over many prompts."""

import polars as pl

from stages.inspect.audit.findings import Finding, Outcome, Severity, checked, not_applicable, percent, row_refs
from stages.inspect.audit.run_rows import RunRows, mean
from stages.inspect.audit.thresholds import AuditConfig
from stages.ngrams import bands, normalized, plain, repeated_share, signatures, similarity, words


def numbered(run: RunRows, window: list[int]) -> pl.DataFrame:
    """Return the sampled texts of a window with a row number and their plain form."""
    rows = run.window(run.texts, window) if window else run.texts
    return rows.with_columns(text=plain(pl.col("completion"))).with_row_index("row")


def duplicates_in_group(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether the completions of a group say the same, letter by letter or nearly."""
    check, limits = "duplicates_in_group", config.duplicates
    late = numbered(run, run.late).with_columns(words=words(pl.col("completion")))
    grouped = late.filter((pl.len() > 1).over("group_id"))
    if len(grouped) < config.data.min_answers:
        return not_applicable(check, "too few answers in groups of two or more")
    exact = (pl.len() > 1).over("group_id", "text")
    near = _near_siblings(grouped, config)
    marked = grouped.with_columns(is_exact=exact, is_near=pl.col("row").is_in(near.implode()))
    is_double = pl.col("is_exact") | pl.col("is_near")
    share_exact, share = marked.select(exact=pl.col("is_exact").mean(), double=is_double.mean()).row(0)
    length = float(marked.select(pl.col("words").list.len().median()).item())
    note = f"{percent(share_exact)} of the late answers have an equal sibling, {percent(share)} an equal or similar one"
    if share < limits.group_share:
        return checked(check, note)
    # two short right completions can hardly differ
    severity: Severity = "warning" if length >= limits.min_words else "info"
    note += "" if severity == "warning" else f"; the median answer has {length:g} word(s), so that is no sign by itself"
    shown = marked.filter(is_double).sort("is_exact", "num_characters", "completion_id", descending=[True, True, False])
    return checked(check, note, [Finding(check, severity, note, share, limits.group_share, row_refs(shown))])


def _near_siblings(grouped: pl.DataFrame, config: AuditConfig) -> pl.Series:
    """Return the row numbers of completions that are similar to another of their group."""
    long = grouped.filter(pl.col("words").list.len() >= config.duplicates.min_words)
    if not len(long):
        return pl.Series("row", [], dtype=grouped["row"].dtype)
    signed = signatures(long, "words").join(long.select("row", "group_id"), on="row")
    pairs = signed.join(signed, on="group_id", suffix="_other").filter(pl.col("row") != pl.col("row_other"))
    return pairs.filter(similarity("", "_other") >= config.duplicates.similarity)["row"].unique()


def duplicates_across_prompts(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether many different prompts get one and the same completion."""
    check, limits = "duplicates_across_prompts", config.duplicates
    late = numbered(run, run.late)
    num_prompts = late["prompt"].n_unique()
    if num_prompts < limits.min_prompts:
        return not_applicable(check, f"{num_prompts} different prompts, {limits.min_prompts} are needed")
    told = late.filter(pl.col("text") != "")
    exact = _widest(told.with_columns(bucket=pl.col("text")), ["bucket"])
    near = _widest(_bucketed(told, config), ["band", "bucket"])
    best = exact if near is None or (exact is not None and exact["prompts"][0] >= near["prompts"][0]) else near
    if best is None:
        return not_applicable(check, "all late answers are empty")
    share = float(best["prompts"][0]) / num_prompts
    kind = "the same answer" if best is exact else "nearly the same answer"
    example = str(best["completion"][0])[:60]
    note = f"{percent(share)} of {num_prompts} late prompts get {kind}: {example!r}"
    expected = _most_common_reference(late)
    if share < limits.prompt_share or share < limits.reference_ratio * expected:
        return checked(check, note)
    note += f"; the most common reference answer is that of {percent(expected)}" if expected else ""
    refs = row_refs(best.unique("group_id", keep="first", maintain_order=True))
    return checked(check, note, [Finding(check, "warning", note, share, limits.prompt_share, refs)])


def _widest(frame: pl.DataFrame, keys: list[str]) -> pl.DataFrame | None:
    """Return the rows of the bucket that holds most prompts, with their number."""
    if not len(frame):
        return None
    counted = frame.with_columns(prompts=pl.col("prompt").n_unique().over(keys))
    widest = counted.sort("prompts", *keys, descending=[True, *[False for _ in keys]]).head(1).select(keys)
    return counted.join(widest, on=keys, how="semi", maintain_order="left")


def _bucketed(frame: pl.DataFrame, config: AuditConfig) -> pl.DataFrame:
    long = frame.with_columns(words=words(pl.col("completion"))).filter(
        pl.col("words").list.len() >= config.duplicates.min_words
    )
    # equal texts need one signature
    once = long.unique("text", keep="first", maintain_order=True)
    buckets = bands(signatures(once, "words")).join(once.select("row", "text"), on="row").drop("row")
    return long.join(buckets, on="text", maintain_order="left")


def _most_common_reference(frame: pl.DataFrame) -> float:
    prompts = frame.unique("prompt", keep="first").select(reference=normalized(pl.col("reference"))).drop_nulls()
    if not len(prompts):
        return 0.0
    return float(prompts["reference"].value_counts(sort=True)["count"][0]) / len(prompts)


def repetition(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether completions say the same again and again, and whether that has grown."""
    check, limits = "repetition", config.repetition
    late = _repetitive(run, run.late, config)
    if len(late) < config.data.min_answers:
        return not_applicable(check, f"too few answers of {limits.min_characters} characters or more")
    share = mean(late, "is_repetitive")
    if not run.early:
        note, grown = f"{percent(share)} of the answers are repetitive", None
    else:
        early = _repetitive(run, run.early, config, longest=False)
        before = mean(early, "is_repetitive")
        note, grown = f"repetitive answers {percent(before)} -> {percent(share)}", share - before
    if share < limits.share:
        return checked(check, note)
    severity: Severity = "info" if grown is not None and grown < limits.growth else "warning"
    shown = late.filter("is_repetitive").sort("repeated", "reward", "completion_id", descending=[True, True, False])
    example = str(shown["completion"][0])[:60]
    message = f"{note}, for example {example!r}"
    return checked(check, note, [Finding(check, severity, message, share, limits.share, row_refs(shown))])


def _repetitive(run: RunRows, window: list[int], config: AuditConfig, *, longest: bool = True) -> pl.DataFrame:
    """Return the texts of a window with is_repetitive; completions too short to tell count as not repetitive."""
    rows = numbered(run, window)
    limits = config.repetition
    shares = repeated_share(rows, limits.min_words, limits.min_characters)
    if longest and len(shares) < config.data.min_answers:
        return rows.head(0)
    return rows.join(shares, on="row", how="left", maintain_order="left").with_columns(
        is_repetitive=(pl.col("repeated") >= limits.repeated).fill_null(False)
    )


def empty_format(run: RunRows, config: AuditConfig) -> Outcome:
    """Return whether completions without content, only tags, markup and signs, are among the better-rewarded ones."""
    check, limits = "empty_format", config.empty_format
    late = numbered(run, run.late).filter(pl.col("reward").is_not_null())
    better = pl.col("reward") >= pl.col("reward").mean().over("group_id")
    passing = pl.col("reward") >= run.pass_threshold
    is_compared = (pl.col("reward").max() > pl.col("reward").min()).over("group_id")
    rewarded = late.filter(passing | (is_compared & better & (pl.col("advantage") > 0)))
    if len(rewarded) < config.data.min_answers:
        return not_applicable(check, "too few late answers are rewarded")
    bare = (
        pl.col("completion")
        .str.replace_all(r"<[^<>]{0,200}>", " ")
        .str.replace_all(r"\\[A-Za-z]+", " ")
        .str.replace_all(r"[^\p{L}\p{N}]+", "")
    )
    # a task may well ask for signs: a reference without letters and digits says so
    asks_for_signs = pl.col("reference").is_not_null() & ~pl.col("reference").str.contains(r"[\p{L}\p{N}]")
    empty = rewarded.filter((bare.str.len_chars() < limits.min_characters) & ~asks_for_signs.fill_null(False))
    share = len(empty) / len(rewarded)
    note = f"{percent(share)} of the rewarded late answers have no content beside tags, markup and signs"
    if share < limits.share:
        return checked(check, note)
    shown = empty.sort("reward", "completion_id", descending=[True, False])
    message = f"{note}, for example {str(shown['completion'][0])[:60]!r}"
    return checked(check, note, [Finding(check, "warning", message, share, limits.share, row_refs(shown))])
