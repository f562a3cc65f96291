"""Tests of grpo.losses: the clipped objective, its reasons, and the shares of the loss."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grpo.losses.base import LossInputs, TokenLosses, importance_ratio, weigh_tokens
from grpo.losses.chosen import LOSSES
from grpo.losses.clip import ppo_clip
from grpo.losses.options import CustomLoss, LossConfig, PpoClip

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "grpo_vectors.json").read_text())
GOLDEN: dict[str, Any] = VECTORS["losses"]
FIXTURE: dict[str, Any] = GOLDEN["fixture"]
MASK = torch.tensor(FIXTURE["mask"], dtype=torch.bool)
ROW = MASK.nonzero()[:, 0]
ROW_TOKENS = MASK.sum(1).double()
NUM_TOKENS = float(GOLDEN["active_tokens"])

BOUNDS: dict[str, dict[str, Any]] = {
    "ppo_clip_sym": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "ppo_clip_higher": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None},
    "ppo_dual_clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "ppo_delta_3": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "ratio_pg_no_clip": {"clip_low": None, "clip_high": None, "dual_clip": None},
}


def tokens(values: Any) -> Tensor:
    """Return the trainable tokens of the fixture, laid end to end, in float64."""
    return torch.tensor(values, dtype=torch.float64)[MASK]


NEW, OLD = tokens(FIXTURE["logp_new"]), tokens(FIXTURE["logp_old"])
ADVANTAGE = torch.tensor(FIXTURE["advantage"], dtype=torch.float64)[ROW]
ONE_WEIGHT = torch.ones_like(ADVANTAGE)


def clipped(new: Tensor, old: Tensor, advantage: Tensor, **bounds: Any) -> TokenLosses:
    """Return what the clip makes of tokens; all stand in one row, which no clip looks at."""
    row = torch.zeros(len(new), dtype=torch.int64)
    return ppo_clip(LossInputs(new, old, torch.full_like(old, float("nan")), advantage, row, 1), PpoClip(**bounds))


def clipped_ratios(ratio: list[float], advantage: list[float], **bounds: float | None) -> TokenLosses:
    """Return what the clip makes of tokens with these importance ratios."""
    new = torch.tensor(ratio, dtype=torch.float64).log()
    return clipped(new, torch.zeros_like(new), torch.tensor(advantage, dtype=torch.float64), **bounds)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare at the tolerance of the vectors."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def loss_and_gradient(bounds: dict[str, Any], denominator_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the fixture and its gradient for the current logprobs."""
    new = NEW.clone().requires_grad_()
    surrogate = clipped(new, OLD, ADVANTAGE, **bounds).loss_N
    loss = weigh_tokens(surrogate, ONE_WEIGHT, denominator_B, ROW).sum()
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient


@pytest.mark.parametrize("variant", BOUNDS)
def test_token_losses_equal_the_golden_values(variant: str) -> None:
    found = clipped(NEW, OLD, ADVANTAGE, **BOUNDS[variant])
    assert_close(found.loss_N, tokens(GOLDEN["variants"][variant]["per_token_loss_valid_else_0"]))


@pytest.mark.parametrize("variant", BOUNDS)
@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean_active"])
def test_loss_and_gradient_equal_the_golden_values(variant: str, mode: str) -> None:
    denominator = {
        "token_mean": torch.full((4,), NUM_TOKENS, dtype=torch.float64),
        "seq_mean_token_mean_active": 3 * ROW_TOKENS,
    }[mode]
    loss, gradient = loss_and_gradient(BOUNDS[variant], denominator)
    golden = GOLDEN["variants"][variant]
    assert loss.item() == pytest.approx(golden["scalar"][mode], rel=1e-10)
    assert_close(gradient, tokens(golden["grad_logp_new"][mode]))


@pytest.mark.parametrize(
    ("mode", "denominator"),
    [
        ("seq_mean_token_mean_all", 4 * ROW_TOKENS),
        ("seq_mean_token_sum_all", torch.full((4,), 4.0)),
        ("dr_grpo", torch.full((4,), 4.0 * FIXTURE["L_max"])),
        ("prompt_mean", 2 * torch.tensor([8.0, 8.0, 2.0, 2.0])),
        ("token_sum", torch.ones(4)),
    ],
)
def test_a_denominator_per_row_gives_every_other_mean(mode: str, denominator: Tensor) -> None:
    loss, _ = loss_and_gradient(BOUNDS["ppo_clip_higher"], denominator.double())
    assert loss.item() == pytest.approx(GOLDEN["variants"]["ppo_clip_higher"]["scalar"][mode], rel=1e-10)


def test_on_policy_every_token_has_the_gradient_of_its_advantage() -> None:
    new = OLD.clone().requires_grad_()
    surrogate = clipped(new, OLD, ADVANTAGE, clip_low=0.2, clip_high=0.28, dual_clip=4.0).loss_N
    (gradient,) = torch.autograd.grad(surrogate.sum() / NUM_TOKENS, new)
    assert_close(gradient, -ADVANTAGE / NUM_TOKENS)


def test_a_clip_around_the_sampler_equals_the_golden_values() -> None:
    """The ratio to the sampler already holds what a correction would weigh (bypass)."""
    golden = VECTORS["off_policy"]["bypass_ppo_clip_higher_vs_sampler"]
    new = NEW.clone().requires_grad_()
    found = clipped(new, tokens(FIXTURE["logp_sampler"]), ADVANTAGE, dual_clip=None)
    assert_close(found.loss_N, tokens(golden["per_token_loss"]))
    (gradient,) = torch.autograd.grad(found.loss_N.sum() / NUM_TOKENS, new)
    assert_close(gradient, tokens(golden["grad_logp_new"]))


