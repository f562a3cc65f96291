"""A row of a source: what it may hold, and the question that it becomes.

Nothing is guessed at: a value that is neither text nor a number is no question and no answer, and what a chat template
would not be shown (tools, images) is refused rather than left out. docs/your_own_run.md says it to the user.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from pipeline.errors import SourceError
from pipeline.files import identity

MESSAGES, QUESTION, ANSWER = "messages", "question", "answer"
"""Columns that are read when the config names no others."""
ROLE = re.compile(r"[\w.-]+")
"""A role is one word: chat templates make control tokens of it."""
NOT_SHOWN = ("tools", "functions", "image", "images", "video", "videos", "audio", "audios")
"""Columns that belong to a conversation, and that no prompt of ours shows the model."""
NOT_SHOWN_OF_A_TURN = ("tool_calls", "function_call", *NOT_SHOWN)
WRITTEN_AS_TEXT = (Decimal, date, time, timedelta, UUID)
"""Types of Parquet columns whose text says all that they hold."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One question, with its conversation and reference answer."""

    messages: list[dict[str, str]]
    reference_answer: str | None
    task: str
    metadata: str
    """The source's row as a JSON object."""

    @property
    def prompt_id(self) -> str:
        """Identity of the row: all that decides its prompt and its rewards."""
        return identity(self.task, json.dumps(self.messages, sort_keys=True), self.reference_answer, self.metadata)

    @property
    def question(self) -> str:
        return question_of(self.messages)


def question_of(messages: list[dict[str, str]]) -> str:
    """Return what a conversation asks, without the system's words."""
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def is_held_out(messages: list[dict[str, str]], share: float) -> bool:
    """Return whether a conversation's question belongs to the held-out ``share`` of all questions.

    It is decided by the hash of the question alone: rows that ask the same are never split, whatever else they hold.
    """
    bucket = int.from_bytes(hashlib.sha256(question_of(messages).encode()).digest()[:8], "big") / 2**64
    return bucket < share


def read_row(
    record: Mapping[str, Any],
    where: str,
    *,
    task: str,
    question_column: str | None = None,
    answer_column: str | None = ANSWER,
    system_prompt: str | None = None,
    metadata: Any = None,
) -> SourceRow:
    """Return the question of a source's row; ``where`` names the row in errors, ``metadata`` replaces the row's own.

    The other arguments are those of a SourceConfig.

    Raises:
        SourceError: when the row has no question, or holds what cannot be asked or stored.
    """
    for column in NOT_SHOWN:
        if not _is_empty(record.get(column)):
            raise SourceError(
                f"{where} has a value in the column {column}, which no prompt shows the model: expected questions in "
                "text alone; remove or rename the column if the question stands without it"
            )
    messages = _messages(question_column, record, where)
    if messages[-1]["role"] == "assistant":
        raise SourceError(
            f"{where} has a conversation that ends with the assistant's turn: expected one that asks, since the model "
            "would be shown the answer; remove that turn, or name the column of the question (prompts.question_column)"
        )
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return SourceRow(
        messages,
        as_text(record.get(answer_column), where, answer_column) if answer_column else None,
        task,
        as_json(record if metadata is None else metadata, where),
    )


def as_text(value: Any, where: str, column: str) -> str | None:
    """Return a value of a source as text; None for null and NaN, which tables use for what is missing.

    Raises:
        SourceError: when it is neither text nor a finite number: Python's notation of a list is nobody's answer.
    """
    if is_missing(value):
        return None
    is_scalar = isinstance(value, (str, int, float, *WRITTEN_AS_TEXT)) and not isinstance(value, bool)
    if not is_scalar or (isinstance(value, float) and math.isinf(value)):
        raise SourceError(
            f"{where} has {_shown(value)} in the column {column}: expected text or a number; write what is meant as "
            "text, or name another column (prompts.question_column, prompts.answer_column)"
        )
    return str(value)


def as_json(value: Any, where: str) -> str:
    """Return a row as JSON text, its keys sorted; NaN becomes null.

    Raises:
        SourceError: when it holds what JSON cannot: bytes, objects, infinity.
    """
    return json.dumps(_plain(value, where, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _messages(named: str | None, record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    column = named or (QUESTION if record.get(MESSAGES) is None else MESSAGES)
    value = record.get(column)
    if column == MESSAGES or isinstance(value, list):
        return read_turns(value, where, column)
    question = as_text(value, where, column)
    if question is None:
        wanted = named or f"{MESSAGES} or {QUESTION}"
        raise SourceError(
            f"{where} with the columns {sorted(record)} has no value in {wanted}: set prompts.question_column, or fill "
            "in the row"
        )
    return [{"role": "user", "content": question}]


def read_turns(value: Any, where: str, column: str) -> list[dict[str, str]]:
    """Return the turns of a conversation.

    Raises:
        SourceError: when it is no list of texts with roles, or holds what a prompt would leave out.
    """
    turns = value if isinstance(value, list) else []
    are_texts = all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    )
    if not turns or not are_texts:
        raise SourceError(
            f"{where} has {_shown(value)} in the column {column}: expected a list of objects with a role and a "
            "content, both text; convert the row"
        )
    for turn in turns:
        if not ROLE.fullmatch(turn["role"]):
            raise SourceError(f"{where} has a turn of the role {turn['role']!r:.80}: expected one word; correct it")
        lost = [key for key in NOT_SHOWN_OF_A_TURN if not _is_empty(turn.get(key))]
        if lost:
            raise SourceError(
                f"{where} has a turn with {lost[0]}, which no prompt shows the model: expected turns in text alone; "
                "write it into the content, or remove the row"
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _plain(value: Any, where: str, column: str) -> Any:
    """Return the value in the types of JSON."""
    if is_missing(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, column or str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, column) for item in value]
    if isinstance(value, WRITTEN_AS_TEXT):
        return str(value)
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise SourceError(
        f"{where} has {_shown(value)} in the column {column}, which JSON cannot hold: expected text, numbers, lists "
        "and tables of them; convert or remove the column"
    )


def is_missing(value: Any) -> bool:
    """Return whether a value of a table stands for none: null, or NaN."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _is_empty(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, list | dict | str) and not value)


def _shown(value: Any) -> str:
    """Return what stands in an error: bytes and objects by their type alone."""
    kind = type(value).__name__
    return f"{value!r:.200}" if isinstance(value, bool | int | float | str | list | dict) else f"a value of type {kind}"
