"""`grpo tokens`: what an update made of one completion, a line per token. Imports neither torch, vllm nor prefect.

Texts, token ids and the sampler's log probabilities are stored for every completion. The trainer's numbers are
stored if the run has ``update.record_tokens``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from flows.commands.options import Output, Run
from flows.printing import Format, number, print_rows, say
from pipeline.errors import ArtifactDamaged
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from pipeline.text import json_text

WRITES = False

COLUMNS = (
    "completion_id",
    "optimizer_step",
    "position",
    "token_id",
    "text",
    "trainer_logprob",
    "sampling_logprob",
    "importance_ratio",
    "correction_weight",
    "entropy",
    "loss",
    "clip_reason",
    "mask_reason",
)
"""Columns of jsonl and csv. Null = not recorded, unknown, or meaningless for a token that did not train."""

LISTS = {
    "trainer_logprob": "trainer_logprobs",
    "importance_ratio": "importance_ratios",
    "correction_weight": "correction_weights",
    "entropy": "entropies",
    "loss": "token_losses",
    "clip_reason": "clip_reasons",
    "mask_reason": "mask_reasons",
}
"""Column -> its list in training_records."""

UNTRAINED = "loss_mask"


@dataclass(frozen=True, slots=True)
class Told:
    """A completion and what is stored about it."""

    iteration: int
    completion: dict[str, Any]
    batch: dict[str, Any] | None
    """Its row of batches, in its first optimizer step; None = the iteration has no batches yet."""
    records: list[dict[str, Any]]
    """One for each optimizer step that trained on it."""


def tokens(
    run: Run,
    completion: Annotated[str, typer.Option("--completion", "-c", help="completion_id or its beginning.")],
    iteration: Annotated[int | None, typer.Option("--iteration", "-i", help="The completion's; default: all.")] = None,
    format_: Output = Format.table,
) -> None:
    """Print what the update made of each token of a completion (update.record_tokens). Read-only.

    Example: grpo tokens runs/demo -i 3 -c 71a6b5940d428f02-000
    """
    run_dir = open_run(run)
    told = tell(run_dir, iteration, completion)
    rows = list(token_rows(run_dir, told))
    if format_ is not Format.table:
        print_rows(rows, format_, columns=COLUMNS)
        return
    say(_headline(told))
    for record in told.records:
        step = record["optimizer_step"]
        say(f"optimizer step {step}: {_summary(record)}")
        print_rows([_line(row) for row in rows if row["optimizer_step"] == step], format_)
    if not told.records:
        print_rows([_line(row) for row in rows], format_)
    for note in _notes(told):
        say(note)


def tell(run: RunDir, iteration: int | None, completion_id: str) -> Told:
    """Return a completion of a run with its rows of batches and training_records. Read-only.

    Raises:
        UsageError: when no completion, or several, have an id that begins so.
    """
    import polars as pl

    from pipeline.lineage import find_completion

    index, full_id = find_completion(run, completion_id, iteration)
    is_it = pl.col("completion_id") == full_id

    def rows(dataset: str) -> list[dict[str, Any]]:
        if not run.has(index, dataset):
            return []
        return run.open(index, dataset).scan().filter(is_it).collect().to_dicts()

    return Told(index, rows("completions")[0], next(iter(rows("batches")), None), rows("training_records"))


def token_rows(run: RunDir, told: Told) -> Iterator[dict[str, Any]]:
    """Yield a row of ``COLUMNS`` for each token of each optimizer step; once if none trained on it. Read-only.

    Raises:
        ArtifactDamaged: when a list of training_records has another length than the completion.
    """
    from stages.inspect.report_groups import TokenText

    token_ids: list[int] = told.completion["completion_token_ids"]
    texts = TokenText(run).pieces(token_ids)
    source = told.completion if told.batch is None else told.batch  # the batch's are over the full vocabulary
    sampling = source["sampling_logprobs"] or [None] * len(token_ids)
    mask = told.completion["loss_mask"] or [True] * len(token_ids)
    untrained = [None if trains else UNTRAINED for trains in mask]
    for record in told.records or [{"optimizer_step": None, "mask_reasons": untrained}]:
        lists = {name: _list(told, record, column) for name, column in LISTS.items()}
        if record.get("mask_reasons") is None:
            lists["mask_reason"] = untrained
        for place, token_id in enumerate(token_ids):
            yield {
                "completion_id": told.completion["completion_id"],
                "optimizer_step": record["optimizer_step"],
                "position": place,
                "token_id": token_id,
                "text": texts[place],
                "sampling_logprob": sampling[place],
                **{name: values[place] for name, values in lists.items()},
            }


def _list(told: Told, record: dict[str, Any], column: str) -> list[Any]:
    """Return a list of the record, or nulls where it has none."""
    count = len(told.completion["completion_token_ids"])
    values: list[Any] | None = record.get(column)
    if values is None:
        return [None] * count
    if len(values) != count:
        raise ArtifactDamaged(
            f"{column} of completion {told.completion['completion_id']} has {len(values)} elements in the "
            f"training_records of iteration {told.iteration}, expected {count}, one per token: see `grpo verify`"
        )
    return values


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for the table: short names, and quotes that show white space."""
    reasons = [row[name] for name in ("mask_reason", "clip_reason") if row[name]]
    return {
        "": row["position"],
        "token": row["token_id"],
        "text": json_text(row["text"]),
        "trainer": row["trainer_logprob"],
        "sampler": row["sampling_logprob"],
        "ratio": row["importance_ratio"],
        "weight": row["correction_weight"],
        "entropy": row["entropy"],
        "loss": row["loss"],
        "reason": ", ".join(reasons) or None,
    }


def _headline(told: Told) -> str:
    row = told.completion
    advantage = None if told.batch is None else told.batch["advantage"]
    return (
        f"iteration {told.iteration}, completion {row['completion_id']}, written by {row['policy_name']} "
        f"{row['policy_digest'][:8]}, {len(row['completion_token_ids'])} tokens, finish {row['finish_reason']}, "
        f"advantage {number(advantage)}"
    )


def _summary(record: dict[str, Any]) -> str:
    return (
        f"{record['num_tokens']} tokens trained, {record['masked_tokens']} masked, "
        f"{record['clipped_low_tokens'] + record['clipped_high_tokens']} clipped, "
        f"mean ratio {number(record['importance_ratio_mean'])}, share of the loss {number(record['loss'])}"
    )


def _notes(told: Told) -> Iterator[str]:
    """Yield why numbers are missing."""
    if told.batch is not None and told.batch["drop_reason"] is not None:
        yield f"the row did not train: {told.batch['drop_reason']}"
    elif not told.records:
        yield "no update has trained on the row yet"
    elif told.records[0]["trainer_logprobs"] is None:
        yield "the update recorded no tokens: set update.record_tokens = true in a new run, or in a fork of this one"