def test_one_side_can_be_left_unclipped() -> None:
    found = clipped_ratios([2.0, 0.1, 0.1], [1.0, -1.0, 1.0], clip_low=0.2, clip_high=None, dual_clip=None)
    assert found.loss_N.tolist() == pytest.approx([-2.0, 0.8, -0.1])
    assert {name: held.tolist() for name, held in found.reasons.items()} == {
        "clipped_low": [False, True, False],
        "clipped_high": [False, False, False],
        "dual_clip": [False, False, False],
    }


def test_dual_clip_leaves_positive_advantages_alone() -> None:
    found = clipped_ratios([9.0, 9.0, 2.0], [1.0, -1.0, -1.0], clip_low=None, clip_high=None, dual_clip=3.0)
    assert found.loss_N.tolist() == pytest.approx([-9.0, 3.0, 2.0])
    assert found.reasons["dual_clip"].tolist() == [False, True, False]


def test_clipped_tokens_are_those_of_the_side_that_the_sign_makes_active() -> None:
    """Ratios to the proximal policy 1.35 and 1.65 with A > 0, and .66 with A < 0; to the sampler others are out."""
    reasons = clipped(NEW, OLD, ADVANTAGE, clip_low=0.2, clip_high=0.28).reasons
    found = {name: held.nonzero().flatten().tolist() for name, held in reasons.items()}
    assert found == {"clipped_low": [6], "clipped_high": [1, 4], "dual_clip": []}
    golden = tokens(GOLDEN["variants"]["ppo_clip_higher"]["grad_logp_new"]["token_mean"])
    assert (golden == 0).nonzero().flatten().tolist() == [1, 4, 6]


@pytest.mark.parametrize("off", [{"clip_low": "none", "clip_high": "none"}, {"clip_low": 10.0, "clip_high": 10.0}])
def test_a_config_can_switch_the_clip_off_or_open_it_wide(off: dict[str, Any]) -> None:
    """Bounds of 10 are those of DeepSeek-R1: no ratio is negative, and none here is over 11."""
    found = clipped(NEW, OLD, ADVANTAGE, **off, dual_clip="none")
    assert_close(found.loss_N, tokens(GOLDEN["variants"]["ratio_pg_no_clip"]["per_token_loss_valid_else_0"]))
    assert not torch.stack(list(found.reasons.values())).any()


@pytest.mark.parametrize("variant", BOUNDS)
def test_tokens_with_a_reason_are_those_without_gradient(variant: str) -> None:
    new = NEW.clone().requires_grad_()
    found = clipped(new, OLD, ADVANTAGE, **BOUNDS[variant])
    (gradient,) = torch.autograd.grad(found.loss_N.sum(), new)
    reasons = torch.stack(list(found.reasons.values()))
    assert torch.equal(reasons.any(0), gradient == 0)
    assert reasons.any() == (variant != "ratio_pg_no_clip")


def test_an_enormous_ratio_is_finite_and_has_no_gradient() -> None:
    new = torch.tensor([0.0, -1e4, -1.0], requires_grad=True)
    ratio = importance_ratio(new, torch.tensor([-1e4, 0.0, -1.0]))
    (gradient,) = torch.autograd.grad(ratio.sum(), new)
    assert torch.isfinite(ratio).all()
    assert gradient.tolist() == [0.0, 0.0, 1.0]


def test_weight_zero_silences_a_loss_that_is_not_finite() -> None:
    loss = torch.tensor([float("nan"), float("inf"), 2.0])
    found = weigh_tokens(loss, torch.tensor([0.0, 0.0, 0.5]), torch.tensor([4.0]), torch.zeros(3, dtype=torch.int64))
    assert found.tolist() == [0.0, 0.0, 0.25]


def test_partial_sums_over_the_global_denominator_add_up_to_the_token_mean() -> None:
    golden = VECTORS["normalisation"]
    rows = [torch.tensor(row) for row in golden["per_token_loss"]]
    sums = []
    for first, second in golden["micro_batches_2x2"]:
        loss = torch.cat([rows[first], rows[second]])
        row = torch.tensor([0] * len(rows[first]) + [1] * len(rows[second]))
        denominator = torch.full((2,), float(golden["token_total"]))
        sums.append(weigh_tokens(loss, torch.ones_like(loss), denominator, row).sum().item())
    assert sums == pytest.approx(golden["correct_partial_sums_2x2_divided_by_global_tokens"])
    assert sum(sums) == pytest.approx(golden["token_mean_correct"])
    assert sum(sums) != pytest.approx(golden["WRONG_mean_of_micro_batch_token_means_2x2"])


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        ({"clip_low": -0.1, "clip_high": 0.2}, "clip_low"),
        ({"clip_low": 0.2, "clip_high": -0.2}, "clip_high"),
        ({"clip_low": 0.2, "clip_high": 0.5, "dual_clip": 1.5}, "dual_clip"),
    ],
)
def test_a_bound_that_cannot_be_meant_is_refused(bounds: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PpoClip(**bounds)


def test_every_loss_that_a_config_can_name_has_a_function() -> None:
    """Its options say how it is called."""
    options = [loss for loss in get_args(get_args(LossConfig)[0]) if get_args(loss)[0] is not CustomLoss]
    assert [get_args(loss)[1].tag for loss in options] == list(LOSSES)
    assert [get_args(loss)[0]().name for loss in options] == list(LOSSES)
