"""Logprobs of chosen tokens under a causal language model, without ever holding the logits of a whole microbatch.

Shapes: `B` rows of a microbatch; `T` input tokens, padded on the right; `N` trainable tokens, rows laid end to end;
`H` hidden size; `V` vocabulary; `C` tokens of one chunk of the head.

The hidden states are computed once; the head, which dominates memory, runs chunk by chunk and only at positions whose
prediction trains. Everything after the hidden states is float32: logits rounded to bfloat16 move a logprob by 0.01. (It
is float64 where the model is.)
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_LOGIT = 50.0
"""Size to which the probe raises logits: far into any soft cap in use (Gemma 2 caps at 30), and still exact enough."""
PROBE_TOLERANCE = 1e-3
"""Largest difference of logprobs that float32 rounding explains at ``PROBE_LOGIT``."""
PROBE_TOLERANCE_HALF = 1.0
"""The same for a model in bfloat16 or float16, whose own forward rounds such logits by up to 0.25."""


def token_logprobs(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    position_N: Tensor,
    target_N: Tensor,
    temperature_N: Tensor,
    *,
    chunk_tokens: int,
    autocast_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the logprob of each target and the entropy of its distribution, float32 in nats, shape [N] each.

    Both have a gradient; that of the entropy costs nothing where it is not used.

    ``position_N`` indexes the flattened [B, T] grid: the position *before* the target, whose hidden state predicts it.
    Logits are divided by the temperature; a logprob at another temperature cannot be derived from this one.

    The rows must be padded on the right, and no attention mask is passed: causal attention never looks at what follows,
    and a mask of ones would switch off the fast attention kernels.
    """
    hidden_NH = hidden_states(model, input_ids_BT, autocast_bf16=autocast_bf16).index_select(0, position_N)
    head = _head(model)
    chunked_head: Callable[..., tuple[Tensor, Tensor]] = ChunkedHead.apply
    return chunked_head(hidden_NH, head.weight, head.bias, target_N, temperature_N, chunk_tokens)


def hidden_states(model: PreTrainedModel, input_ids_BT: Tensor, *, autocast_bf16: bool = False) -> Tensor:
    """Return what the model feeds to its head, flattened to shape [B * T, H]."""
    with torch.autocast(input_ids_BT.device.type, dtype=torch.bfloat16, enabled=autocast_bf16):
        output = _body(model)(input_ids=input_ids_BT, use_cache=False)
    hidden_BTH: Tensor = output.last_hidden_state
    return hidden_BTH.flatten(0, 1)


