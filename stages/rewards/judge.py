"""A verdict on each completion from a language model behind any OpenAI-compatible endpoint; see docs/judge.md.

Every row becomes a request, equal requests become one, known answers come from the cache, the others from the server.
A row ends with a reward, or with null and the reason: nothing was ever guessed in a judge's stead. Given the cache, the
same rows give the same rewards and details, byte by byte, without any call.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import RewardError
from pipeline.files import sha256_text
from pipeline.manifest import canonical_json
from stages.rewards import judge_prompt, judge_verdict
from stages.rewards.judge_cache import Answer, JudgementCache, request_hash
from stages.rewards.judge_client import Endpoint, ask_all
from stages.rewards.judge_verdict import Rule, Scale

DETAIL_CHARACTERS = 4000
"""Of the judge's words in the detail; the cache has all of them."""
ERROR_CHARACTERS = 300
RESERVED = ("model", "messages", "stream", "n", "temperature", "max_tokens", "seed")


def judge(
    completions: pl.DataFrame,
    base_url: str,
    model: str,
    prompt_template: str = "",
    system: str = "",
    verdict: str = "",
    scale: Scale = (1, 10),
    criteria: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    ask_again: int = 0,
    concurrency: int = 32,
    requests_per_minute: float = 0.0,
    timeout: float = 120.0,
    max_retries: int = 5,
    api_key_env: str = "",
    cache: str = "judgements",
) -> pl.DataFrame:
    """Return reward, detail and error of each row, in order: the judge's verdict on the scale, mapped to the reward.

    What to ask: ``prompt_template`` is quality, grounded, rubric or a text of one's own (`judge_prompt`), ``system`` a
    system message ("" = none), ``extra`` further fields of the request, ``leave_out`` fields that the server refuses.
    ``max_tokens`` is sent unless ``extra`` has max_completion_tokens.

    How to read the answer: ``verdict`` and ``scale``, or ``criteria`` (name -> what it asks) and ``weights`` (1 where
    not given): see `judge_verdict`. Without a verdict it is asked ``ask_again`` more times, each with the next seed.

    Where and how fast: ``base_url`` ends in /v1 as a rule; ``requests_per_minute`` 0 = no limit; ``timeout`` in
    seconds; ``api_key_env`` names the environment variable with the key; ``cache`` is a directory, "" = keep nothing.

    ``detail``: the judge's answer (cut at 4,000 characters), the verdict as found (null = none), times asked.

    Raises:
        RewardError: when an argument cannot be used, or when no row could be judged for the same reason.
    """
    question = _question(
        model, prompt_template, system, verdict, scale, criteria, weights, temperature, max_tokens, seed, extra,
        leave_out, ask_again,
    )  # fmt: skip
    endpoint = Endpoint(base_url, concurrency, requests_per_minute, timeout, max_retries, api_key_env)
    endpoint.check()
    asked = [_messages(question, row) for row in completions.iter_rows(named=True)]
    results: list[_Result | None] = [_Result(error=a) if isinstance(a, str) else None for a in asked]
    kept = JudgementCache(Path(cache) if cache else None)
    for attempt in range(ask_again + 1):
        keys: dict[int, str] = {}
        bodies: dict[str, dict[str, Any]] = {}
        for i, messages in enumerate(asked):
            if (result := results[i]) is None or result.is_unparsed:
                body = {"model": model, "messages": messages, **_sampling(question, attempt)}
                keys[i] = request_hash(body)
                bodies[keys[i]] = body
        answers, errors = _answers(endpoint, kept, bodies)
        read = {key: _read(question, answer, attempt) for key, answer in answers.items()}
        for i, key in keys.items():
            results[i] = read[key] if key in read else _Result(error=errors[key])
    return pl.DataFrame(
        [(r.reward, r.detail, r.error) for r in results if r is not None],
        schema={"reward": pl.Float64, "detail": pl.String, "error": pl.String},
        orient="row",
    )


