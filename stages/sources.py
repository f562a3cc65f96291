"""Where prompts come from: a reasoning-gym task, local files, or a Hugging Face dataset.

A source gives rows of one shape, `SourceRow`. Which rows are held out for evaluation is decided by a hash of the
question alone, so training, warm-up and evaluation agree on it without sharing any state.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from grpo.strict import TextOrNone
from pipeline.config import Place, StrictModel
from pipeline.errors import GrpoError, SourceError
from pipeline.files import identity, sha256_file, sha256_text
from pipeline.functions import ON_THE_HUB, check_permitted
from pipeline.object_store import download_file, local_path
from stages.rewards.answers.reasoning_gym_tasks import import_reasoning_gym
from stages.source_rows import ANSWER, QUESTION, SourceRow, is_held_out, read_row
from stages.tables import FILE_SUFFIXES, file_records

REASONING_GYM = "reasoning_gym:"
ATTEMPTS_PER_ROW = 50
SOURCES_KEPT = 2
"""Finite sources whose rows stay in memory: that of the training prompts and that of the evaluations."""

Split = Literal["train", "held_out"]


class SourceConfig(StrictModel):
    """Where prompts come from."""

    source: Place
    """``reasoning_gym:<task>``, the path or URL of a .jsonl, .parquet or .csv file, a folder of such files, or a
    Hugging Face dataset."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of a reasoning-gym task, for example min_digits."""
    revision: str | None = None
    """Commit of a Hugging Face dataset; required there, since the rows behind a name can change."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    question_column: str | None = Field(None, min_length=1)
    """Column with the question: text, or a conversation as a list of {role, content}; null = ``messages``, and
    ``question`` where a row has none."""
    answer_column: TextOrNone = ANSWER
    """Column with the reference answer; "none" = there is none."""
    system_prompt: str | None = None
    """System message of every conversation."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the policy's chat template, for example {enable_thinking = false}."""


def source_identity(config: SourceConfig) -> dict[str, str]:
    """Return what pins the rows beyond the config: the hash of local files. Read-only."""
    files = _files(config)
    if not files:
        return {}
    hashes = [sha256_file(path) for path in files]
    if len(files) == 1:
        return {"source_sha256": hashes[0]}
    return {"source_sha256": sha256_text("\n".join(f"{p.name} {h}" for p, h in zip(files, hashes, strict=True)))}


