"""import: questions and completions written elsewhere -> the prompts and completions of a new run.

It takes texts that no policy of this program sampled: texts by people, another system's logs, a worked example. They
can be scored, normalized and inspected like any other completions. They cannot train: their sampling probabilities are
unknown, so every token is masked out of the loss, and `batch` drops the rows.

Columns of a completion that was not sampled:

    prompt_token_ids, completion_token_ids   with a tokenizer: its tokens, without end-of-sequence token; else empty
    sampling_logprobs                        a null for each token: unknown
    loss_mask                                false for each token: none trains
    policy_name, policy_digest               the file's policy_name, or `written`; `none`
    finish_reason                            stop: the text is whole
    engine, engine_version                   `import` and the version of this stage
    seed, temperature, top_p, top_k, min_p   0, 1, 1, 0, 0, the settings that change nothing; logprobs_mode is `none`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.errors import PolicyError, SourceError, UsageError
from pipeline.files import identity, sha256_file
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.stage import Progress, Stage, StageCall, StageResult, StageTask, run_stage, silent
from stages.batch import IMPORTED, NO_POLICY
from stages.checkpoints import TOKENIZER_FILES, load_tokenizer
from stages.encoding import encode_conversations, encode_texts
from stages.source_rows import SourceRow, as_text
from stages.sources import REASONING_GYM, SourceConfig, finite_rows, source_identity
from stages.tables import FILE_SUFFIXES, file_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENGINE = IMPORTED
WRITTEN = "written"
"""Name of the author where the file names none."""
EXAMPLES = 3
"""Wrong rows that an error message shows."""


@dataclass(frozen=True, slots=True)
class Written:
    """One completion of the file, matched with its prompt."""

    prompt_id: str
    group: str
    """Tells several groups of one prompt apart."""
    policy_name: str
    completion: str


@dataclass(frozen=True, slots=True)
class Material:
    """Input of the stage, read and checked before anything is written."""

    questions: Sequence[SourceRow]
    written: Sequence[Written]
    tokenizer: "PreTrainedTokenizerBase | None"
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Given to the tokenizer's chat template."""


def import_completions(
    questions: SourceConfig,
    completions: Path,
    run: RunDir,
    *,
    tokenizer: Path | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Return the prompts and completions of iteration 0 of a new run, made from two files; the same files are reused.

    ``completions`` is a .jsonl, .csv or .parquet file. Each row has ``completion`` and either ``question``, the exact
    text of a question of the source, or ``prompt_id``; it may have ``policy_name``, and ``group``, to split the
    completions of one prompt into several groups. Other columns are left out. ``tokenizer`` is the directory of a
    tokenizer or checkpoint; without one there are no token ids. The caller holds the run's lock.

    Raises:
        SourceError: when a file cannot be read, or a row does not name one question of the source.
        PolicyError: when the directory holds no tokenizer.
        UsageError: when the run was not made by an import.
        RecipeMismatch: when other files have been imported into this run.
    """
    place = {name: run.place(0, name) for name in ("prompts", "completions")}
    foreign = [] if is_finished(place["completions"]) else [a for a in run.artifacts() if a.manifest.stage != ENGINE]
    if foreign:
        raise UsageError(
            f"{run.root} holds {foreign[0].path.relative_to(run.root)} of a training run, expected a new directory: "
            "import into another one"
        )
    rows = read_questions(questions)
    written = read_completions(completions, rows)
    parameters = {
        **source_identity(questions),
        "completions_format": completions.suffix,
        "completions_sha256": sha256_file(completions),
        "tokenizer_sha256": _tokenizer_files(tokenizer) if tokenizer else None,
    }
    material = Material(rows, written, load_tokenizer(tokenizer) if tokenizer else None, questions.chat_template_kwargs)
    config = SourceConfig(**questions.model_dump(include=set(SourceConfig.model_fields)))
    return run_stage(StageCall(STAGE, config, {}, place, parameters), material, progress)


def read_questions(config: SourceConfig) -> list[SourceRow]:
    """Return the distinct questions of a finite source, in its order. Read-only.

    Raises:
        SourceError: when the source cannot be read, or has no end.
    """
    if config.source.startswith(REASONING_GYM):
        raise SourceError(
            f"{config.source} makes questions without end, expected a file or a dataset: name the one whose questions "
            "the completions answer"
        )
    return list(finite_rows(config))


def read_completions(path: Path, questions: Sequence[SourceRow]) -> list[Written]:
    """Return the rows of a file of written completions, each matched with its question. Read-only.

    Raises:
        SourceError: when the file cannot be read, or rows are not as expected.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise SourceError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FILE_SUFFIXES)}: convert it")
    records = list(file_records(path))
    if not records:
        raise SourceError(f"{path} is empty: expected rows with a completion and its question or prompt_id")
    ids = {row.prompt_id for row in questions}
    by_text: dict[str, list[str]] = {}
    for row in questions:
        by_text.setdefault(row.question.strip(), []).append(row.prompt_id)
    found = [_match(record, where, ids, by_text) for where, record in records]
    wrong = [f"row {i} {problem}" for i, problem in enumerate(found, start=1) if isinstance(problem, str)]
    if wrong:
        more = f" (and {len(wrong) - EXAMPLES} more)" if len(wrong) > EXAMPLES else ""
        raise SourceError(
            f"{path}: {'; '.join(wrong[:EXAMPLES])}{more}; expected a text in `completion`, and in `question` or "
            f"`prompt_id` one of the {len(questions)} questions of the source: correct the rows"
        )
    return [row for row in found if isinstance(row, Written)]