class ChunkedHead(torch.autograd.Function):
    """Project, divide by the temperature, and take the log-softmax at the target; recompute the logits for backward.

    Stores one number per token, the logsumexp, instead of V logits. Costs one more projection than keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        temperature_N: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """Return logprobs and entropies, shape [N] each."""
        weight32_VH = _wide(weight_VH)
        logprob_N = weight32_VH.new_empty(len(target_N))
        entropy_N = torch.empty_like(logprob_N)
        logsumexp_N = torch.empty_like(logprob_N)
        for chunk in _chunks(len(target_N), chunk_tokens):
            logits_CV = _logits(hidden_NH[chunk], weight32_VH, bias_V, temperature_N[chunk])
            logsumexp_C = logits_CV.logsumexp(-1)
            logprob_CV = logits_CV.sub_(logsumexp_C[:, None])
            logprob_N[chunk] = logprob_CV.gather(-1, target_N[chunk, None]).squeeze(-1)
            entropy_N[chunk] = -torch.linalg.vecdot(logprob_CV.exp(), logprob_CV)
            logsumexp_N[chunk] = logsumexp_C
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, temperature_N, logsumexp_N, entropy_N)
        ctx.chunk_tokens = chunk_tokens
        ctx.set_materialize_grads(False)  # an entropy that nothing uses has no gradient, not one of zeros
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return gradients for hidden states, head weight and head bias.

        d logprob / d logits = (onehot(target) - softmax) / temperature, and d entropy / d logits = -softmax
        (log softmax + entropy) / temperature. The sums over chunks are float32 whatever the dtype of the head: many
        small bfloat16 sums would lose bits.
        """
        hidden_NH, weight_VH, bias_V, target_N, temperature_N, logsumexp_N, entropy_N = ctx.saved_tensors
        grad_logprob_N, grad_entropy_N = grad_outputs
        if grad_logprob_N is None:
            grad_logprob_N = torch.zeros_like(logsumexp_N)
        needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        weight32_VH = _wide(weight_VH)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight32_VH) if needs_weight else None
        grad_bias_V = torch.zeros_like(_wide(bias_V)) if needs_bias else None
        for chunk in _chunks(len(target_N), ctx.chunk_tokens):
            logits_CV = _logits(hidden_NH[chunk], weight32_VH, bias_V, temperature_N[chunk])
            slope_C = grad_logprob_N[chunk] / temperature_N[chunk]
            logprob_CV = logits_CV.sub_(logsumexp_N[chunk, None])
            of_entropy_CV = None
            if grad_entropy_N is not None:
                surprise_CV = (logprob_CV + entropy_N[chunk, None]).mul_(logprob_CV.exp())
                of_entropy_CV = surprise_CV.mul_(-(grad_entropy_N[chunk] / temperature_N[chunk])[:, None])
            grad_logits_CV = logprob_CV.exp_().mul_(-slope_C[:, None])
            grad_logits_CV.scatter_add_(-1, target_N[chunk, None], slope_C[:, None])
            if of_entropy_CV is not None:
                grad_logits_CV += of_entropy_CV
            grad_hidden_NH[chunk] = (grad_logits_CV @ weight32_VH).to(hidden_NH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH.addmm_(grad_logits_CV.T, _wide(hidden_NH[chunk]))
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(0)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        grad_bias = None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_NH, grad_weight, grad_bias, None, None, None


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """Raise unless ``token_logprobs`` gives what the model's own forward gives, on a probe of six tokens.

    The model's forward may do more than hidden states times head: soft-cap logits, scale them, add to them. One
    measurement replaces a list of such architectures: the hidden states are enlarged so that the logits reach
    ``PROBE_LOGIT``, where a soft cap of a freshly initialised model shows too. A second measurement changes the last
    token, which must not move what is predicted before it.

    Raises:
        ValueError: if the head is not a linear layer, the logprobs differ, the attention looks ahead, or the model
            is set to add a routing loss of its own.
    """
    name = type(model).__name__
    head = _head(model)
    if not isinstance(head, nn.Linear) or _body(model) is model:
        raise ValueError(
            f"{name} has the head {type(head).__name__} on {type(_body(model)).__name__}: expected a linear head on a "
            "base model, which can be run in chunks; use a causal language model of transformers"
        )
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"{name} has output_router_logits=true, a routing loss inside the model: expected none, since the policy "
            "loss is computed outside of the model; set it to false in config.json"
        )
    input_ids_BT = torch.arange(1, 7, device=model.device)[None] % model.config.get_text_config().vocab_size
    difference = _probe_difference(model, input_ids_BT)
    tolerance = PROBE_TOLERANCE if head.weight.dtype == torch.float32 else PROBE_TOLERANCE_HALF
    if not difference <= tolerance:
        raise ValueError(
            f"{name} does more after its hidden states than a linear head (logprobs differ by {difference:.3g}): "
            f"expected a difference below {tolerance:g}, which soft-capped or scaled logits do not give; use an "
            "architecture without them"
        )
    changed_BT = input_ids_BT.clone()
    changed_BT[0, -1] = 0
    before_TH = hidden_states(model, input_ids_BT)[:-1]
    after_TH = hidden_states(model, changed_BT)[:-1]
    if not torch.allclose(before_TH, after_TH, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{name} lets a token see those that follow it: expected causal attention, without which the logprob of a "
            "completion has no meaning; use a causal language model"
        )


def _probe_difference(model: PreTrainedModel, input_ids_BT: Tensor) -> float:
    """Return the largest difference between the logprobs of ``token_logprobs`` and of the model's own forward."""
    largest = _head(model)(hidden_states(model, input_ids_BT)).abs().max().clamp(min=1e-6)

    def enlarge(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * (PROBE_LOGIT / largest)
        return output

    target_N = input_ids_BT[0, 1:]
    position_N = torch.arange(len(target_N), device=target_N.device)
    hook = _body(model).register_forward_hook(enlarge)
    try:
        logits_TV = model(input_ids=input_ids_BT, use_cache=False).logits[0, :-1].float()
        found_N, _ = token_logprobs(
            model, input_ids_BT, position_N, target_N, torch.ones(len(target_N), device=target_N.device), chunk_tokens=4
        )
    finally:
        hook.remove()
    expected_N = logits_TV.log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    return float((found_N - expected_N).abs().max())


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the part of the model that gives hidden states."""
    untyped: Any = model
    return cast(nn.Module, untyped.get_decoder())


def _head(model: PreTrainedModel) -> nn.Linear:
    """Return the part of the model that gives logits; ``check_supported`` has made sure that it is linear."""
    untyped: Any = model
    return cast(nn.Linear, untyped.get_output_embeddings())


def _logits(hidden_CH: Tensor, weight32_VH: Tensor, bias_V: Tensor | None, temperature_C: Tensor) -> Tensor:
    """Return the logits of one chunk at their temperatures, shape [C, V]."""
    logits_CV = _wide(hidden_CH) @ weight32_VH.T
    if bias_V is not None:
        logits_CV += _wide(bias_V)
    return logits_CV.div_(temperature_C[:, None])


def _wide(x: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Return slices that cover all tokens; the last one may be shorter."""
    return [slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens)]
