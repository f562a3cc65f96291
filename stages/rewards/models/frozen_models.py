"""What rewards by a model share: classifiers loaded once per process, batches by length."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.errors import RewardError
from stages.checkpoints import context_length, looks_local
from stages.rewards.models.model_identity import model_source

MODELS_KEPT = 2
"""Models that stay loaded in a process; a reward needs one."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A sequence classifier in evaluation mode, with its tokenizer."""

    model: Any
    tokenizer: Any
    max_tokens: int
    """Longest input that it reads; 0 = it does not say."""


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices in batches, longest first: neighbours pad each other little, and memory fails early if at all.

    Equal lengths stay in their order, so that the same rows always meet in the same batch.
    """
    if batch_size < 1:
        raise RewardError(f"batch_size is {batch_size}: expected at least 1; raise it")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@contextmanager
def limited_threads(num_threads: int) -> Iterator[None]:
    """Let torch calculate with so many CPU threads; their number decides the last bits of a sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=MODELS_KEPT)
def load_frozen_classifier(model: str, revision: str | None, device: str) -> Classifier:
    """Return the sequence classifier of a path or hub name in float32, loaded once in this process.

    Raises:
        RewardError: when it cannot be loaded, or its checkpoint lacks weights: a causal language model would get a
            classification head of random numbers.
    """
    from transformers import AutoTokenizer

    from stages.rewards.models.classifier import choose_pad_token, load_classifier

    source, is_local = model_source(model), looks_local(model)
    try:
        network = load_classifier(source, revision=revision, is_local=is_local, device=device)
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, revision=revision, local_files_only=is_local, trust_remote_code=False
        )
        choose_pad_token(network, tokenizer)
    except (OSError, ValueError) as error:
        raise RewardError(str(error)) from error
    limits = [context_length(network.config.to_dict()), int(tokenizer.model_max_length)]
    return Classifier(network, tokenizer, min([limit for limit in limits if limit > 0], default=0))


def classify(
    classifier: Classifier, encodings: Sequence[Mapping[str, list[int]]], batch_size: int
) -> list[list[float]]:
    """Return the logits of each encoding, in the order given."""
    import torch

    from stages.rewards.models.classifier import class_logits

    found: list[list[float]] = [[] for _ in encodings]
    for batch in batches_by_length([len(e["input_ids"]) for e in encodings], batch_size):
        with torch.no_grad():
            logits_BL = class_logits(classifier.model, [encodings[index] for index in batch])
        for index, values in zip(batch, logits_BL.tolist(), strict=True):
            found[index] = values
    return found
