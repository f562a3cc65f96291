"""Where prompts come from: a reasoning-gym task, a local file, or a Hugging Face dataset.

A source gives rows of one shape, `SourceRow`. Which rows are held out for evaluation is decided by a hash of the
question alone, so training, warm-up and evaluation agree on it without sharing any state.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.config import Place, StrictModel
from pipeline.errors import SourceError
from pipeline.files import identity, sha256_file
from pipeline.object_store import download_file, local_path
from stages.rewards.answers.reasoning_gym_tasks import import_reasoning_gym
from stages.tables import FILE_SUFFIXES, file_records

REASONING_GYM = "reasoning_gym:"
ATTEMPTS_PER_ROW = 50

Split = Literal["train", "held_out"]


class SourceConfig(StrictModel):
    """Where prompts come from."""

    source: Place
    """``reasoning_gym:<task>``, the path or URL of a .jsonl, .parquet or .csv file, or a Hugging Face dataset."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of a reasoning-gym task, for example min_digits."""
    revision: str | None = None
    """Commit of a Hugging Face dataset; required there, since the rows behind a name can change."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    question_column: str = "question"
    """Column with the question as text; a column ``messages`` with a list of {role, content} takes precedence."""
    answer_column: str | None = "answer"
    """Column with the reference answer; null = there is none."""
    system_prompt: str | None = None
    """System message of every conversation."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One question, with its conversation and reference answer."""

    messages: list[dict[str, str]]
    reference_answer: str | None
    task: str
    metadata: dict[str, Any]

    @property
    def prompt_id(self) -> str:
        return identity(self.task, json.dumps(self.messages, sort_keys=True), self.reference_answer)

    @property
    def question(self) -> str:
        return "\n".join(m["content"] for m in self.messages if m["role"] != "system")


def is_held_out(row: SourceRow, share: float) -> bool:
    """Return whether the question belongs to the held-out ``share`` of all questions; decided by its hash."""
    bucket = int.from_bytes(hashlib.sha256(row.question.encode()).digest()[:8], "big") / 2**64
    return bucket < share


def source_identity(config: SourceConfig) -> dict[str, str]:
    """Return what pins the rows beyond the config: the hash of a local file. Read-only."""
    path = _file(config)
    return {"source_sha256": sha256_file(path)} if path else {}