def judge_identity(
    base_url: str,
    model: str,
    prompt_template: str = "",
    system: str = "",
    verdict: str = "",
    scale: Scale = (1, 10),
    criteria: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    ask_again: int = 0,
    concurrency: int = 32,
    requests_per_minute: float = 0.0,
    timeout: float = 120.0,
    max_retries: int = 5,
    api_key_env: str = "",
    cache: str = "judgements",
) -> dict[str, Any]:
    """Return what decides the rewards: what is asked of whom, and how it is read; not where, how fast, by whose key.

    Raises:
        RewardError: when an argument cannot be used: here, before anything is generated.
    """
    Endpoint(base_url, concurrency, requests_per_minute, timeout, max_retries, api_key_env).check()
    question = _question(
        model, prompt_template, system, verdict, scale, criteria, weights, temperature, max_tokens, seed, extra,
        leave_out, ask_again,
    )  # fmt: skip
    rule = question.rule
    return {
        "model": model,
        "prompt": sha256_text(canonical_json([question.template, question.given, question.system])),
        "sampling": _sampling(question, 0),
        "verdict": rule.verdict,
        "scale": dict(rule.scale) if isinstance(rule.scale, Mapping) else [float(end) for end in rule.scale],
        "weights": None if rule.weights is None else dict(rule.weights),
        "ask_again": ask_again,
    }


@dataclass(frozen=True, slots=True)
class _Question:
    """All that decides a verdict, checked."""

    template: str
    given: dict[str, str]
    """Texts for the template that are the same for each row."""
    system: str
    rule: Rule
    sampling: dict[str, Any]
    leave_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Result:
    """What becomes of a row."""

    reward: float | None = None
    detail: str | None = None
    error: str | None = None
    is_unparsed: bool = False


def _question(
    model: str,
    prompt_template: str,
    system: str,
    verdict: str,
    scale: Scale,
    criteria: Mapping[str, str] | None,
    weights: Mapping[str, float] | None,
    temperature: float,
    max_tokens: int,
    seed: int,
    extra: Mapping[str, Any] | None,
    leave_out: Sequence[str],
    ask_again: int,
) -> _Question:
    rule = judge_verdict.make_rule(verdict, scale, criteria, weights)
    template = judge_prompt.choose_template(prompt_template, has_criteria=bool(criteria))
    reserved = sorted(set(extra or {}) & set(RESERVED))
    if reserved:
        raise RewardError(f"extra holds {reserved}: these have arguments of their own, or are not for a judge")
    if not model or max_tokens < 1 or temperature < 0 or ask_again < 0 or isinstance(leave_out, str):
        raise RewardError(
            f"model is {model!r}, max_tokens {max_tokens}, temperature {temperature}, ask_again {ask_again}, leave_out "
            f"{leave_out!r}: give a name, at least 1, at least 0, at least 0, and a list of names"
        )
    if ask_again and "seed" in leave_out:
        raise RewardError("ask_again asks with another seed, but leave_out has the seed: drop one of them")
    sampling = {"temperature": float(temperature), "max_tokens": max_tokens, "seed": seed, **(extra or {})}
    if "max_completion_tokens" in sampling:
        del sampling["max_tokens"]
    try:
        canonical_json(sampling)
    except (ValueError, TypeError) as error:
        raise RewardError(
            f"extra cannot be sent as JSON ({error}): give texts, finite numbers, lists, tables"
        ) from error
    given = {} if not criteria else _describe(criteria, scale)
    return _Question(template, given, system, rule, sampling, tuple(leave_out))


def _describe(criteria: Mapping[str, str], scale: Scale) -> dict[str, str]:
    """Return the texts for {criteria} and {verdicts}."""
    if isinstance(scale, Mapping):
        verdict = "one of " + ", ".join(f'"{word}"' for word in scale)
    else:
        verdict = f"a number from {scale[0]:g} (worst) to {scale[1]:g} (best)"
    return {
        "criteria": "\n".join(f"- {name}: {text}" for name, text in criteria.items()),
        "verdicts": "{" + ", ".join(f"{json.dumps(name, ensure_ascii=False)}: ..." for name in criteria) + "}, each "
        f"being {verdict}.",
    }


def _sampling(question: _Question, attempt: int) -> dict[str, Any]:
    """Return the fields of a request that are neither model nor messages; each attempt has a seed of its own."""
    fields = {**question.sampling, "seed": question.sampling["seed"] + attempt}
    return {name: value for name, value in fields.items() if name not in question.leave_out}


def _messages(question: _Question, row: Mapping[str, Any]) -> list[dict[str, str]] | str:
    """Return the conversation for a row, or the reason why there is none."""
    try:
        content = judge_prompt.fill(question.template, row, question.given)
        content.encode()  # metadata may hold half a surrogate pair, which cannot be sent
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]


def _read(question: _Question, answer: Answer, attempt: int) -> _Result:
    detail = {"answer": answer.text[:DETAIL_CHARACTERS], "verdict": None, "times_asked": attempt + 1}
    try:
        verdict = judge_verdict.read_verdict(question.rule, answer.text)
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
