"""Fluency by a frozen causal language model: how well it would have predicted the answer's tokens."""

import math
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import polars as pl

from pipeline.errors import RewardError
from stages.checkpoints import context_length, first_line, looks_local
from stages.encoding import encode_conversations, encode_texts
from stages.rewards.base import Score
from stages.rewards.frames import Unscored, reward_frame
from stages.rewards.models.frozen_models import MODELS_KEPT, batches_by_length, limited_threads
from stages.rewards.models.model_identity import identity_by_model, model_source

Given = Literal["messages", "prompt", "nothing"]
CHOICES = ("messages", "prompt", "nothing")
HEAD_CHUNK_TOKENS = 256
"""Positions whose logits exist at the same time: 150 MB with a vocabulary of 150,000."""


def perplexity(
    completions: pl.DataFrame,
    model: str,
    revision: str | None = None,
    given: Given = "prompt",
    separator: str = "\n",
    best: float = 1.0,
    worst: float = 100.0,
    empty: float = 0.0,
    batch_size: int = 8,
    device: str = "cpu",
    num_threads: int = 2,
) -> pl.DataFrame:
    """Return 1 for answers with the perplexity ``best`` or less, 0 for ``worst`` or more, linear in its logarithm:

        reward = clip((log worst - log perplexity) / (log worst - log best), 0, 1)
        log perplexity = - mean over the answer's tokens of their log probability

    ``model`` is any causal language model, by path or by hub name and revision. ``given`` says what it has read before
    the answer: the whole conversation by the tokenizer's chat template (messages), the last user message as plain text
    with ``separator`` after it (prompt), or nothing. The end of sequence is not scored. Without anything before it,
    not even a beginning-of-sequence token, the first token has no probability and is left out.

    An answer without tokens gets ``empty``. Null where answer and prompt are longer than the model's context, and where
    no token has a probability.
    """
    check_arguments(given, best, worst)
    network, tokenizer = load_causal(model, revision, device)
    limit = context_length(network.config.to_dict())
    results: list[Score | Unscored | None] = []
    rows: list[tuple[list[int], list[int]]] = []
    for row in completions.select("completion", "prompt", "messages").iter_rows(named=True):
        before, answer = context_ids(tokenizer, row, given, separator), encode_texts([row["completion"]], tokenizer)[0]
        rows.append((before, answer))
        if not answer:
            results.append(Score(empty, {"tokens": 0}))
        elif len(before) + len(answer) > limit > 0:
            results.append(
                Unscored(
                    f"the answer has {len(answer)} tokens after {len(before)} of its context, the model reads {limit}: "
                    "nothing is cut; use a model with a longer context"
                )
            )
        elif not before and len(answer) == 1:
            results.append(Unscored("the answer is one token with nothing before it, which has no probability"))
        else:
            results.append(None)
    open_rows = [index for index, result in enumerate(results) if result is None]
    with limited_threads(num_threads):
        for batch in batches_by_length([len(rows[i][0]) + len(rows[i][1]) for i in open_rows], batch_size):
            indices = [open_rows[i] for i in batch]
            found = _logprobs(network, [rows[i] for i in indices])
            for index, logprobs in zip(indices, found, strict=True):
                results[index] = _score(logprobs, rows[index][1], tokenizer, best, worst)
    return reward_frame([result for result in results if result is not None])


def perplexity_identity(**arguments: Any) -> dict[str, Any]:
    """Return the model's digest and the other arguments; batches, threads, device decide the last bits. Read-only."""
    identity = identity_by_model(perplexity, arguments)
    check_arguments(identity["given"], identity["best"], identity["worst"])
    return identity


def check_arguments(given: str, best: float, worst: float) -> None:
    """Raise RewardError for arguments that say nothing."""
    if given not in CHOICES:
        raise RewardError(f"given is {given!r}: expected one of {', '.join(CHOICES)}; correct the argument")
    if not 1 <= best < worst:
        raise RewardError(
            f"best is {best} and worst {worst}: expected perplexities with 1 <= best < worst; correct them"
        )


@lru_cache(maxsize=MODELS_KEPT)
def load_causal(model: str, revision: str | None, device: str) -> tuple[Any, Any]:
    """Return the causal language model in float32 and its tokenizer, loaded once in this process.

    Raises:
        RewardError: when it cannot be loaded, lacks weights, or does more after its layers than a linear head.
    """
    from transformers import AutoTokenizer

    from grpo.policy import load_policy

    source = model_source(model)
    try:
        network = load_policy(source, revision=revision, device=device)
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, local_files_only=looks_local(model), trust_remote_code=False
        )
    except (ValueError, OSError) as error:
        raise RewardError(
            f"{model} cannot be loaded as a causal language model with its tokenizer: {first_line(error)}"
        ) from error
    return network, tokenizer


def context_ids(tokenizer: Any, row: dict[str, Any], given: str, separator: str) -> list[int]:
    """Return the token ids that stand before the answer."""
    if given == "messages":
        if not tokenizer.chat_template:
            raise RewardError(
                "given is messages, and the model's tokenizer has no chat template: set given to prompt or nothing"
            )
        return encode_conversations([row["messages"]], tokenizer)[0]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin if given == "nothing" else [*begin, *encode_texts([row["prompt"] + separator], tokenizer)[0]]


def _logprobs(network: Any, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
    """Return the log probability of each answer token that has something before it, row by row."""
    import torch

    from grpo.logprobs import token_logprobs

    width = max(len(before) + len(answer) for before, answer in rows)
    # What pads a row comes after it, where causal attention never looks.
    grid_BT = torch.tensor([[*before, *answer, *[0] * (width - len(before) - len(answer))] for before, answer in rows])
    starts = [max(len(before), 1) for before, _ in rows]
    counts = [len(before) + len(answer) - start for (before, answer), start in zip(rows, starts, strict=True)]
    position_N = torch.tensor(
        [i * width + start - 1 + k for i, (start, n) in enumerate(zip(starts, counts, strict=True)) for k in range(n)]
    )
    target_N = grid_BT.flatten()[position_N + 1]
    arguments = [x.to(network.device) for x in (grid_BT, position_N, target_N, torch.ones(len(position_N)))]
    with torch.no_grad():
        logprob_N, _ = token_logprobs(network, *arguments, chunk_tokens=HEAD_CHUNK_TOKENS)
    values, ends = logprob_N.tolist(), list(accumulate(counts))
    return [values[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _score(logprobs: list[float], answer: list[int], tokenizer: Any, best: float, worst: float) -> Score:
    mean = math.fsum(logprobs) / len(logprobs)
    reward = (math.log(worst) + mean) / (math.log(worst) - math.log(best))
    lowest = min(range(len(logprobs)), key=lambda k: logprobs[k])
    index = lowest + len(answer) - len(logprobs)
    return Score(
        min(max(reward, 0.0), 1.0),
        {
            "perplexity": math.exp(min(-mean, 700.0)),  # exp(710) is more than a float holds
            "tokens": len(logprobs),
            "worst_token": {"index": index, "text": tokenizer.decode([answer[index]]), "logprob": logprobs[lowest]},
        },
    )
