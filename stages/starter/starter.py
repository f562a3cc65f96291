"""starter: a small model of our own for a task, warmed up on the demonstrations of a careless teacher.

It needs no download and takes a minute. It leaves GRPO something to do: the model has the skill, with the teacher's
mistakes in it.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import polars as pl
from pydantic import Field, model_validator

from pipeline.config import StrictModel, chosen
from pipeline.errors import ConfigError, SourceError
from pipeline.files import WRITER_LOCK, locked
from pipeline.stage import Progress, Stage, StageCall, StageResult, StageTask, run_stage, silent
from stages.encoding import encode_conversations, encode_texts
from stages.sources import SourceConfig, draw, source_identity
from stages.starter.teacher import demonstrate
from stages.starter.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HEAD_SIZES = (32, 64, 80, 96, 128)
"""Head sizes that vLLM's attention on CPU supports."""


class StarterConfig(StrictModel):
    """Config of the starter. It is a Llama: AutoTokenizer loads a Llama's tokenizer as it was saved, and would
    build a Qwen2's by other rules from the same vocabulary."""

    seed: int = 0
    """Of the initial weights and of the teacher."""
    hidden_size: int = Field(128, ge=1)
    """Width of the model; divided by num_heads it must be a head size that the engine supports."""
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    """Query heads per layer."""
    num_kv_heads: int = Field(2, ge=1)
    """Key and value heads per layer; a divisor of num_heads."""
    intermediate_size: int = Field(256, ge=1)
    """Width of the feed-forward part of a layer."""
    questions: int = Field(2048, ge=1)
    """Different questions that the teacher answers; none of them is held out for evaluation."""
    max_context: int = Field(256, ge=1)
    """Longest prompt and completion together, in tokens."""
    demonstrations: int = Field(76_800, ge=1)
    """Demonstrations that the teacher writes; rows are drawn with replacement and answered anew each time."""
    forget_rate: float = Field(0.75, ge=0, le=1)
    """How often the teacher forgets to carry, in tasks that ask for a sum."""
    slip_rate: float = Field(0.02, ge=0, le=1)
    """How often the teacher gets a digit wrong, or gives another question's answer where there is no digit."""
    steps: int = Field(600, ge=1)
    """Optimizer steps. After the last demonstration they begin again with the first."""
    batch_size: int = Field(128, ge=1)
    """Demonstrations per step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Of AdamW, for embeddings, biases and norms; the peak of a cosine that falls to 0."""
    matrix_learning_rate: float = Field(0.02, gt=0)
    """Of Muon, for the matrices inside the layers; the same curve."""
    warmup_steps: int = Field(50, ge=1)
    """Steps over which both learning rates rise."""
    num_threads: int = Field(1, ge=1)
    """CPU threads; they change the bits of the result."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        size, rest = divmod(self.hidden_size, self.num_heads)
        if rest or size not in HEAD_SIZES:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} gives a head size of "
                f"{self.hidden_size / self.num_heads:g}, expected one of {', '.join(map(str, HEAD_SIZES))}: change one"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}: change one of them"
            )
        return self


def warm_up(
    config: StarterConfig, rows: pl.DataFrame, progress: Progress = silent
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast", list[float]]:
    """Return the trained model in float32, its tokenizer and the loss of each step.

    ``rows`` has the columns messages, a list of {role, content}, and reference_answer. The result is a pure function
    of the arguments, bit for bit on the same hardware. Puts torch into deterministic mode for this process.

    Raises:
        SourceError: when a row has no reference answer, or there is no row.
        ConfigError: when a demonstration is longer than max_context.
    """
    from grpo.optimizer import deterministic
    from stages.starter.warm_up import Example, imitate, new_model

    conversations: list[list[dict[str, str]]] = rows["messages"].to_list()
    answers: list[str | None] = rows["reference_answer"].to_list()
    known = [answer for answer in answers if answer is not None]
    if not answers or len(known) < len(answers):
        raise SourceError(
            f"{len(answers) - len(known)} of {len(answers)} rows have no reference answer: the starter is taught by "
            "demonstration, so it needs rows, and an answer to each; set prompts.answer_column, or start from a model"
        )
    tokenizer = build_tokenizer([*(m["content"] for messages in conversations for m in messages), *known])
    tokenizer.model_max_length = config.max_context
    prompt_ids = encode_conversations(conversations, tokenizer)
    demonstrations = demonstrate(
        [(messages[-1]["content"], answer) for messages, answer in zip(conversations, known, strict=True)],
        count=config.demonstrations,
        forget_rate=config.forget_rate,
        slip_rate=config.slip_rate,
        seed=config.seed,
    )
    answers_given = sorted({answer for _, answer in demonstrations})
    encoded = zip(answers_given, encode_texts(answers_given, tokenizer), strict=True)
    answer_ids = {answer: [*ids, tokenizer.eos_token_id] for answer, ids in encoded}
    examples = [Example(prompt_ids[index], answer_ids[answer]) for index, answer in demonstrations]
    longest = max(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
    if longest > config.max_context:
        raise ConfigError(
            f"a demonstration has {longest} tokens, and starter.max_context is {config.max_context}: raise it, or "
            "choose a task with shorter questions"
        )
    deterministic(config.num_threads)
    model = new_model(
        seed=config.seed,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        max_context=config.max_context,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    losses = imitate(
        model,
        examples,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        matrix_learning_rate=config.matrix_learning_rate,
        warmup_steps=config.warmup_steps,
        progress=progress,
    )
    return model, tokenizer, losses


def compute(task: StageTask[StarterConfig, None]) -> None:
    """Draw the questions that are demonstrated, warm the model up, and save it with its tokenizer."""
    from grpo.policy import save_policy

    config = task.config
    questions = draw(
        SourceConfig(**task.parameters["source"]),
        split="train",
        held_out_share=task.parameters["held_out_share"],
        count_=config.questions,
        seed=config.seed,
        iteration=0,
    )
    rows = pl.DataFrame(
        {"messages": [q.messages for q in questions], "reference_answer": [q.reference_answer for q in questions]}
    )
    model, tokenizer, _ = warm_up(config, rows, task.progress)
    save_policy(model, task.writer.directory)
    tokenizer.save_pretrained(task.writer.directory)


STAGE = Stage("starter", version=2, config=StarterConfig, compute=compute)


def make_starter(
    config: StarterConfig, source: SourceConfig, held_out_share: float, root: Path, progress: Progress
) -> StageResult:
    """Return the starter's policy artifact below ``root``, which runs share; it is made only if missing."""
    call = starter_call(config, source, held_out_share, root)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / WRITER_LOCK):  # of two runs that need the same starter the second waits, and finds it
        return run_stage(call, None, progress)


def starter_call(
    config: StarterConfig, source: SourceConfig, held_out_share: float, root: Path
) -> StageCall[StarterConfig, None]:
    """Return the call that makes the starter, in a folder below ``root`` that its recipe names."""
    parameters = {
        "source": chosen(SourceConfig(**source.model_dump(include=set(SourceConfig.model_fields)))),
        "held_out_share": held_out_share,
        **source_identity(source),
    }
    call = StageCall(STAGE, config, {}, {"policy": root}, parameters)
    return replace(call, places={"policy": root / call.recipe()[:12]})
