"""Rewards for the form and the length of the answer."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import polars as pl

from pipeline.errors import RewardError
from pipeline.functions import import_function
from stages.rewards.answers.answer_part import NOTHING_WITHIN, SECONDS_PER_SEARCH, answer_part, compiled, shown
from stages.rewards.base import Score, deciding_arguments
from stages.rewards.functions import RewardConfig, find_reward

FENCE = "```"


def regex_match(completion: str, pattern: str, whole: bool = False) -> Score:
    """Return 1 when the regular expression occurs in the answer, else 0; the detail has its match and named groups.

    Args:
        completion: the answer.
        pattern: in the syntax of the package ``regex``; a dot also matches a line break.
        whole: whether the answer, outer white space aside, must match from its first character to its last.
    """
    search = compiled(pattern)
    text = completion.strip() if whole else completion
    match = (search.fullmatch if whole else search.search)(text, timeout=SECONDS_PER_SEARCH)
    if match is None:
        return Score(0.0, {"match": None})
    groups = {name: None if text is None else shown(text) for name, text in match.groupdict().items()}
    return Score(1.0, {"match": shown(match.group()), **({"groups": groups} if groups else {})})


def tags_in_order(
    completion: str,
    tags: Sequence[str] = ("think", "answer"),
    is_first_open: bool = False,
    allow_text_outside: bool = False,
    allow_empty: bool = False,
    partial: bool = False,
) -> Score:
    """Return 1 when the answer is <think>...</think><answer>...</answer>: each tag once, in this order, none inside.

    Args:
        completion: the answer.
        tags: the tags in their order.
        is_first_open: whether the prompt ends with the first opening tag, so that the answer begins inside it.
        allow_text_outside: whether more than white space may stand before, between and after the tags.
        allow_empty: whether a tag may hold nothing but white space.
        partial: give the share of tags that are right up to the first mistake, instead of 0.
    """
    text = f"<{tags[0]}>{completion}" if is_first_open and tags else completion
    lengths: dict[str, int] = {}
    problem, position = None, 0
    for tag in tags:
        problem, content, end = _read_tag(text, tag, position, allow_text_outside)
        if not problem and not allow_empty and not content.strip():
            problem = f"nothing in <{tag}>"
        if not problem and (other := next((t for t in tags if f"<{t}>" in content or f"</{t}>" in content), None)):
            problem = f"<{other}> inside <{tag}>"
        if problem:
            break
        lengths[tag], position = len(content), end
    if not problem and not allow_text_outside and text[position:].strip():
        problem = f"text after </{tags[-1]}>" if tags else "text outside the tags"
    share = len(lengths) / len(tags) if partial and tags else 0.0
    detail = {"problem": problem, "characters": lengths}
    # with every tag in place, the text behind the last one is the mistake of the last one
    return Score(1.0, detail) if not problem else Score(min(share, 1 - 1 / max(len(tags), 1)), detail)


def _read_tag(text: str, tag: str, position: int, allow_text_outside: bool) -> tuple[str | None, str, int]:
    """Return what is wrong with the tag, its content, and where it ends."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    for mark in (opening, closing):
        if text.count(mark) != 1:
            return (f"no {mark}" if mark not in text else f"{text.count(mark)} times {mark}"), "", 0
    start, end = text.index(opening), text.index(closing)
    if start < position or end < start:
        return f"{opening if start < position else closing} too early", "", 0
    if not allow_text_outside and text[position:start].strip():
        return f"text before {opening}", "", 0
    return None, text[start + len(opening) : end], end + len(closing)


def valid_json(
    completion: str, schema: Mapping[str, Any] | None = None, within: str | None = None, allow_fence: bool = True
) -> Score:
    """Return 1 when the answer is JSON (RFC 8259: no NaN, no comments) that obeys the JSON schema, else 0.

    Args:
        completion: the answer.
        schema: a JSON schema, from the arguments or the metadata; null = any JSON.
        within: which part of the answer counts.
        allow_fence: whether the JSON may stand in a Markdown code fence.
    """
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"problem": NOTHING_WITHIN})
    try:
        value = json.loads(_without_fence(part) if allow_fence else part, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return Score(0.0, {"problem": f"no JSON: {error}"})
    if schema is None:
        return Score(1.0, {"problem": None})
    problem = next(iter(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value)), None)
    if problem is None:
        return Score(1.0, {"problem": None})
    return Score(0.0, {"problem": shown(problem.message), "at": problem.json_path})


