"""What a reward function is. Every module of this folder holds some; users write theirs in modules of their own.

A reward is a plain function ``module:function`` in one of three shapes, told apart by its signature:

1. **Over one completion**, sync or async; called in a worker process, once per completion:

       def cites_the_city(completion: str, city: str, bonus: float = 0.0) -> float | Score | None: ...

2. **Over a frame**: it has a parameter named ``completions``; called in a worker process of its own with up to 50,000
   rows at a time, always the same rows in the same order:

       def shortness(completions: pl.DataFrame, most: int) -> pl.Series: ...

3. **A polars expression**: its return annotation is ``pl.Expr``; called once, evaluated in this process as the rows
   stream by, the fastest of the three:

       def has_answer_tag() -> pl.Expr:
           return pl.col("completion").str.contains("<answer>").cast(pl.Float64)

All know the same facts, as parameters (1) or columns (2, 3), see `FACTS`. Shape 1 may also name any key of the source
row's metadata, but for the names in the function's attribute ``only_from_config``; shapes 2 and 3 find them as JSON in
the column ``metadata``. Every other parameter is filled from ``arguments`` in the config.

Shape 1 returns a number, `Score`, or None (it cannot say). Shapes 2 and 3 give a Series (an expression) of numbers, or
a DataFrame (struct) with ``reward`` and, if wanted, ``detail`` (JSON text, or a struct) and ``error`` (text of a row
whose reward is null). Null, NaN, infinity, an exception, a wrong type or length, a crash, too much time or memory: each
gives a null reward with its error, never a 0.

A function whose result depends on more than its source and arguments (a file, a model) has beside it, in the same
module, a function ``<name>_identity`` that takes the same arguments and returns what decides the result, as JSON-like
values: digests of the files, the hash of a judge's prompt. What it returns takes the arguments' place in the reward's
identity, so that arguments that decide nothing (where a file lies, how many requests at once) can be left out.
`deciding_arguments` spares it to repeat the signature.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import Signature, signature
from typing import Any

from pipeline.errors import RewardError

FACTS = {
    "completion": "the answer as text",
    "prompt": "the last user message",
    "reference": "the reference answer, or null",
    "messages": "the whole conversation: a list of role and content",
    "metadata": "the whole source row, answer included; for shapes 2 and 3 as JSON text",
    "task": "the source of the prompt",
    "completion_id": "identity of the answer",
    "group_id": "identity of its group",
    "prompt_id": "identity of the question",
    "num_tokens": "tokens of the answer, its end-of-sequence token included; null where they are not known",
    "finish_reason": "stop, length (cut at max_tokens) or abort",
    "policy_name": "name of the policy that wrote it",
}
"""What a reward function may ask for, by name."""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward with what the function saw, for the auditor."""

    reward: float | None
    """Null = cannot say."""
    detail: Any = None
    """JSON-like: the extracted answer, the facts found, the judge's words."""


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Check an argument of a reward.

    Raises:
        RewardError: when it lies outside the range.
    """
    if not least <= value <= most:
        expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise RewardError(f"{name} is {value}; expected {expected}: correct it in the reward's arguments")


def deciding_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], without: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments that decide a reward, by name, with the defaults of those that are not given.

    These are the function's parameters but for the facts and ``without``: what decides nothing, and what the metadata
    fills.

    Raises:
        TypeError: when one without default is not given, or the function has no parameter of a given name.
    """
    no_arguments = {*FACTS, "completions", *without}
    parameters = [p for name, p in signature(function).parameters.items() if name not in no_arguments]
    bound = Signature(parameters).bind(**{name: value for name, value in given.items() if name not in without})
    bound.apply_defaults()
    return bound.arguments


def name_arguments(function: Callable[..., Any], config: Callable[..., Any]) -> None:
    """Let the signature of a function over a frame with ``**arguments`` name the fields of the config it reads."""
    own = [p for p in signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = Signature([*own, *signature(config).parameters.values()])  # type: ignore[attr-defined]
