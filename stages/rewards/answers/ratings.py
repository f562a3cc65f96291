"""User satisfaction: what people said about stored answers, as ratings or as preferences, joined by completion_id.

The file is JSONL, CSV or Parquet. Ratings have the columns completion_id, rating and, if known, rater; preferences
have chosen_id, rejected_id and, if known, rater and is_tie. A null rating or id is a person who did not say.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl

from pipeline.errors import RewardError
from pipeline.files import sha256_file, user_path
from stages.rewards.base import Score
from stages.rewards.frames import Unscored, reward_frame
from stages.tables import read_table, require_columns

Method = Literal["win_rate", "bradley_terry"]
TOLERANCE = 1e-12
MAX_ROUNDS = 100_000
"""Bounds the Bradley-Terry iteration; with a prior it needs some hundred rounds."""

Comparison = tuple[str, str, str | None, bool]
"""chosen_id, rejected_id, rater, is_tie."""


def rating(
    completions: pl.DataFrame, file: str, lowest: float | None = None, highest: float | None = None
) -> pl.DataFrame:
    """Return the mean rating of each answer; with ``lowest`` and ``highest``, the ends of the scale, from 0 to 1.

    Every rater counts once: who rated an answer several times counts with the mean; rows without rater are different
    people. Null where nobody rated. The detail names each rater with the rating.
    """
    _check_scale(lowest, highest)
    found = _ratings(user_path(file), lowest, highest)
    return reward_frame(
        [_rated(found.get(completion_id), lowest, highest) for completion_id in completions["completion_id"]]
    )


def rating_identity(file: str, lowest: float | None = None, highest: float | None = None) -> dict[str, Any]:
    """Return the hash of the file and the scale. Read-only."""
    _check_scale(lowest, highest)
    return {"file_sha256": _file_sha256(file), "lowest": lowest, "highest": highest}


def preference(completions: pl.DataFrame, file: str, method: Method = "win_rate", prior: float = 0.5) -> pl.DataFrame:
    """Return a reward per answer from people's comparisons of two answers to the same prompt.

    ``win_rate``: wins over comparisons, a tie counting as half a win of each; from 0 to 1. ``bradley_terry``: the
    answers' scores s with P(a wins over b) = sigmoid(s_a - s_b), the most likely ones given the comparisons, as
    log strengths. So that an answer that never lost keeps a finite score, each answer has in addition won and lost
    ``prior`` times against one of score 0. It allows for whom an answer was compared with, which a win rate does not.

    Only answers that are connected by comparisons inform each other, and the file alone decides the rewards. Null where
    an answer was never compared. The detail has wins, losses, ties and raters.
    """
    _check_method(method, prior)
    comparisons = _comparisons(user_path(file))
    groups = dict(completions.select("completion_id", "group_id").iter_rows())
    for chosen, rejected, _, _ in comparisons:
        if chosen in groups and rejected in groups and groups[chosen] != groups[rejected]:
            raise RewardError(
                f"{file} compares {chosen} with {rejected}, which answer different prompts: expected answers of one "
                "group; remove the row"
            )
    facts = _facts(comparisons)
    if method == "bradley_terry":
        scores = bradley_terry([(a, b, tie) for a, b, _, tie in comparisons], prior)
    else:
        scores = {key: (f["wins"] + f["ties"] / 2) / (f["wins"] + f["losses"] + f["ties"]) for key, f in facts.items()}
    return reward_frame(
        [
            Score(scores[key], facts[key]) if key in facts else Unscored("nobody compared this answer")
            for key in completions["completion_id"]
        ]
    )


def preference_identity(file: str, method: Method = "win_rate", prior: float = 0.5) -> dict[str, Any]:
    """Return the hash of the file and what is made of it. Read-only."""
    _check_method(method, prior)
    return {"file_sha256": _file_sha256(file), "method": method, "prior": prior}


def bradley_terry(comparisons: Iterable[tuple[str, str, bool]], prior: float) -> dict[str, float]:
    """Return the log strength of every answer in (winner, loser, is_tie); see `preference`.

    Minorisation-maximisation (Hunter 2004, doi:10.1214/aos/1079120141), whose every round raises the likelihood.
    """
    won: dict[str, float] = {}
    met: dict[str, dict[str, float]] = {}
    for first, second, tie in comparisons:
        won[first] = won.get(first, 0.0) + (0.5 if tie else 1.0)
        won[second] = won.get(second, 0.0) + (0.5 if tie else 0.0)
        for one, other in ((first, second), (second, first)):
            met.setdefault(one, {})[other] = met.get(one, {}).get(other, 0.0) + 1.0
    scores: dict[str, float] = {}
    for members in _components(met):
        strengths = dict.fromkeys(members, 1.0)
        for _ in range(MAX_ROUNDS):
            change = 0.0
            for key in members:
                share = math.fsum(n / (strengths[key] + strengths[other]) for other, n in met[key].items())
                updated = (won[key] + prior) / (share + 2 * prior / (strengths[key] + 1.0))
                change = max(change, abs(math.log(updated / strengths[key])))
                strengths[key] = updated
            if change < TOLERANCE:
                break
        scores.update({key: math.log(strength) for key, strength in strengths.items()})
    return scores


def _file_sha256(file: str) -> str:
    if not user_path(file).is_file():
        raise RewardError(f"the file {file!r} does not exist: expected what people said, as .jsonl, .csv or .parquet")
    return sha256_file(user_path(file))


def _check_scale(lowest: float | None, highest: float | None) -> None:
    if (lowest is None) != (highest is None) or (lowest is not None and highest is not None and lowest >= highest):
        raise RewardError(f"lowest is {lowest} and highest {highest}: expected both with lowest < highest, or neither")


def _check_method(method: str, prior: float) -> None:
    if method not in ("win_rate", "bradley_terry"):
        raise RewardError(f"method is {method!r}: expected win_rate or bradley_terry; correct the argument")
    if prior <= 0:
        raise RewardError(f"prior is {prior}: expected more than 0, without which scores can be infinite; raise it")


def _ratings(path: Path, lowest: float | None, highest: float | None) -> dict[str, list[tuple[str | None, float]]]:
    """Return the ratings of each completion as (rater, rating) in the order of the file."""
    rows = read_table(path)
    require_columns(rows, path, ("completion_id", "rating"))
    rater = pl.col("rater").cast(pl.String) if "rater" in rows.columns else pl.lit(None, pl.String)
    rows = rows.select(
        pl.col("completion_id").cast(pl.String), rater.alias("rater"), "rating", number=_number(rows["rating"])
    ).drop_nulls(["completion_id", "rating"])
    found: dict[str, list[tuple[str | None, float]]] = {}
    for completion_id, who, text, value in rows.iter_rows():
        if value is None or not math.isfinite(value):
            raise RewardError(f"{path} rates {completion_id} with {text!r}: expected a number, or null; correct it")
        if lowest is not None and highest is not None and not lowest <= value <= highest:
            raise RewardError(
                f"{path} rates {completion_id} with {value:g}: expected {lowest:g} to {highest:g}; correct the rating "
                "or the scale"
            )
        found.setdefault(completion_id, []).append((who, value))
    return found


def _number(values: pl.Series) -> pl.Expr:
    """Return the column as floats; in texts, true and false are 1 and 0, and what is no number is null."""
    if values.dtype != pl.String:
        return pl.col("rating").cast(pl.Float64, strict=False)
    text = pl.col("rating").str.strip_chars().str.to_lowercase()
    return text.replace({"true": "1", "false": "0"}).cast(pl.Float64, strict=False)


def _rated(
    ratings: list[tuple[str | None, float]] | None, lowest: float | None, highest: float | None
) -> Score | Unscored:
    if not ratings:
        return Unscored("nobody rated this answer")
    per_rater: dict[object, list[float]] = {}
    for index, (rater, value) in enumerate(ratings):
        per_rater.setdefault(index if rater is None else rater, []).append(value)
    means = [math.fsum(values) / len(values) for values in per_rater.values()]
    mean = math.fsum(means) / len(means)
    detail = {"mean": mean, "ratings": [{"rater": rater, "rating": value} for rater, value in ratings]}
    if lowest is None or highest is None:
        return Score(mean, detail)
    return Score((mean - lowest) / (highest - lowest), detail)


def _comparisons(path: Path) -> list[Comparison]:
    """Return what the file says, in its order."""
    rows = read_table(path)
    require_columns(rows, path, ("chosen_id", "rejected_id"))
    rater = pl.col("rater").cast(pl.String) if "rater" in rows.columns else pl.lit(None, pl.String)
    tie = pl.lit(False)
    if "is_tie" in rows.columns:
        tie = (
            pl.col("is_tie").cast(pl.String).str.strip_chars().str.to_lowercase().is_in(["true", "1"]).fill_null(False)
        )
    rows = rows.select(
        pl.col("chosen_id", "rejected_id").cast(pl.String), rater.alias("rater"), tie.alias("is_tie")
    ).drop_nulls(["chosen_id", "rejected_id"])
    same = rows.filter(pl.col("chosen_id") == pl.col("rejected_id"))
    if len(same):
        raise RewardError(f"{path} compares {same['chosen_id'][0]} with itself: expected two answers; remove the row")
    return list(rows.iter_rows())


def _facts(comparisons: list[Comparison]) -> dict[str, dict[str, Any]]:
    """Return wins, losses, ties and the known raters of each answer."""
    facts: dict[str, dict[str, Any]] = {}
    for chosen, rejected, rater, tie in comparisons:
        for key, outcome in ((chosen, "wins"), (rejected, "losses")):
            fact = facts.setdefault(key, {"wins": 0, "losses": 0, "ties": 0, "raters": []})
            fact["ties" if tie else outcome] += 1
            if rater is not None and rater not in fact["raters"]:
                fact["raters"] = sorted([*fact["raters"], rater])
    return facts


def _components(met: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the sets of answers that are connected by comparisons, each in sorted order."""
    seen: set[str] = set()
    components = []
    for start in sorted(met):
        if start in seen:
            continue
        seen.add(start)
        members = [start]
        for key in members:  # grows while it is walked
            fresh = [other for other in met[key] if other not in seen]
            seen.update(fresh)
            members += fresh
        components.append(sorted(members))
    return components