def _match(record: dict[str, Any], where: str, ids: set[str], by_text: dict[str, list[str]]) -> Written | str:
    """Return the row, or what is wrong with it."""
    completion = record.get("completion")
    columns = ("prompt_id", "question", "group", "policy_name")
    prompt_id, question, group, author = (as_text(record.get(column), where, column) for column in columns)
    if not isinstance(completion, str):
        return f"has the completion {completion!r:.80}"
    if prompt_id is None and question is None:
        return f"has neither question nor prompt_id, only {sorted(record)}"
    if prompt_id is None:
        named = by_text.get((question or "").strip(), [])
        if len(named) > 1:
            return f"has the question {question!r:.80}, which {len(named)} rows of the source share (give prompt_id)"
        if not named:
            return f"has the unknown question {question!r:.80}"
        prompt_id = named[0]
    elif prompt_id not in ids:
        return f"has the unknown prompt_id {prompt_id!r:.80}"
    return Written(prompt_id, group or "", author or WRITTEN, completion)


def imported_prompts(material: Material) -> pl.DataFrame:
    """Return one prompts row per question; one without completions has the drop_reason ``unanswered``."""
    answered = {row.prompt_id for row in material.written}
    token_ids: list[list[int]] = [[] for _ in material.questions]
    if material.tokenizer:
        conversations = [row.messages for row in material.questions]
        token_ids = encode_conversations(conversations, material.tokenizer, material.variables)
    rows = [
        {
            "prompt_id": row.prompt_id,
            "messages": row.messages,
            "prompt_token_ids": ids,
            "reference_answer": row.reference_answer,
            "task": row.task,
            "metadata": row.metadata,
            "drop_reason": None if row.prompt_id in answered else "unanswered",
        }
        for row, ids in zip(material.questions, token_ids, strict=True)
    ]
    overrides: dict[str, pl.DataType] = {
        "prompt_token_ids": pl.List(pl.Int32),
        "reference_answer": pl.String(),
        "drop_reason": pl.String(),
    }
    return pl.DataFrame(rows, schema_overrides=overrides, infer_schema_length=None)


def imported_completions(material: Material, prompts: pl.DataFrame, recipe: str) -> pl.DataFrame:
    """Return one completions row per written completion: groups by first appearance, rows in the file's order."""
    groups: dict[tuple[str, str], list[Written]] = {}
    for row in material.written:
        groups.setdefault((row.prompt_id, row.group), []).append(row)
    prompt_token_ids = dict(prompts.select("prompt_id", "prompt_token_ids").iter_rows())
    rows = []
    for (prompt_id, group), members in groups.items():
        group_id = identity(recipe, prompt_id, group)
        for index, member in enumerate(members):
            token_ids = _token_ids(member.completion, material.tokenizer)
            rows.append(
                {
                    "completion_id": f"{group_id}-{index:03d}",
                    "group_id": group_id,
                    "prompt_id": prompt_id,
                    "completion_index": index,
                    "policy_name": member.policy_name,
                    "prompt_token_ids": prompt_token_ids[prompt_id],
                    "completion_token_ids": token_ids,
                    "sampling_logprobs": [None] * len(token_ids),
                    "loss_mask": [False] * len(token_ids),
                    "completion": member.completion,
                }
            )
    lists: dict[str, pl.DataType] = {
        "prompt_token_ids": pl.List(pl.Int32),
        "completion_token_ids": pl.List(pl.Int32),
        "sampling_logprobs": pl.List(pl.Float32),
        "loss_mask": pl.List(pl.Boolean),
    }
    return pl.DataFrame(rows, schema_overrides=lists).with_columns(
        pl.col("completion_index").cast(pl.Int32),
        policy_digest=pl.lit(NO_POLICY),
        policy_iteration=pl.lit(None, pl.Int32),
        finish_reason=pl.lit("stop"),
        stop_reason=pl.lit(None, pl.String),
        seed=pl.lit(0, pl.Int64),
        temperature=pl.lit(1.0, pl.Float32),
        top_p=pl.lit(1.0, pl.Float32),
        top_k=pl.lit(0, pl.Int32),
        min_p=pl.lit(0.0, pl.Float32),
        logprobs_mode=pl.lit("none"),
        kept_mass=pl.lit(None, pl.List(pl.Float32)),
        engine=pl.lit(ENGINE),
        engine_version=pl.lit(str(STAGE.version)),
    )


def _token_ids(text: str, tokenizer: "PreTrainedTokenizerBase | None") -> list[int]:
    return encode_texts([text], tokenizer)[0] if tokenizer else []


def _tokenizer_files(path: Path) -> dict[str, str]:
    """Return the hashes of a tokenizer's files: its identity, whatever its path."""
    found = {name: sha256_file(path / name) for name in TOKENIZER_FILES if (path / name).is_file()}
    if not found:
        raise PolicyError(f"{path} has no tokenizer files, expected the directory of a tokenizer: give one, or none")
    return found


def compute(task: StageTask[SourceConfig, Material]) -> None:
    """Write the imported rows."""
    material = task.resources
    prompts = imported_prompts(material)
    task.writers["prompts"].write_part(0, prompts)
    task.writers["completions"].write_part(0, imported_completions(material, prompts, task.recipe))


STAGE = Stage(ENGINE, version=2, config=SourceConfig, compute=compute)
