"""Tests of grpo.logprobs: the chunked head against plain log-softmax and against the models' own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo.logprobs import ChunkedHead, check_supported, token_logprobs
from tests.vectors import VECTORS

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait

GOLDEN: dict[str, Any] = VECTORS["logprobs"]
VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(model_type: str, **options: Any) -> PreTrainedModel:
    """Return a small random model in evaluation mode; the same arguments give the same weights."""
    torch.manual_seed(7)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **SIZES | options))
    # Biases and norms start at 0 and 1, where forgetting them would show nowhere.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy: PreTrainedModel = model.eval()
    return policy


INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 0]])
POSITION = torch.tensor([1, 2, 4, 6, 9])
TARGET = torch.tensor([4, 1, 9, 6, 5])
TEMPERATURE = torch.tensor([1.0, 1.0, 1.0, 0.6, 0.6])


def chunked(model: PreTrainedModel, chunk_tokens: int = 2, input_ids: Tensor = INPUT_IDS) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of the fixture's targets."""
    return token_logprobs(model, input_ids, POSITION, TARGET, TEMPERATURE, chunk_tokens=chunk_tokens)


def expected_logprobs(model: PreTrainedModel) -> Tensor:
    """Return the same logprobs from the model's own forward."""
    logits = model(input_ids=INPUT_IDS).logits.flatten(0, 1)[POSITION] / TEMPERATURE[:, None]
    chosen: Tensor = logits.log_softmax(-1)[torch.arange(len(TARGET)), TARGET]
    return chosen


