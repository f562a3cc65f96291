"""TransformersEngine: completions from the model's own forward, for machines where vLLM cannot be installed.

Legend of the shape suffixes: ``B`` rows of a batch, ``P`` prompt tokens with their padding, ``T`` tokens so far with
their padding, ``V`` vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from grpo.policy import load_policy
from pipeline.errors import PolicyError
from stages.engines.base import (
    EngineInfo,
    EngineSettings,
    Generated,
    OnProgress,
    Request,
    Sampling,
    check_requests,
    not_loaded,
)


class TransformersEngine:
    """Batches of ``max_num_seqs`` requests, prompts padded on the left, one forward per token.

    The first load sets torch's thread count for the whole process.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("transformers", transformers.__version__, "processed", self.device)

    def load(self, policy: Path) -> None:
        """Load the checkpoint, whatever its architecture.

        Raises:
            PolicyError: when it is no causal language model that can be trained here.
        """
        torch.set_num_threads(self.settings.num_threads)
        try:
            self._model = load_policy(policy, dtype=getattr(torch, self.settings.dtype), device=self.device)
        except ValueError as error:
            raise PolicyError(str(error)) from error

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None
    ) -> list[Generated]:
        """Return one completion for each request, in the order of requests.

        What a row draws depends on its own seed only; its batch can change a log probability in the last bits.

        Raises:
            EngineError: when nothing is loaded, or a request cannot be answered with these settings.
        """
        if self._model is None:
            raise not_loaded("transformers")
        check_requests(
            requests,
            max_model_len=self.settings.max_model_len,
            vocab_size=self._model.config.get_text_config().vocab_size,
        )
        # prompts of like length share a batch, which saves padding
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids))
        finished: dict[int, Generated] = {}
        num_tokens = 0
        for start in range(0, len(order), self.settings.max_num_seqs):
            members = order[start : start + self.settings.max_num_seqs]
            rows = [_Row(requests[i], sampling, self.settings.max_model_len) for i in members]
            for num_new_tokens in self._run_batch(rows, sampling):
                num_tokens += num_new_tokens
                if on_progress is not None:
                    on_progress(len(finished) + sum(row.finish_reason is not None for row in rows), num_tokens)
            finished |= {i: row.generated() for i, row in zip(members, rows, strict=True)}
        return [finished[i] for i in range(len(requests))]

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    @torch.inference_mode()
    def _run_batch(self, rows: list["_Row"], sampling: Sampling) -> Iterator[int]:
        """Sample one token for each row per round; yield the number of tokens of each round."""
        prompts = [row.request.prompt_token_ids for row in rows]
        width = max(map(len, prompts))
        ids_BP = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        uniforms_BT = torch.stack([row.uniforms for row in rows]).to(self.device)
        positions_BP = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        output = self._forward(ids_BP, mask_BT, positions_BP, None)
        for step in range(sampling.max_tokens):
            tokens_B, logprobs_B, kept_mass_B = draw(output.logits[:, -1], uniforms_BT[:, step], sampling)
            drawn = list(zip(tokens_B.tolist(), logprobs_B.tolist(), kept_mass_B.tolist(), strict=True))
            running = [i for i, row in enumerate(rows) if row.finish_reason is None]
            for i in running:
                rows[i].append(*drawn[i])
            yield len(running)
            alive = [i for i in running if rows[i].finish_reason is None]
            if not alive:
                return
            # finished rows stay in the batch until they are half of it: removing rows copies the whole cache
            if len(alive) <= len(rows) // 2:
                kept_B = torch.tensor(alive, device=self.device)
                output.past_key_values.batch_select_indices(kept_B)
                rows = [rows[i] for i in alive]
                mask_BT, uniforms_BT, tokens_B = mask_BT[kept_B], uniforms_BT[kept_B], tokens_B[kept_B]
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=-1)
            # a finished row may pass the end of the context; its tokens there are never read
            positions_B1 = (mask_BT.sum(-1, keepdim=True) - 1).clamp(max=self.settings.max_model_len - 1)
            output = self._forward(tokens_B[:, None], mask_BT, positions_B1, output.past_key_values)

    def _forward(self, ids: Tensor, mask_BT: Tensor, positions: Tensor, cache: Any) -> Any:
        return self._model(
            input_ids=ids,
            attention_mask=mask_BT,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


@dataclass(slots=True)
class _Row:
    """One request and its tokens so far."""

    request: Request
    sampling: Sampling
    max_model_len: int
    uniforms: Tensor = field(init=False)
    """One number in [0, 1) for each token, all drawn before the first: nothing else in the batch can shift them."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.request.seed)
        self.uniforms = torch.rand(self.sampling.max_tokens, generator=generator, dtype=torch.float64)

    def append(self, token: int, logprob: float, kept_mass: float) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob if math.isfinite(logprob) else None)
        self.kept_mass.append(kept_mass)
        if token in self.sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif (
            len(self.token_ids) == self.sampling.max_tokens
            or len(self.request.prompt_token_ids) + len(self.token_ids) == self.max_model_len
        ):
            self.finish_reason = "length"

    def generated(self) -> Generated:
        assert self.finish_reason is not None
        return Generated(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=str(self.token_ids[-1]) if self.finish_reason == "stop" else None,
            kept_mass=self.kept_mass if self.sampling.is_truncated else None,
        )


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Return the drawn tokens, their log probabilities (float32) and the mass that the filters kept, each of shape [B].

    The token is the first whose cumulative probability, in vocabulary order and float64, exceeds the uniform number.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, _pick(logits_BV.log_softmax(-1), tokens_B), torch.ones_like(logits_BV[:, 0])
    logits_BV = logits_BV / sampling.temperature
    kept_BV = apply_filters(logits_BV, sampling)
    logprobs_BV = kept_BV.log_softmax(-1)
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    thresholds_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    tokens_B = (cumulative_BV <= thresholds_B1).sum(-1)
    kept_mass_B = (kept_BV.logsumexp(-1) - logits_BV.logsumexp(-1)).exp()
    return tokens_B, _pick(logprobs_BV, tokens_B), kept_mass_B


def apply_filters(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits with -inf at every token that min-p, top-k or top-p cuts off; the likeliest always stays.

    The order and the treatment of ties are vLLM's: tokens that tie with the k-th stay, and top-p counts the mass that
    top-k left.
    """
    cut = -torch.inf
    if sampling.min_p > 0:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, cut)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, cut)
    if sampling.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort(dim=-1)
        is_cut_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        is_cut_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(is_cut_BV.scatter(-1, order_BV, is_cut_BV), cut)
    return logits_BV


def _pick(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return values_BV.gather(-1, tokens_B[:, None])[:, 0]
