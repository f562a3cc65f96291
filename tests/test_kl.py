"""Tests of grpo.kl: values and gradients of the estimators."""

import math
from typing import Any

import pytest
import torch

from grpo.kl import k1, k2, k3, kl_to_sampler, weighted_k3
from tests.vectors import NEW, OLD, REF, SAMPLER, VECTORS, assert_close, tokens

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


def test_weighted_k3_expects_the_gradient_of_the_kl_to_the_reference() -> None:
    golden = GOLDEN["categorical"]
    logits = torch.tensor(golden["logits_pi"], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(golden["logits_ref"], dtype=torch.float64).log_softmax(-1)
    behaviour = torch.tensor(golden["logits_behaviour_mu"], dtype=torch.float64).log_softmax(-1)
    expected_value = (behaviour.exp() * weighted_k3(logits.log_softmax(-1), behaviour, ref)).sum()
    (gradient,) = torch.autograd.grad(expected_value, logits)
    assert_close(gradient, torch.tensor(golden["grad_KL_pi_ref"], dtype=torch.float64))


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