def gradients(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a fixed weighing of the logprobs, by parameter name."""
    parameters = dict(model.named_parameters())
    weighed = (logprobs * torch.linspace(-1, 2, len(logprobs))).sum()
    found = torch.autograd.grad(weighed, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


@pytest.mark.parametrize("temperature", GOLDEN["cases"])
def test_logprob_entropy_and_gradient_equal_the_golden_values(temperature: str) -> None:
    logits = torch.tensor(GOLDEN["logits"], requires_grad=True)
    target = torch.tensor(GOLDEN["token"])
    heat = torch.full((3,), float(temperature))
    logprob, entropy = ChunkedHead.apply(logits, torch.eye(4), None, target, heat, 2)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    golden = GOLDEN["cases"][temperature]
    torch.testing.assert_close(logprob.detach(), torch.tensor(golden["logprob"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(entropy.detach(), torch.tensor(golden["entropy"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(golden["grad_logprob_wrt_logits"]), rtol=2e-5, atol=1e-6)
    if temperature == "0.6":
        assert not torch.allclose(logprob, torch.tensor(GOLDEN["WRONG_dividing_logprob_by_T0.6"]), rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("phi", {}),
        ("gemma3_text", {"head_dim": 8}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)
def test_logprobs_and_gradients_equal_those_of_the_unmodified_forward(name: str, options: dict[str, Any]) -> None:
    model = tiny(name, **options)
    check_supported(model)
    logprobs, _ = chunked(model)
    torch.testing.assert_close(logprobs, expected_logprobs(model), rtol=2e-5, atol=2e-6)
    found, expected = gradients(model, logprobs), gradients(model, expected_logprobs(model))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 100])
def test_chunk_size_changes_nothing(chunk_tokens: int) -> None:
    model = tiny("phi")
    expected, expected_entropy = chunked(model, 2)
    found, entropy = chunked(model, chunk_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-6, atol=1e-6)
    expected_gradients = gradients(model, expected)
    for key, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-5, atol=1e-6, msg=key)


def test_padding_on_the_right_changes_nothing() -> None:
    model = tiny("qwen2")
    position = torch.tensor([1, 2, 4])
    narrow, _ = token_logprobs(model, INPUT_IDS[:1], position, TARGET[:3], TEMPERATURE[:3], chunk_tokens=8)
    padded_ids = nn.functional.pad(INPUT_IDS[:1], (0, 5), value=7)
    padded, _ = token_logprobs(model, padded_ids, position, TARGET[:3], TEMPERATURE[:3], chunk_tokens=8)
    torch.testing.assert_close(padded, narrow, rtol=1e-6, atol=1e-6)


def test_no_target_at_all_leaves_a_graph_with_zero_gradients() -> None:
    model = tiny("qwen2")
    nothing = torch.empty(0, dtype=torch.int64)
    logprobs, entropy = token_logprobs(model, INPUT_IDS, nothing, nothing, torch.empty(0), chunk_tokens=2)
    assert logprobs.shape == entropy.shape == (0,)
    torch.autograd.backward(logprobs.sum())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
def test_the_gradient_of_the_entropy_is_that_of_the_unmodified_forward(chunk_tokens: int) -> None:
    """In float64 throughout, alone and beside the gradient of the logprobs."""
    model = tiny("phi").double()

    def whole() -> tuple[Tensor, Tensor]:
        logits = model(input_ids=INPUT_IDS).logits.flatten(0, 1)[POSITION] / TEMPERATURE.double()[:, None]
        every = logits.log_softmax(-1)
        return every[torch.arange(len(TARGET)), TARGET], -(every.exp() * every).sum(-1)

    for combine in (lambda logprob, entropy: entropy, lambda logprob, entropy: 3 * entropy - logprob):
        found = gradients(model, combine(*chunked(model, chunk_tokens)))
        for key, expected in gradients(model, combine(*whole())).items():
            torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("temperature", GOLDEN["cases"])
def test_in_float64_the_golden_values_hold_to_their_last_digits(temperature: str) -> None:
    logits = torch.tensor(GOLDEN["logits"], dtype=torch.float64, requires_grad=True)
    heat = torch.full((3,), float(temperature), dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64)
    logprob, entropy = ChunkedHead.apply(logits, identity, None, torch.tensor(GOLDEN["token"]), heat, 2)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    for found, name in ((logprob, "logprob"), (entropy, "entropy"), (gradient, "grad_logprob_wrt_logits")):
        expected = torch.tensor(GOLDEN["cases"][temperature][name], dtype=torch.float64)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_bfloat16_head_is_computed_in_float32() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(600, 16).bfloat16(), torch.randn(30, 16).bfloat16()
    target, heat = torch.arange(600) % 30, torch.ones(600)
    leaf, leaf32 = weight.clone().requires_grad_(), weight.float().requires_grad_()
    logprob, _ = ChunkedHead.apply(hidden, leaf, None, target, heat, 1)  # type: ignore[no-untyped-call]
    expected = (hidden.float() @ leaf32.T).log_softmax(-1)[torch.arange(600), target]
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob, expected.detach(), rtol=2e-5, atol=2e-6)
    torch.autograd.backward(logprob.sum())
    torch.autograd.backward(expected.sum())
    # Only the final rounding to bfloat16 remains; sums of 600 bfloat16 terms would be off by far more.
    assert leaf.grad is not None
    assert leaf32.grad is not None
    torch.testing.assert_close(leaf.grad.float(), leaf32.grad, rtol=0.004, atol=0.004)


def test_autocast_keeps_logprobs_near_those_of_float32() -> None:
    model = tiny("qwen2")
    expected, _ = chunked(model)
    found, _ = token_logprobs(model, INPUT_IDS, POSITION, TARGET, TEMPERATURE, chunk_tokens=2, autocast_bf16=True)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [("gemma2", {"head_dim": 8}), ("granite", {"logits_scaling": 4.0}), ("bert", {"is_decoder": True})],
)
def test_a_forward_that_does_more_than_a_linear_head_is_refused(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model: Any = tiny(name, **options)
    model.to(dtype)
    with pytest.raises(ValueError, match=r"more after its hidden states.*expected.*use an architecture"):
        check_supported(model)


def test_the_soft_cap_of_a_fresh_model_is_refused_although_its_logits_are_small() -> None:
    torch.manual_seed(7)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model("gemma2", **SIZES, head_dim=8))
    with pytest.raises(ValueError, match="more after its hidden states"):
        check_supported(model.eval())


def test_a_bfloat16_model_is_supported_although_its_own_logits_are_rounded() -> None:
    model: Any = tiny("qwen2")
    check_supported(model.to(torch.bfloat16))


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny("llama")
    module: Any
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(ValueError, match="see those that follow it: expected causal"):
        check_supported(model)


def test_a_routing_loss_inside_the_model_is_refused() -> None:
    check_supported(tiny("mixtral", num_local_experts=2))
    with pytest.raises(ValueError, match=r"output_router_logits=true.*expected none"):
        check_supported(tiny("mixtral", num_local_experts=2, output_router_logits=True))


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = tiny("qwen2")
    before, _ = chunked(model)
    check_supported(model)
    assert torch.equal(chunked(model)[0], before)
