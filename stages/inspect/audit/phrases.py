"""rewarded_phrase: a phrase, word or character that rewarded completions have, others lack, and that spreads.

Completions are compared with the others of their group, so that a word of the question says nothing. For every
sequence of one to three words (characters, where completions are a few words long; the beginning and the end of a
completion count as one) the check takes its share among the completions over their group's mean reward, minus that
among those under it.
"""

import polars as pl

from stages.inspect.audit.findings import Finding, Outcome, Severity, checked, not_applicable, percent, row_refs
from stages.inspect.audit.rewards import by_reward
from stages.inspect.audit.run_rows import RunRows
from stages.inspect.audit.thresholds import AuditConfig, RewardedPhraseConfig
from stages.ngrams import plain, sequences

START, END = "[start]", "[end]"
LENGTHS = (1, 2, 3)
MOST_NAMED = 5


def rewarded_phrase(run: RunRows, config: AuditConfig) -> Outcome:
    """Return the phrases that pay and spread, for the combined reward and each of its parts."""
    check, limits = "rewarded_phrase", config.rewarded_phrase
    if not run.late:
        return not_applicable(check, "too few iterations for a trend")
    is_short = _median_words(run.texts) < limits.short_words
    early = _phrases(_few(run.window(run.texts, run.early), limits), limits, is_short)
    late = _phrases(_few(run.window(run.texts, run.late), limits), limits, is_short)
    references = _reference_shares(run, limits, is_short) if is_short else None
    spread = _shares(late, "late").join(_shares(early, "early"), on="phrase", how="left").fill_null(0.0)
    spread = spread.filter(pl.col("late") >= limits.late_share, pl.col("late") - pl.col("early") >= limits.growth)
    if references is not None:
        spread = (
            spread.join(references, on="phrase", how="left")
            .with_columns(pl.col("expected").fill_null(0.0))
            .filter(pl.col("late") - pl.col("expected") >= limits.unexplained)
        )
    for text in limits.expected:
        spread = spread.filter(~pl.lit(text.lower()).str.contains(_bare(pl.col("phrase")), literal=True))
    findings, notes = [], []
    for name, frame in by_reward(run).items():
        rewards = frame.select("completion_id", "reward")
        rows = run.texts.drop("reward").join(rewards, on="completion_id", maintain_order="left")
        compared = _compared(rows, limits)
        if len(compared) < config.data.min_answers:
            notes.append(f"{name}: too few sampled answers in groups whose rewards differ")
            continue
        paid = _paid(compared, spread, limits, is_short)
        notes.append(f"{name}: {len(paid)} phrases that pay and spread")
        if len(paid):
            findings.append(_finding(name, paid, run, limits))
    if not notes:
        return not_applicable(check, "no iteration has rewards")
    if all("too few" in note for note in notes):
        return not_applicable(check, "; ".join(notes))
    return checked(check, "; ".join(notes), findings)


def _bare(phrase: pl.Expr) -> pl.Expr:
    """Return the phrase without the marks of beginning and end."""
    return phrase.str.replace(START, "", literal=True).str.replace(END, "", literal=True).str.strip_chars(" ")


def _median_words(texts: pl.DataFrame) -> float:
    return float(texts.select(pl.col("completion").str.count_matches(r"\S+").median()).item())


def _few(rows: pl.DataFrame, limits: RewardedPhraseConfig) -> pl.DataFrame:
    """Return at most ``limits.rows`` rows, whole groups; group ids are hashes, so their order is a draw."""
    return rows.sort("group_id", "completion_id").head(limits.rows).with_row_index("row")


def _compared(rows: pl.DataFrame, limits: RewardedPhraseConfig) -> pl.DataFrame:
    """Return completions of informative groups that lie over or under their group's mean, with is_rewarded."""
    centred = (pl.col("reward") - pl.col("reward").mean()).over("group_id")
    known = rows.filter(pl.col("reward").is_not_null()).with_columns(centred=centred)
    return _few(known.filter(pl.col("centred").abs() > 1e-9), limits).with_columns(is_rewarded=pl.col("centred") > 0)


