"""Grounding by natural language inference: does the context entail what the answer's sentences say?"""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import polars as pl

from pipeline.errors import RewardError
from stages.encoding import encode_pair
from stages.rewards.base import Score
from stages.rewards.frames import Unscored, reward_frame
from stages.rewards.models.frozen_models import Classifier, classify, limited_threads, load_frozen_classifier
from stages.rewards.models.model_identity import identity_by_model
from stages.rewards.words import sentences as split_sentences

Combine = Literal["mean", "min"]
ROLES = ("entailment", "contradiction", "neutral")


def entailment(
    completions: pl.DataFrame,
    model: str,
    revision: str | None = None,
    context_key: str = "context",
    labels: Mapping[str, int] | None = None,
    contradiction_weight: float = 0.0,
    combine: Combine = "mean",
    empty: float = 0.0,
    batch_size: int = 16,
    device: str = "cpu",
    num_threads: int = 2,
) -> pl.DataFrame:
    """Return how well the context in the row's metadata supports the answer, from -``contradiction_weight`` to 1.

    Each sentence of the answer is a hypothesis, the context the premise; a sentence gets P(entailment) -
    ``contradiction_weight`` x P(contradiction), the answer the mean or the minimum of its sentences. A context that is
    a list of passages gives each sentence the passage that entails it most (as SummaC does, arXiv:2111.09525).

    ``model`` is any sequence classifier for natural language inference, by path or by hub name and revision. Its
    config names the labels; where it does not, ``labels`` gives their indices: {entailment = 1, contradiction = 0}.

    An answer of white space gets ``empty``. Null without a context, and where a passage and a sentence together are
    longer than the model reads: give the context in shorter passages.
    """
    classifier = load_frozen_classifier(model, revision, device)
    roles = label_roles(classifier.model.config.id2label, labels, contradiction_weight)
    results: list[Score | Unscored | None] = []
    sentences = [split_sentences(text) for text in completions["completion"]]
    pairs: list[tuple[int, int, int]] = []  # row, sentence, passage
    encodings: list[dict[str, list[int]]] = []
    for row, metadata in enumerate(completions["metadata"]):
        passages = _passages(metadata, context_key)
        if passages is None:
            results.append(Unscored(f"the metadata has no {context_key} with a text or a list of texts"))
            continue
        if not sentences[row]:
            results.append(Score(empty, {"sentences": []}))
            continue
        encoded = {
            (row, s, p): _encode(classifier, passage, sentence)
            for s, sentence in enumerate(sentences[row])
            for p, passage in enumerate(passages)
        }
        results.append(_too_long(encoded, classifier.max_tokens))
        if results[-1] is None:
            pairs += encoded
            encodings += encoded.values()
    with limited_threads(num_threads):
        logits = classify(classifier, encodings, batch_size)
    judged: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for (row, s, p), values in zip(pairs, logits, strict=True):
        shares = _softmax(values)
        judged.setdefault(row, {}).setdefault(s, []).append(
            {"passage": p, **{role: shares[index] for role, index in roles.items()}}
        )
    for row, by_sentence in judged.items():
        best = [max(found, key=lambda entry: entry["entailment"]) for found in by_sentence.values()]
        values = [b["entailment"] - contradiction_weight * b.get("contradiction", 0.0) for b in best]
        detail = [{"sentence": text, **b} for text, b in zip(sentences[row], best, strict=True)]
        results[row] = Score(
            min(values) if combine == "min" else math.fsum(values) / len(values), {"sentences": detail}
        )
    return reward_frame([result for result in results if result is not None])


def entailment_identity(**arguments: Any) -> dict[str, Any]:
    """Return the model's digest and the other arguments; batches, threads, device decide the last bits. Read-only."""
    identity = identity_by_model(entailment, arguments)
    if identity["combine"] not in ("mean", "min"):
        raise RewardError(f"combine is {identity['combine']!r}: expected mean or min; correct the argument")
    return identity


def label_roles(
    id2label: Mapping[int, str], labels: Mapping[str, int] | None, contradiction_weight: float
) -> dict[str, int]:
    """Return which class stands for entailment, and which for contradiction and neutral if there are any.

    Raises:
        RewardError: when the names are unclear and ``labels`` does not say it, or says the impossible.
    """
    if labels is not None:
        roles = dict(labels)
    else:
        named = {role: [i for i, name in id2label.items() if name.lower().startswith(role[:6])] for role in ROLES}
        roles = {role: found[0] for role, found in named.items() if len(found) == 1}
    needed = ["entailment", *(["contradiction"] if contradiction_weight else [])]
    wrong = not set(roles) <= set(ROLES) or any(index not in id2label for index in roles.values())
    if wrong or not set(needed) <= set(roles) or len(set(roles.values())) < len(roles):
        raise RewardError(
            f"the model has the labels {dict(id2label)}, and labels is {labels}: expected one index each for "
            f"{' and '.join(needed)}; give the argument labels, for example {{entailment = 1, contradiction = 0}}"
        )
    return roles


def _passages(metadata: str | None, key: str) -> list[str] | None:
    """Return the passages of the context, None when it is missing or is something else than text."""
    found = json.loads(metadata or "{}").get(key)
    passages = [found] if isinstance(found, str) else found
    if not isinstance(passages, list) or not all(isinstance(p, str) for p in passages):
        return None
    return [p for p in passages if p.strip()] or None


def _encode(classifier: Classifier, premise: str, hypothesis: str) -> dict[str, list[int]]:
    return encode_pair(premise, hypothesis, classifier.tokenizer)


def _too_long(encoded: Mapping[tuple[int, int, int], Mapping[str, list[int]]], limit: int) -> Unscored | None:
    longest = max(len(encoding["input_ids"]) for encoding in encoded.values())
    if longest <= limit or limit == 0:
        return None
    return Unscored(
        f"a passage and a sentence have {longest} tokens together, the model reads {limit}: nothing is cut; give the "
        "context as a list of shorter passages"
    )


def _softmax(logits: list[float]) -> list[float]:
    highest = max(logits)
    exponentials = [math.exp(value - highest) for value in logits]
    return [value / math.fsum(exponentials) for value in exponentials]
