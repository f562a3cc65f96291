"""From what a reward function returned to a reward, its error and its detail; exactly one of the first two is null."""

import json
import math
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.rewards.base import Score

if TYPE_CHECKING:
    import polars as pl

MAX_ERROR_CHARACTERS = 2000
MAX_DETAIL_CHARACTERS = 1 << 20
NO_REWARD_WITHIN = "no reward within"
TIMED_OUT = rf"^({NO_REWARD_WITHIN}|TimeoutError\b)"
"""Errors of calls that ran out of time, by the pool's limit or one of their own: another machine may give rewards."""


class Result(NamedTuple):
    """What stands in a row of rewards."""

    reward: float | None
    error: str | None
    detail: str | None


def no_reward_within(seconds: float) -> str:
    """Return the error of a call that took too long."""
    return f"{NO_REWARD_WITHIN} {seconds:g} s (time_limit)"


def has_timed_out(error: str = "error") -> "pl.Expr":
    """Return which rows have no reward because time ran out, from the column of errors; never null."""
    import polars as pl

    return pl.col(error).str.contains(TIMED_OUT).fill_null(False)


def checked(value: Any) -> Result:
    """Return a result that came from a worker process.

    Raises:
        ValueError: when it is none.
    """
    if not isinstance(value, list) or len(value) != len(Result._fields):
        raise ValueError(f"the result {str(value)[:80]}")
    reward, error, detail = value
    is_scored = isinstance(reward, float) and math.isfinite(reward) and error is None
    has_failed = reward is None and isinstance(error, str) and len(error) <= MAX_ERROR_CHARACTERS
    is_told = detail is None or (isinstance(detail, str) and len(detail) <= MAX_DETAIL_CHARACTERS)
    if not (is_scored or has_failed) or not is_told or any(isinstance(t, str) and _utf8(t) != t for t in value):
        raise ValueError(f"the result {str(value)[:80]}")
    return Result(reward, error, detail)


def result_frame(results: "list[Result] | list[tuple[Any, ...]]") -> "pl.DataFrame":
    """Return results as rows."""
    import polars as pl

    return pl.DataFrame(results, schema={"reward": pl.Float64, "error": pl.String, "detail": pl.String}, orient="row")


def of_value(value: Any) -> Result:
    """Return the result of one completion's call."""
    score = value if isinstance(value, Score) else Score(value)
    try:
        detail = (
            None
            if score.detail is None
            else _utf8(json.dumps(score.detail, sort_keys=True, ensure_ascii=False, allow_nan=False))
        )
    except (TypeError, ValueError) as error:
        return failed(f"the detail is not JSON ({error})")
    if detail is not None and len(detail) > MAX_DETAIL_CHARACTERS:
        return Result(None, _too_long(len(detail)), None)
    found = score.reward
    if found is None:
        return Result(None, "the function returned None", detail)
    if not isinstance(found, int | float) and not hasattr(found, "__float__"):
        return Result(None, f"the function returned a {type(found).__name__}, expected a number, None or Score", detail)
    try:
        reward = float(found)
    except (TypeError, ValueError, OverflowError) as error:
        return Result(None, f"{type(error).__name__}: {error}", detail)
    if not math.isfinite(reward):
        return Result(None, f"the function returned {reward}", detail)
    return Result(reward, None, detail)


def of_error(error: BaseException) -> Result:
    """Return the result of a call that raised; the last place in the user's code stands with the error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return failed(f"{type(error).__name__}: {error}{where}")


def failed(error: str) -> Result:
    """Return the result of a call that gave nothing."""
    return Result(None, _utf8(error[:MAX_ERROR_CHARACTERS]), None)


def _too_long(characters: int) -> str:
    return f"the detail has {characters:,} characters, expected at most {MAX_DETAIL_CHARACTERS:,}"


def _utf8(text: str) -> str:
    """Return the text without lone surrogates, which no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def of_frame(value: Any, num_rows: int) -> "pl.DataFrame":
    """Return reward, error, detail of what a frame function or an expression gave for so many rows.

    Raises:
        ValueError: when it is not a Series of numbers, or a DataFrame with ``reward``, with one row per completion.
    """
    import polars as pl

    frame = _columns(value)
    if len(frame) != num_rows:
        raise ValueError(f"the function returned {len(frame)} rewards for {num_rows} completions")
    if not frame["reward"].dtype.is_numeric() and frame["reward"].dtype not in (pl.Boolean, pl.Null):
        raise ValueError(f"the function returned rewards of type {frame['reward'].dtype}, expected numbers")
    reward = pl.col("reward").cast(pl.Float64)
    error = pl.col("error").cast(pl.String) if "error" in frame.columns else pl.lit(None, pl.String)
    detail = pl.lit(None, pl.String)
    if "detail" in frame.columns:
        detail = pl.col("detail")
        if isinstance(frame["detail"].dtype, pl.Struct):
            detail = detail.struct.json_encode()
        detail = detail.cast(pl.String)
    is_short = (detail.str.len_chars() <= MAX_DETAIL_CHARACTERS).fill_null(True)
    is_known = reward.is_finite().fill_null(False) & is_short
    reason = (
        pl.when(~is_short)
        .then(pl.lit(f"the detail has more than {MAX_DETAIL_CHARACTERS:,} characters"))
        .when(reward.is_null())
        .then(pl.lit("the function returned null"))
        .when(reward.is_nan())
        .then(pl.lit("the function returned nan"))
        .otherwise(pl.lit("the function returned ") + reward.cast(pl.String))
    )
    return frame.select(
        reward=pl.when(is_known).then(reward),
        error=pl.when(~is_known).then(pl.coalesce(error, reason).str.head(MAX_ERROR_CHARACTERS)).cast(pl.String),
        detail=pl.when(is_short).then(detail),
    )


def _columns(value: Any) -> "pl.DataFrame":
    import polars as pl

    if isinstance(value, pl.Series):
        if isinstance(value.dtype, pl.Struct):
            value = value.struct.unnest()
        else:
            return pl.DataFrame({"reward": value})
    if not isinstance(value, pl.DataFrame):
        raise ValueError(f"the function returned a {type(value).__name__}, expected a polars Series or DataFrame")
    if "reward" not in value.columns:
        raise ValueError(f"the function returned the columns {value.columns}, expected reward, error, detail")
    return value
