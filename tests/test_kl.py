"""Tests of grpo.kl: values and gradients of the estimators."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.kl import k1, k2, k3, kl_losses, kl_to_sampler, weighted_k3
from grpo.settings import KlConfig
from tests.vectors import NEW, NUM_TOKENS, OLD, REF, SAMPLER, VECTORS, assert_close, gradient, inputs, tokens

GOLDEN: dict[str, Any] = VECTORS["kl"]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_estimators_equal_the_golden_values_and_gradients(name: str) -> None:
    new = NEW.clone().requires_grad_()
    estimate = {"k1": k1, "k2": k2, "k3": k3}[name](REF - new)
    (gradient,) = torch.autograd.grad(estimate.mean(), new)
    assert_close(estimate.detach(), tokens(GOLDEN[name]["per_token"]))
    assert_close(gradient, tokens(GOLDEN[name]["grad_logp_new_token_mean"]))


def test_weighted_k3_has_the_gradient_through_its_ratio() -> None:
    new = NEW.clone().requires_grad_()
    estimate = weighted_k3(new, OLD, REF)
    (gradient,) = torch.autograd.grad(estimate.mean(), new)
    golden = GOLDEN["is_weighted_k3_ratio_vs_old_not_detached"]
    assert_close(estimate.detach(), tokens(golden["per_token"]))
    assert_close(gradient, tokens(golden["grad_logp_new_token_mean"]))
    wrong = GOLDEN["is_weighted_k3_ratio_DETACHED_wrong"]["grad_logp_new_token_mean"]
    assert not torch.allclose(gradient, tokens(wrong))


CATEGORICAL = GOLDEN["categorical"]


def logits_of(name: str) -> Tensor:
    return torch.tensor(CATEGORICAL[name], dtype=torch.float64)


POLICY, BEHAVIOUR = logits_of("logits_pi").log_softmax(-1), logits_of("logits_behaviour_mu").log_softmax(-1)
REFERENCE = logits_of("logits_ref").log_softmax(-1)
RATIO = (POLICY - BEHAVIOUR).exp()
EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "E_pi_grad_k1": lambda own: POLICY.exp() * k1(REFERENCE - own),
    "E_pi_grad_k2": lambda own: POLICY.exp() * k2(REFERENCE - own),
    "E_pi_grad_k3": lambda own: POLICY.exp() * k3(REFERENCE - own),
    "E_mu_grad_k3_no_weight": lambda own: BEHAVIOUR.exp() * k3(REFERENCE - own),
    "E_mu_grad_ratio_k3_not_detached": lambda own: BEHAVIOUR.exp() * weighted_k3(own, BEHAVIOUR, REFERENCE),
    "E_mu_grad_ratio_k3_detached": lambda own: BEHAVIOUR.exp() * RATIO * k3(REFERENCE - own),
    "E_mu_grad_ratio_k1_not_detached": lambda own: BEHAVIOUR.exp() * (own - BEHAVIOUR).exp() * k1(REFERENCE - own),
    "E_mu_grad_ratio_detached_k2": lambda own: BEHAVIOUR.exp() * RATIO * k2(REFERENCE - own),
    "score_function_k1_in_reward": lambda own: POLICY.exp() * k1(REFERENCE - POLICY) * own,
}
"""Golden gradient -> the mean over three outcomes of a loss whose gradient it is; ``own`` has the gradient."""


def test_every_golden_expectation_has_a_case() -> None:
    assert EXPECTED.keys() == CATEGORICAL["expected_gradients_wrt_logits"].keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_expected_gradients_of_the_estimates_equal_the_golden_ones(name: str) -> None:
    """Those of weighted_k3 and of k2 under the policy are the gradient of KL(policy || reference), k3's is not."""
    logits = logits_of("logits_pi").requires_grad_()
    found = gradient(EXPECTED[name](logits.log_softmax(-1)), logits)
    assert_close(found, torch.tensor(CATEGORICAL["expected_gradients_wrt_logits"][name], dtype=torch.float64))
    is_right = name not in ("E_pi_grad_k1", "E_pi_grad_k3", "E_mu_grad_k3_no_weight", "E_mu_grad_ratio_k3_detached")
    assert torch.allclose(found, torch.tensor(CATEGORICAL["grad_KL_pi_ref"], dtype=torch.float64)) is is_right


def test_the_expected_values_of_the_estimates_equal_the_golden_ones() -> None:
    for name, estimate in (("E_pi_k1", k1), ("E_pi_k2", k2), ("E_pi_k3", k3)):
        found = (POLICY.exp() * estimate(REFERENCE - POLICY)).sum().item()
        assert found == pytest.approx(CATEGORICAL["value_expectations"][name], rel=1e-10)
    assert CATEGORICAL["value_expectations"]["E_pi_k3"] == pytest.approx(CATEGORICAL["KL_pi_ref"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "key"),
    [("k1", "k1"), ("k2", "k2"), ("k3", "k3"), ("weighted_k3", "is_weighted_k3_ratio_vs_old_not_detached")],
)
def test_the_kl_in_the_loss_equals_the_golden_values_whatever_the_advantage(name: Any, key: str, sign: float) -> None:
    """With an unknown sampler, so that the ratio of weighted_k3 is that to the proximal policy, as in the vectors."""
    of = inputs(sign=sign)
    of = replace(of, sampling_logprobs_N=of.sampling_logprobs_N * math.nan)
    found = kl_losses(of, REF, KlConfig(name=name, coef=0.5, ratio_cap=None))
    assert_close(found.detach(), 0.5 * tokens(GOLDEN[key]["per_token"]))
    slope = gradient(found / NUM_TOKENS, of.trainer_logprobs_N)
    assert_close(slope, 0.5 * tokens(GOLDEN[key]["grad_logp_new_token_mean"]))


@pytest.mark.parametrize("proximal", [OLD, SAMPLER])
@pytest.mark.parametrize("ratio_cap", [None, 1.5])
def test_the_ratio_of_weighted_k3_is_that_to_the_sampler_up_to_its_cap(
    ratio_cap: float | None, proximal: Tensor
) -> None:
    """Whatever the proximal policy is."""
    of = inputs(proximal=proximal)
    slope = gradient(kl_losses(of, REF, KlConfig(coef=1.0, ratio_cap=ratio_cap)), of.trainer_logprobs_N)
    ratio = (NEW - SAMPLER).exp()
    assert_close(slope, ratio.clamp(max=ratio_cap or math.inf) * (NEW - REF))
    assert (ratio > 1.5).any()
    assert (ratio < 1.5).any()


def test_kl_to_sampler_equals_the_golden_value_and_has_no_gradient() -> None:
    new = NEW.clone().requires_grad_()
    estimate = kl_to_sampler(new, SAMPLER)
    metrics = VECTORS["off_policy"]["metrics_new_vs_sampler"]
    assert estimate.mean().item() == pytest.approx(metrics["kl_k3_sampler_to_new"], rel=1e-10)
    assert not estimate.requires_grad


def test_kl_of_equal_policies_is_exactly_zero() -> None:
    assert kl_to_sampler(NEW, NEW).abs().max() == 0
    assert weighted_k3(NEW, NEW, NEW).abs().max() == 0


def test_k3_keeps_its_digits_at_small_ratios_in_float32() -> None:
    found = k3(torch.tensor([1e-4], dtype=torch.float32)).item()
    assert found == pytest.approx(math.expm1(1e-4) - 1e-4, rel=0.02)


def test_k3_of_an_enormous_ratio_is_finite() -> None:
    assert torch.isfinite(k3(torch.tensor([1e9, -1e9]))).all()