def _phrases(
    rows: pl.DataFrame, limits: RewardedPhraseConfig, is_short: bool, column: str = "completion"
) -> pl.DataFrame:
    """Return row and phrase, each phrase of a completion once; the completions without any count as rows of null."""
    text = plain(pl.col(column))
    units = (text.str.split("") if is_short else text.str.split(" ")).list.filter(pl.element() != "")
    half = limits.units // 2
    # a unit that no phrase contains separates beginning and end of a long text
    kept = (
        pl.when(pl.col("units").list.len() > 2 * half)
        .then(pl.concat_list(pl.col("units").list.head(half), pl.lit("\x1e"), pl.col("units").list.tail(half)))
        .otherwise(pl.col("units"))
    )
    framed = rows.select("row", units=units).select("row", units=pl.concat_list(pl.lit(START), kept, pl.lit(END)))
    found = pl.concat([sequences(framed, "units", n) for n in LENGTHS]).unique()
    separator = "" if is_short else " "
    told = found.filter(
        ~pl.col("sequence").str.contains("\x1e", literal=True),
        ~pl.col("sequence").is_in([START, END, f"{START}\x1f{END}"]),
    )
    return told.select("row", phrase=pl.col("sequence").str.replace_all("\x1f", separator, literal=True)).with_columns(
        total=pl.lit(len(rows))
    )


def _shares(phrases: pl.DataFrame, name: str) -> pl.DataFrame:
    return phrases.group_by("phrase").agg((pl.len() / pl.col("total").first()).alias(name))


def _reference_shares(run: RunRows, limits: RewardedPhraseConfig, is_short: bool) -> pl.DataFrame | None:
    """Return the share of the late reference answers that have each phrase: what right completions look like."""
    asked = run.window(run.prompts, run.late).filter(pl.col("reference").is_not_null())
    if not len(asked):
        return None
    rows = asked.sort("prompt_id").head(limits.rows).with_row_index("row")
    return _shares(_phrases(rows, limits, is_short, "reference"), "expected")


def _paid(compared: pl.DataFrame, spread: pl.DataFrame, limits: RewardedPhraseConfig, is_short: bool) -> pl.DataFrame:
    """Return the spreading phrases whose difference is large, the largest first, with what the phrase alone brings."""
    totals = compared.select(rewarded=pl.col("is_rewarded").sum(), unrewarded=(~pl.col("is_rewarded")).sum())
    num_rewarded, num_unrewarded = totals.row(0)
    counted = (
        _phrases(compared, limits, is_short)
        .join(spread, on="phrase", how="semi")
        .join(compared.select("row", "is_rewarded"), on="row")
        .group_by("phrase")
        .agg(rewarded=pl.col("is_rewarded").sum(), having=pl.len())
    )
    shares = counted.with_columns(
        over=pl.col("rewarded") / max(num_rewarded, 1),
        under=(pl.col("having") - pl.col("rewarded")) / max(num_unrewarded, 1),
        sufficient=pl.col("rewarded") / pl.col("having"),
    ).with_columns(difference=pl.col("over") - pl.col("under"))
    paid = shares.filter(pl.col("difference") >= limits.difference).join(spread, on="phrase")
    return paid.sort("difference", pl.col("phrase").str.len_chars(), "phrase", descending=[True, False, False])


def _finding(name: str, paid: pl.DataFrame, run: RunRows, limits: RewardedPhraseConfig) -> Finding:
    top = paid.row(0, named=True)
    severity: Severity = "warning" if top["sufficient"] >= limits.sufficient else "info"
    others = [repr(phrase) for phrase in paid["phrase"][1:MOST_NAMED].to_list()]
    message = (
        f"{name} follows {top['phrase']!r}: {percent(top['over'])} of the better answers of a group have it, "
        f"{percent(top['under'])} of the worse ones; an answer with it is among the better ones in "
        f"{percent(top['sufficient'])} of cases; in all answers {percent(top['early'])} -> {percent(top['late'])}"
    )
    message += f" (also {', '.join(others)})" if others else ""
    late = run.window(run.texts, run.late)
    having = late.filter(plain(pl.col("completion")).str.contains(_bare(pl.lit(top["phrase"])), literal=True))
    shown = having.sort("reward", "completion_id", descending=[True, False], nulls_last=True)
    return Finding("rewarded_phrase", severity, message, top["difference"], limits.difference, row_refs(shown))
