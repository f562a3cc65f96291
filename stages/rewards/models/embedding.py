"""Relevance by an embedding model: how near the answer lies to its question, or to the reference answer."""

from functools import lru_cache
from typing import Any, Literal

import polars as pl

from pipeline.errors import RewardError
from stages.checkpoints import first_line, looks_local
from stages.rewards.base import Score
from stages.rewards.frames import Unscored, reward_frame
from stages.rewards.models.frozen_models import MODELS_KEPT, limited_threads
from stages.rewards.models.model_identity import identity_by_model, model_source

Against = Literal["prompt", "reference"]


def embedding(
    completions: pl.DataFrame,
    model: str,
    revision: str | None = None,
    against: Against = "prompt",
    answer_prefix: str = "",
    against_prefix: str = "",
    empty: float = 0.0,
    batch_size: int = 32,
    device: str = "cpu",
    num_threads: int = 2,
) -> pl.DataFrame:
    """Return the cosine, from -1 to 1, between the embeddings of the answer and of its prompt or reference answer.

    ``model`` is any encoder that sentence-transformers loads, by path or by hub name and revision. Some encoders were
    trained with a text before each input (E5: "query: " and "passage: "); give it as a prefix, the model's own
    default prompts are not used. An answer of white space gets ``empty``. Null where there is nothing to compare with,
    and where a text is longer than the model reads: sentence-transformers would cut it silently.
    """
    encoder = load_encoder(model, revision, device)
    answers = [answer_prefix + text for text in completions["completion"]]
    others = [None if text is None else against_prefix + text for text in completions[_column(against)]]
    is_blank = [not text.strip() for text in completions["completion"]]
    lengths = _token_counts(encoder, sorted({*answers, *(text for text in others if text is not None)}))
    longest = encoder.max_seq_length
    results: list[Score | Unscored | None] = []
    for answer, other, blank in zip(answers, others, is_blank, strict=True):
        if other is None or not other.removeprefix(against_prefix).strip():
            results.append(Unscored(f"the row has no {against} to compare the answer with"))
        elif blank:
            results.append(Score(empty, {"tokens": 0}))
        elif longest is not None and max(lengths[answer], lengths[other]) > longest:
            results.append(
                Unscored(
                    f"the answer has {lengths[answer]} tokens and the {against} {lengths[other]}, the model reads "
                    f"{longest}: nothing is cut; use a model with a longer context"
                )
            )
        else:
            results.append(None)
    open_rows = [index for index, result in enumerate(results) if result is None]
    texts = sorted({text for index in open_rows for text in (answers[index], others[index]) if text is not None})
    with limited_threads(num_threads):
        vectors = _encode(encoder, texts, batch_size)
    for index in open_rows:
        cosine = _cosine(vectors[answers[index]], vectors[others[index] or ""])
        results[index] = Score(cosine, {"against": against, "tokens": lengths[answers[index]]})
    return reward_frame([result for result in results if result is not None])


def embedding_identity(**arguments: Any) -> dict[str, Any]:
    """Return the model's digest and the other arguments; batches, threads, device decide the last bits. Read-only."""
    identity = identity_by_model(embedding, arguments)
    _column(identity["against"])
    return identity


@lru_cache(maxsize=MODELS_KEPT)
def load_encoder(model: str, revision: str | None, device: str) -> Any:
    """Return the sentence-transformers model, in evaluation mode, loaded once in this process.

    Raises:
        RewardError: when there is none.
    """
    from sentence_transformers import SentenceTransformer

    from stages.rewards.models.classifier import quiet_loading

    source, is_local = model_source(model), looks_local(model)
    try:
        with quiet_loading():
            encoder = SentenceTransformer(
                source,
                revision=revision,
                device=device,
                local_files_only=is_local,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise RewardError(
            f"{model} cannot be loaded by sentence-transformers ({first_line(error)}): expected the path or hub name "
            "of an encoder; correct it, or its revision"
        ) from error
    return encoder.float().eval()


def _column(against: str) -> str:
    if against not in ("prompt", "reference"):
        raise RewardError(f"against is {against!r}: expected prompt or reference; correct the argument")
    return against


def _encode(encoder: Any, texts: list[str], batch_size: int) -> dict[str, Any]:
    """Return the float64 vector of each text; encode sorts by length by itself."""
    import numpy as np

    if not texts:
        return {}
    # An empty prompt keeps a model's own default prompt away, which None would not.
    vectors = encoder.encode(texts, prompt="", batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    return dict(zip(texts, vectors.astype(np.float64), strict=True))


def _cosine(first: Any, second: Any) -> float:
    """Return the cosine of two vectors; 0 when one is all zeros, as of a text without a known word."""
    import numpy as np

    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(first @ second / size, -1.0, 1.0)) if size > 0 else 0.0


def _token_counts(encoder: Any, texts: list[str]) -> dict[str, int]:
    """Return the number of tokens of each text, none of them cut."""
    tokenizer = encoder.tokenizer
    if hasattr(tokenizer, "encode_batch"):  # of the package tokenizers
        tokenizer.no_truncation()
        return {t: len(e.ids) for t, e in zip(texts, tokenizer.encode_batch(texts), strict=True)} if texts else {}
    if hasattr(tokenizer, "get_vocab") and callable(tokenizer):  # of transformers
        found = tokenizer(texts, truncation=False, verbose=False)["input_ids"] if texts else []
        return {text: len(ids) for text, ids in zip(texts, found, strict=True)}
    return {text: len(tokenizer.tokenize(text)) for text in texts}  # of sentence-transformers' word models
