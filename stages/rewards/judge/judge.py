"""A verdict on each completion from a language model behind any OpenAI-compatible endpoint; see docs/judge.md.

Every row becomes a request, equal requests become one, known answers come from the cache, the others from the server.
A row ends with a reward, or with null and the reason: nothing was ever guessed in a judge's stead. Given the cache, the
same rows give the same rewards and details, byte by byte, without any call.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.config import validate
from pipeline.files import sha256_text, user_path
from pipeline.manifest import canonical_json
from stages.rewards.base import name_arguments
from stages.rewards.judge.cache import Answer, JudgementCache, request_hash
from stages.rewards.judge.client import ask_all
from stages.rewards.judge.config import Endpoint, JudgeConfig
from stages.rewards.judge.prompt import criteria_texts, fill
from stages.rewards.judge.verdict import Rule, read_verdict

DETAIL_CHARACTERS = 4000
"""Of the judge's words in the detail; the cache has all of them."""
ERROR_CHARACTERS = 300
ARGUMENTS = "the arguments of the judge"


def judge(completions: pl.DataFrame, **arguments: Any) -> pl.DataFrame:
    """Return reward, detail and error of each row, in order: the judge's verdict on the scale, mapped to the reward.

    The arguments are the fields of `JudgeConfig`. ``detail`` has the judge's answer (cut at 4,000 characters), the
    verdict as found (null = none), and times asked.

    Raises:
        ConfigError: when an argument cannot be used.
        RewardError: when no row could be judged for the same reason.
    """
    config = validate(JudgeConfig, arguments, ARGUMENTS)
    template, given, rule = config.template(), criteria_texts(config.criteria, config.scale), config.rule()
    asked = [_messages(config.system, template, row, given) for row in completions.iter_rows(named=True)]
    results: list[_Result | None] = [_Result(error=a) if isinstance(a, str) else None for a in asked]
    kept = JudgementCache(user_path(config.cache) if config.cache else None)
    for attempt in range(config.ask_again + 1):
        keys: dict[int, str] = {}
        bodies: dict[str, dict[str, Any]] = {}
        for i, messages in enumerate(asked):
            if (result := results[i]) is None or result.is_unparsed:
                body = {"model": config.model, "messages": messages, **config.sampling(attempt)}
                keys[i] = request_hash(body)
                bodies[keys[i]] = body
        answers, errors = _answers(config, kept, bodies)
        read = {key: _read(rule, answer, attempt) for key, answer in answers.items()}
        for i, key in keys.items():
            results[i] = read[key] if key in read else _Result(error=errors[key])
    return pl.DataFrame(
        [(r.reward, r.detail, r.error) for r in results if r is not None],
        schema={"reward": pl.Float64, "detail": pl.String, "error": pl.String},
        orient="row",
    )


def judge_identity(**arguments: Any) -> dict[str, Any]:
    """Return what decides the rewards: what is asked of whom, and how it is read; not where, how fast, by whose key.

    Raises:
        ConfigError: when an argument cannot be used: here, before anything is generated.
    """
    config = validate(JudgeConfig, arguments, ARGUMENTS)
    rule, given = config.rule(), criteria_texts(config.criteria, config.scale)
    return {
        "model": config.model,
        "prompt": sha256_text(canonical_json([config.template(), given, config.system])),
        "sampling": config.sampling(0),
        "verdict": rule.verdict,
        "scale": rule.scale,
        "weights": rule.weights,
        "ask_again": config.ask_again,
    }


name_arguments(judge, JudgeConfig)


@dataclass(frozen=True, slots=True)
class _Result:
    """What becomes of a row."""

    reward: float | None = None
    detail: str | None = None
    error: str | None = None
    is_unparsed: bool = False


def _messages(
    system: str, template: str, row: Mapping[str, Any], given: Mapping[str, str]
) -> list[dict[str, str]] | str:
    """Return the conversation for a row, or the reason why there is none."""
    try:
        content = fill(template, row, given)
        content.encode()  # metadata may hold half a surrogate pair, which cannot be sent
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": content}]


def _read(rule: Rule, answer: Answer, attempt: int) -> _Result:
    detail = {"answer": answer.text[:DETAIL_CHARACTERS], "verdict": None, "times_asked": attempt + 1}
    try:
        verdict = read_verdict(rule, answer.text)
    except ValueError as error:
        cut = "; it was cut at max_tokens, raise it" if answer.finish_reason == "length" else ""
        words = answer.text if len(answer.text) <= ERROR_CHARACTERS else f"... {answer.text[-ERROR_CHARACTERS:]}"
        message = f"the judge gave no verdict: {error}; its words: {words!r}{cut}"
        return _Result(detail=canonical_json(detail), error=message, is_unparsed=True)
    return _Result(verdict.reward, canonical_json({**detail, "verdict": verdict.found}))


def _answers(
    endpoint: Endpoint, kept: JudgementCache, bodies: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Return an answer or an error for each request, from the cache where it has one."""
    answers = kept.find(bodies)
    missing = {key: body for key, body in bodies.items() if key not in answers}
    errors: dict[str, str] = {}

    def keep(key: str, answer: Answer) -> None:
        answers[key] = answer
        kept.keep(bodies[key], answer)

    async def ask() -> None:
        async with asyncio.TaskGroup() as group:
            saver = group.create_task(kept.keep_saving())
            errors.update(await ask_all(endpoint, missing, keep))
            saver.cancel()

    if missing:
        try:
            asyncio.run(ask())
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            kept.save()
    return answers, errors


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
