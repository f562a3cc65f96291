"""Rewards by a reward model: a sequence classifier with one logit, such as `grpo reward-model` trains."""

import math
from typing import Any

import polars as pl

from pipeline.errors import RewardError
from stages.encoding import encode_conversations, encode_pair
from stages.rewards.base import Score
from stages.rewards.frames import Unscored, reward_frame
from stages.rewards.models.frozen_models import classify, limited_threads, load_frozen_classifier
from stages.rewards.models.model_identity import identity_by_model


def preference_score(
    completions: pl.DataFrame,
    model: str,
    revision: str | None = None,
    squash: bool = False,
    batch_size: int = 8,
    device: str = "cpu",
    num_threads: int = 2,
) -> pl.DataFrame:
    """Return the logit of the reward model for the conversation with the answer; with ``squash`` its sigmoid.

    ``model`` is any sequence classifier of transformers with one logit, by path or by hub name and revision; a
    ``reward_model`` artifact is one. The conversation is written by the tokenizer's chat template with the answer as
    the assistant's turn; without a template the last user message and the answer are encoded as a pair of texts. An
    empty answer is scored like any other. Null where the conversation is longer than the model reads.
    """
    classifier = load_frozen_classifier(model, revision, device)
    if classifier.model.config.num_labels != 1:
        raise RewardError(
            f"{model} has {classifier.model.config.num_labels} labels: expected a reward model with one logit; for "
            "entailment models use stages.rewards.models.entailment:entailment"
        )
    encodings = [
        encode_answer(classifier.tokenizer, row["messages"], row["prompt"], row["completion"])
        for row in completions.select("messages", "prompt", "completion").iter_rows(named=True)
    ]
    lengths = [len(encoding["input_ids"]) for encoding in encodings]
    limit = classifier.max_tokens or max(lengths, default=0)
    readable = [index for index, length in enumerate(lengths) if 0 < length <= limit]
    with limited_threads(num_threads):
        logits = classify(classifier, [encodings[index] for index in readable], batch_size)
    scored = {index: values[0] for index, values in zip(readable, logits, strict=True)}
    return reward_frame([_result(scored.get(i), length, limit, squash) for i, length in enumerate(lengths)])


def preference_score_identity(**arguments: Any) -> dict[str, Any]:
    """Return the model's digest and the other arguments; batches, threads, device decide the last bits. Read-only."""
    return identity_by_model(preference_score, arguments)


def encode_answer(tokenizer: Any, messages: list[dict[str, str]], prompt: str, answer: str) -> dict[str, list[int]]:
    """Return the model's inputs for a conversation that ends with the answer; training and scoring share this.

    By the chat template where there is one, else ``prompt`` and answer as a pair of texts. Nothing is cut.
    """
    if tokenizer.chat_template:
        turns = [*messages, {"role": "assistant", "content": answer}]
        ids = encode_conversations([turns], tokenizer, add_generation_prompt=False)[0]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
    return encode_pair(prompt, answer, tokenizer)


def _result(logit: float | None, length: int, limit: int, squash: bool) -> Score | Unscored:
    if logit is None:
        return Unscored(
            f"the conversation with the answer has {length} tokens, the model reads 1 to {limit}: nothing is cut; use "
            "a model with a longer context"
        )
    return Score(_sigmoid(logit) if squash else logit, {"logit": logit, "tokens": length})


def _sigmoid(value: float) -> float:
    """Return the logistic function; of either form the one whose exponential cannot overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
