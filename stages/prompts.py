"""prompts: a task or a dataset -> the prompts of one iteration, tokenized exactly as the engine receives them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Stage, StageTask
from stages.checkpoints import load_tokenizer
from stages.encoding import encode_conversations
from stages.source_rows import SourceRow
from stages.sources import SourceConfig, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptsConfig(SourceConfig):
    """Config of the prompts stage."""

    prompts_per_iteration: int = Field(64, ge=1)
    """Prompts per iteration; each gets one group of completions."""


def prompt_rows(
    rows: Sequence[SourceRow],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    variables: Mapping[str, Any] | None = None,
) -> pl.DataFrame:
    """Return one row per source row; prompts of more than ``max_prompt_tokens`` get the drop_reason ``too_long``.

    ``variables`` are given to the chat template.
    """
    token_ids = encode_conversations([row.messages for row in rows], tokenizer, variables)
    return pl.DataFrame(
        {
            "prompt_id": [row.prompt_id for row in rows],
            "messages": [row.messages for row in rows],
            "prompt_token_ids": token_ids,
            "reference_answer": [row.reference_answer for row in rows],
            "task": [row.task for row in rows],
            "metadata": [row.metadata for row in rows],
            "drop_reason": ["too_long" if len(ids) > max_prompt_tokens else None for ids in token_ids],
        },
        schema_overrides={
            "prompt_token_ids": pl.List(pl.Int32),
            "reference_answer": pl.String,
            "drop_reason": pl.String,
        },
    )


def compute(task: StageTask[SourceConfig, None]) -> None:
    """Draw and tokenize the prompts of an iteration."""
    rows = draw(
        task.config,
        split=task.parameters["drawn_for"],
        held_out_share=task.parameters["held_out_share"],
        count_=task.parameters["count"],
        seed=task.parameters["seed"],
        iteration=task.parameters["iteration"],
    )
    longest = task.parameters["max_prompt_tokens"]
    tokenizer = load_tokenizer(task.inputs["policy"].path)
    frame = prompt_rows(rows, tokenizer, longest, task.config.chat_template_kwargs)
    if frame["drop_reason"].null_count() == 0:
        raise SourceError(
            f"all {len(frame)} prompts have more than {longest} tokens, which is what generate.max_tokens leaves of "
            "the model's context: lower it, shorten the prompts, or use a model with a longer context"
        )
    task.writer.write_part(0, frame)


STAGE = Stage("prompts", version=2, config=SourceConfig, compute=compute, wants=("seed", "iteration"))