def draw(
    config: SourceConfig, *, split: Split, held_out_share: float, count_: int, seed: int, iteration: int
) -> list[SourceRow]:
    """Return the ``count_`` rows of one iteration of a split, a pure function of its arguments.

    A generated task gives new rows each iteration. Of a finite source equal rows count once; it is shuffled anew each
    epoch, and iteration ``i`` takes the rows ``i * count_ ... (i + 1) * count_`` of the endless sequence of epochs.

    Raises:
        SourceError: when the source does not exist, is empty, or holds too few rows of this split.
    """
    if config.source.startswith(REASONING_GYM):
        rows = _generated(config, seed=int(identity(seed, split, iteration)[:7], 16))
        chosen = _distinct((r for r in rows if is_held_out(r, held_out_share) == (split == "held_out")), count_)
        if len(chosen) < count_:
            raise SourceError(
                f"{config.source} with {config.options} gave only {len(chosen)} different {split} questions in "
                f"{count_ * ATTEMPTS_PER_ROW} tries, {count_} are wanted: ask for fewer, or make the task larger"
            )
        return chosen
    pool = list(
        {
            r.prompt_id: r for r in finite_rows(config) if is_held_out(r, held_out_share) == (split == "held_out")
        }.values()
    )
    if len(pool) < count_:
        raise SourceError(
            f"{config.source} has {len(pool)} different {split} rows, {count_} are wanted: give a larger source or ask "
            "for fewer (prompts.prompts_per_iteration, evaluate.num_prompts; evaluate.held_out_share divides the rows)"
        )
    wanted = range(iteration * count_, (iteration + 1) * count_)
    epochs = {epoch: _shuffled(pool, seed, epoch) for epoch in {i // len(pool) for i in wanted}}
    return [epochs[i // len(pool)][i % len(pool)] for i in wanted]


def _shuffled(pool: list[SourceRow], seed: int, epoch: int) -> list[SourceRow]:
    return sorted(pool, key=lambda row: identity(seed, epoch, row.prompt_id))


def _distinct(rows: Iterator[SourceRow], wanted: int) -> list[SourceRow]:
    found: dict[str, SourceRow] = {}
    for row in rows:
        found.setdefault(row.question, row)
        if len(found) == wanted:
            break
    return list(found.values())


def _generated(config: SourceConfig, seed: int) -> Iterator[SourceRow]:
    """Yield rows of a reasoning-gym task; its metadata keeps what its verifier needs."""
    reasoning_gym = import_reasoning_gym()
    task = config.source.removeprefix(REASONING_GYM)
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        raise SourceError(f"reasoning-gym has no task {task!r}: choose one of {', '.join(sorted(known))}")
    for start in count(step=1000):
        if start >= 100_000:
            return
        try:
            dataset = reasoning_gym.create_dataset(task, size=1000, seed=seed + start, **config.options)
        except (TypeError, ValueError, AssertionError) as error:
            raise SourceError(f"prompts.options do not fit the reasoning-gym task {task}: {error}") from error
        for entry in dataset:
            yield _row(
                config,
                entry,
                {"entry": {k: entry[k] for k in ("question", "answer", "metadata")}, "options": config.options},
            )


def finite_rows(config: SourceConfig) -> list[SourceRow]:
    """Return every row of a file or hub dataset in its order. Read-only."""
    path = _file(config)
    records = _hub_records(config) if path is None else file_records(path)
    if not records:
        raise SourceError(f"{config.source} is empty: expected at least one row with a column {config.question_column}")
    return [_row(config, record, record) for record in records]


def _file(config: SourceConfig) -> Path | None:
    """Return the path of a file, for a URL that of its working copy; None for other kinds.

    Raises:
        SourceError: when the source looks like a file, but there is none, or none of a known kind.
    """
    if config.source.startswith(REASONING_GYM):
        return None
    path = local_path(config.source) or download_file(config.source)
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise SourceError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FILE_SUFFIXES)}: convert it")
        return path
    if path.suffix in FILE_SUFFIXES or config.source.startswith((".", "/", "~")):
        raise SourceError(f"{path} does not exist: prompts.source names a file that is not there")
    return None


def _hub_records(config: SourceConfig) -> list[dict[str, Any]]:
    if config.revision is None:
        raise SourceError(
            f"prompts.source {config.source!r} is neither reasoning_gym:<task> nor an existing file, so it is taken "
            "for a Hugging Face dataset; those need prompts.revision (a commit), or the rows could change under the run"
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(config.source, config.subset, split=config.split, revision=config.revision)
    except Exception as error:  # the hub client raises many unrelated classes
        raise SourceError(
            f"the dataset {config.source!r} (revision {config.revision}) cannot be loaded: {error}; check its name and "
            "revision, or give a local file"
        ) from error
    return [dict(record) for record in loaded]


def _row(config: SourceConfig, record: Mapping[str, Any], metadata: dict[str, Any]) -> SourceRow:
    messages = record.get("messages")
    if messages is None:
        question = record.get(config.question_column)
        if question is None:
            raise SourceError(
                f"a row of {config.source} with the columns {sorted(record)} has neither messages nor a value in "
                f"{config.question_column}: set prompts.question_column, or fill in the row"
            )
        messages = [{"role": "user", "content": str(question)}]
    if not _are_messages(messages):
        raise SourceError(
            f"a row of {config.source} has the messages {str(messages)[:200]}: expected a list of objects with a role "
            "and a content, both text; convert the row"
        )
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    answer = record.get(config.answer_column) if config.answer_column else None
    return SourceRow(
        messages=[{"role": m["role"], "content": m["content"]} for m in messages],
        reference_answer=None if answer is None else str(answer),
        task=config.source,
        metadata=metadata,
    )


def _are_messages(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    turns = [message for message in messages if isinstance(message, dict)]
    texts = [turn.get(key) for turn in turns for key in ("role", "content")]
    return len(turns) == len(messages) and all(isinstance(text, str) for text in texts)


def first_row(config: SourceConfig) -> SourceRow:
    """Return one row, to fail early on a source that cannot be read. Read-only."""
    if config.source.startswith(REASONING_GYM):
        return next(_generated(config, seed=0))
    return finite_rows(config)[0]