def draw(
    config: SourceConfig, *, split: Split, held_out_share: float, count_: int, seed: int, iteration: int
) -> list[SourceRow]:
    """Return the ``count_`` rows of one iteration of a split, a pure function of its arguments.

    A generated task gives new rows each iteration. Of a finite source equal rows count once; it is shuffled anew each
    epoch, and iteration ``i`` takes the rows ``i * count_ ... (i + 1) * count_`` of the endless sequence of epochs.
    Rows are equal when all that they hold is.

    Raises:
        SourceError: when the source does not exist, is empty, or holds too few rows of this split.
    """
    if config.source.startswith(REASONING_GYM):
        rows = generated_rows(config, seed=int(identity(seed, split, iteration)[:7], 16))
        chosen = _distinct(
            (r for r in rows if is_held_out(r.messages, held_out_share) == (split == "held_out")), count_
        )
        if len(chosen) < count_:
            raise SourceError(
                f"{config.source} with {config.options} gave only {len(chosen)} different {split} questions in "
                f"{count_ * ATTEMPTS_PER_ROW} tries, {count_} are wanted: ask for fewer, or make the task larger"
            )
        return chosen
    key = _key(config)
    pool = _pool(*key, split, held_out_share)
    if len(pool) < count_:
        raise SourceError(
            f"{config.source} has {len(pool)} different {split} rows, {count_} are wanted: give a larger source or ask "
            "for fewer (prompts.prompts_per_iteration, evaluate.num_prompts; evaluate.held_out_share divides the rows)"
        )
    wanted = range(iteration * count_, (iteration + 1) * count_)
    epochs = {e: _order(*key, split, held_out_share, seed, e) for e in {i // len(pool) for i in wanted}}
    return [pool[epochs[i // len(pool)][i % len(pool)]] for i in wanted]


def _key(config: SourceConfig) -> tuple[str, str]:
    """Return what decides the rows of a finite source: they are read once per process."""
    return config.model_dump_json(include=set(SourceConfig.model_fields)), json.dumps(source_identity(config))


@lru_cache(maxsize=SOURCES_KEPT)
def _rows(config: str, content: str) -> Sequence[SourceRow]:
    """Return the different rows of a finite source."""
    return list({row.prompt_id: row for row in _read(SourceConfig.model_validate_json(config))}.values())


@lru_cache(maxsize=2 * SOURCES_KEPT)
def _pool(config: str, content: str, split: Split, share: float) -> Sequence[SourceRow]:
    return [row for row in _rows(config, content) if is_held_out(row.messages, share) == (split == "held_out")]


@lru_cache(maxsize=2 * SOURCES_KEPT)
def _order(config: str, content: str, split: Split, share: float, seed: int, epoch: int) -> Sequence[int]:
    ids = [row.prompt_id for row in _pool(config, content, split, share)]
    return sorted(range(len(ids)), key=lambda index: identity(seed, epoch, ids[index]))


def _distinct(rows: Iterator[SourceRow], wanted: int) -> list[SourceRow]:
    found: dict[str, SourceRow] = {}
    for row in rows:
        found.setdefault(row.prompt_id, row)
        if len(found) == wanted:
            break
    return list(found.values())


def generated_rows(config: SourceConfig, seed: int) -> Iterator[SourceRow]:
    """Yield rows of a reasoning-gym task; the metadata keeps what its verifier needs.

    Raises:
        SourceError: when there is no such task, or it cannot be made with these options.
    """
    reasoning_gym = import_reasoning_gym()
    task = config.source.removeprefix(REASONING_GYM)
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        raise SourceError(f"reasoning-gym has no task {task!r}: choose one of {', '.join(sorted(known))}")
    for start in count(step=1000):
        if start >= 100_000:
            return
        try:
            for entry in reasoning_gym.create_dataset(task, size=1000, seed=seed + start, **config.options):
                # where the row stands among the thousand decides nothing, and would make equal rows differ
                facts = {k: v for k, v in entry["metadata"].items() if k != "source_index"}
                whole = {"question": entry["question"], "answer": entry["answer"], "metadata": facts}
                yield _row(config, entry, f"a row of {config.source}", {"entry": whole, "options": config.options})
        except GrpoError:
            raise
        except Exception as error:  # a task raises what it likes where an option does not fit
            raise SourceError(
                f"prompts.options do not fit the reasoning-gym task {task}: {type(error).__name__}: {error!s:.500}"
            ) from error


def finite_rows(config: SourceConfig) -> Sequence[SourceRow]:
    """Return the different rows of files or of a hub dataset, in their order. Read-only.

    Raises:
        SourceError: when there are none, a row cannot be used, or no row has a column that the config names.
    """
    return _rows(*_key(config))


def _read(config: SourceConfig) -> Iterator[SourceRow]:
    files = _files(config)
    records = _hub_records(config) if files is None else (item for path in files for item in file_records(path))
    named = (config.question_column, None if config.answer_column == ANSWER else config.answer_column)
    unseen = {name for name in named if name is not None}
    columns: set[str] = set()
    number = 0
    for number, (where, record) in enumerate(records, start=1):  # noqa: B007 (its last value is read below)
        columns.update(record)
        unseen = {name for name in unseen if record.get(name) is None}
        yield _row(config, record, where)
    if not number:
        raise SourceError(
            f"{config.source} is empty: expected at least one row with a column {config.question_column or QUESTION}"
        )
    if unseen:
        raise SourceError(
            f"no row of {config.source} has a value in the column {' or '.join(map(repr, sorted(unseen)))}, "
            f"which the config names: expected one of {sorted(columns)}; correct prompts.question_column or "
            "prompts.answer_column (none = there are no answers)"
        )


def _row(config: SourceConfig, record: Mapping[str, Any], where: str, metadata: Any = None) -> SourceRow:
    return read_row(
        record,
        where,
        task=config.source,
        question_column=config.question_column,
        answer_column=config.answer_column,
        system_prompt=config.system_prompt,
        metadata=metadata,
    )


def _files(config: SourceConfig) -> list[Path] | None:
    """Return the path of a file, for a URL that of its working copy, or those of a folder; None for other kinds.

    Raises:
        SourceError: when the source looks like a file, but there is none, or none of a known kind.
        UntrustedFunction: when only a recorded config names an address, or a dataset of the hub.
    """
    if config.source.startswith(REASONING_GYM):
        return None
    path = local_path(config.source) or download_file(config.source)
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise SourceError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FILE_SUFFIXES)}: convert it")
        return [path]
    if path.suffix in FILE_SUFFIXES or config.source.startswith((".", "/", "~")):
        raise SourceError(f"{path} does not exist: prompts.source names a file that is not there")
    check_permitted(config.source, ON_THE_HUB)
    return None


def _files_in(folder: Path) -> list[Path]:
    """Return the files of rows in a folder, by name."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix in FILE_SUFFIXES and p.is_file()]
    if len({p.suffix for p in found}) != 1:
        kinds = ", ".join(sorted({p.suffix for p in found})) or "none of them"
        raise SourceError(
            f"{folder} is a folder that holds {kinds}: expected files of one kind out of {', '.join(FILE_SUFFIXES)}; "
            "name one file (of a dataset that save_to_disk wrote, make one with to_parquet)"
        )
    return found


def _hub_records(config: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
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
    return ((f"row {number} of {config.source}", dict(record)) for number, record in enumerate(loaded, start=1))


def first_row(config: SourceConfig) -> SourceRow:
    """Return one row, to fail early on a source that cannot be read. Read-only."""
    if config.source.startswith(REASONING_GYM):
        return next(generated_rows(config, seed=0))
    return finite_rows(config)[0]