def _without_fence(text: str) -> str:
    """Return what a code fence around all of the text holds; the text itself where there is none."""
    fenced = text.strip()
    language, line_end, content = fenced.removeprefix(FENCE).partition("\n")
    is_fenced = fenced.startswith(FENCE) and content.endswith(FENCE) and "`" not in language and line_end
    return content.removesuffix(FENCE) if is_fenced else text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    content = json.loads(schema)
    validator = validator_for(content)
    try:
        validator.check_schema(content)
    except SchemaError as error:
        raise RewardError(f"schema is not a JSON schema ({error.message}): correct it") from error
    return validator(content, registry=Registry())  # the default one fetches a $ref's URL


def soft_overlong(max_tokens: int, buffer_tokens: int) -> pl.Expr:
    """Return 0 up to max_tokens - buffer_tokens tokens, from there on linearly down to -1 at max_tokens and beyond.

    DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), to be added to another reward; there 20480 and
    4096. An answer cut at ``generate.max_tokens = max_tokens`` gets -1.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise RewardError(
            f"soft_overlong has buffer_tokens = {buffer_tokens} and max_tokens = {max_tokens}, expected "
            "0 < buffer_tokens <= max_tokens: correct the reward's arguments"
        )
    num_tokens = pl.col("num_tokens").cast(pl.Float64)
    reward = ((max_tokens - buffer_tokens - num_tokens) / buffer_tokens).clip(-1.0, 0.0)
    return pl.struct(
        reward=reward,
        detail=pl.struct("num_tokens", "finish_reason"),
        error=pl.when(reward.is_null()).then(pl.lit("num_tokens is null: the answer's length is unknown")),
    )


def cosine_length(
    completion: str,
    num_tokens: int | None,
    max_tokens: int,
    verifier: str,
    prompt: str | None = None,
    reference: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    task: str | None = None,
    finish_reason: str | None = None,
    verifier_arguments: Mapping[str, Any] | None = None,
    correct_from: float = 1.0,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> Score:
    """Return a reward that falls with the length of a right answer and rises with that of a wrong one, by a cosine.

    From Demystifying Long Chain-of-Thought Reasoning (arXiv:2502.03373), with its values as defaults. For n tokens of
    at most T: long + (short - long) (1 + cos(pi n / T)) / 2 with the values for right or wrong; ``exceeded`` from T on.
    Null when the verifier is null or the length unknown.

    Args:
        completion: the answer.
        num_tokens: its length.
        max_tokens: T.
        verifier: a reward function ``module:function`` over one completion that says whether the answer is right.
        prompt: passed to the verifier, like the other facts.
        reference: passed to the verifier.
        messages: passed to the verifier.
        metadata: passed to the verifier, its keys too.
        task: passed to the verifier.
        finish_reason: passed to the verifier.
        verifier_arguments: the verifier's arguments.
        correct_from: the verifier's reward from which the answer is right.
        correct_short: for a right answer of no length.
        correct_long: for a right answer of nearly T tokens.
        wrong_short: for a wrong answer of no length.
        wrong_long: for a wrong answer of nearly T tokens.
        exceeded: for T tokens or more, right or wrong.
    """
    if num_tokens is None:
        return Score(None, {"reason": "num_tokens is null: the answer's length is unknown"})
    known = {
        **(metadata or {}),
        "completion": completion,
        "prompt": prompt,
        "reference": reference,
        "messages": messages,
        "metadata": metadata,
        "task": task,
        "num_tokens": num_tokens,
        "finish_reason": finish_reason,
    }
    known |= verifier_arguments or {}
    function, parameters = _verifier(verifier)
    result = function(**{name: known[name] for name in parameters if name in known})
    verdict = result if isinstance(result, Score) else Score(result)
    detail = {"verdict": verdict.reward, "verdict_detail": verdict.detail, "num_tokens": num_tokens}
    if verdict.reward is None:
        return Score(None, detail | {"reason": "the verifier cannot say"})
    if num_tokens >= max_tokens:
        return Score(exceeded, detail)
    is_correct = verdict.reward >= correct_from
    short, long = (correct_short, correct_long) if is_correct else (wrong_short, wrong_long)
    return Score(long + (short - long) * (1 + math.cos(math.pi * num_tokens / max_tokens)) / 2, detail)


def cosine_length_identity(**arguments: Any) -> dict[str, Any]:
    """Return the values, and the recipe of the verifier."""
    decides = deciding_arguments(cosine_length, arguments)
    own_arguments = dict(decides.pop("verifier_arguments") or {})
    verifier = RewardConfig(name="verifier", function=decides["verifier"], arguments=own_arguments)
    return {**decides, "verifier": find_reward(verifier).recipe}


@lru_cache(maxsize=16)
def _verifier(name: str) -> tuple[Any, tuple[str, ...]]:
    try:
        function, _ = import_function(name)
    except ImportError as error:
        raise RewardError(f"the verifier {name!r} cannot be imported ({error}): give module:function") from error
    return function, tuple(signature(function).parameters)
