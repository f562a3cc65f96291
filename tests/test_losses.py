"""Tests of grpo.losses: each loss against the golden numbers, its reasons, and the shares of a step's loss."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.aggregation import AGGREGATIONS, StepRows
from grpo.losses.base import LossInputs, TokenLosses, bounded_exp, weigh_tokens
from grpo.losses.chosen import token_losses
from grpo.losses.clip import ppo_clip
from grpo.losses.options import LOSSES, OF_ROWS, TO_SAMPLER, LossOptions
from grpo.options import given, options_of
from grpo.settings import UpdateConfig
from tests.vectors import (
    ADVANTAGE,
    FIXTURE,
    NEW,
    NUM_ROWS,
    NUM_TOKENS,
    OLD,
    PROMPT,
    ROW,
    ROW_TOKENS,
    SAMPLER,
    VECTORS,
    assert_close,
    gradient,
    inputs,
    tokens,
)

GOLDEN: dict[str, Any] = VECTORS["losses"]
PROXIMAL = {name: SAMPLER if name in TO_SAMPLER else OLD for name in LOSSES} | {"vespo": OLD}
"""That of the golden values, which have vespo's ratio to the proximal policy."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "reinforce": ("reinforce", {}),
    "ratio_pg_no_clip": ("ppo_clip", {"clip_low": "none", "clip_high": "none", "dual_clip": "none"}),
    "ppo_clip_sym": ("ppo_clip", {"clip_high": 0.2, "dual_clip": "none"}),
    "ppo_clip_higher": ("ppo_clip", {"dual_clip": "none"}),
    "ppo_dual_clip": ("ppo_clip", {"clip_high": 0.2, "dual_clip": 3.0}),
    "ppo_delta_3": ("ppo_clip", {"clip_high": 0.2, "dual_clip": 3.0}),
    "cispo_rel_low1_high0.28": ("cispo", {"ratio_cap": 1.28}),
    "cispo_abs_cap5": ("cispo", {}),
    "cispo_rel_low0.2_high0.2": ("cispo", {"ratio_floor": 0.8, "ratio_cap": 1.2}),
    "sapo": ("sapo", {}),
    "gspo_paper_eps": ("gspo", {}),
    "gspo_wide_eps": ("gspo", {"clip_low": 0.2, "clip_high": 0.2}),
    "gspo_token_wide_eps": ("gspo_token", {"clip_low": 0.2, "clip_high": 0.2}),
    "gmpo": ("gmpo", {}),
    "dppo_binary_tv": ("dppo_tv", {}),
    "dppo_tv_ratio_plus_k2_sampler": ("dppo_k2", {}),
    "vespo": ("vespo", {}),
    "topr_vs_sampler": ("topr", {}),
    "luffy_shaping": ("luffy", {}),
    "luspo": ("luspo", {}),
}
"""Variant of the golden numbers -> the loss in a config, and its options."""

MEANS = {
    "token_mean": ("token_mean", 3),
    "seq_mean_token_mean_all": ("row_mean", 4),
    "seq_mean_token_mean_active": ("row_mean", 3),
    "seq_mean_token_sum_all": ("row_sum", 4),
    "dr_grpo": ("constant_length", 4),
    "prompt_mean": ("prompt_mean", 3),
    "token_sum": ("token_sum", 3),
}
"""Mean of the golden numbers -> the aggregation in a config, and how many of the four rows it counts."""


def golden_loss(
    variant: str, sign: float = 1.0, dtype: torch.dtype = torch.float64, on_policy: bool = False
) -> tuple[LossInputs, TokenLosses]:
    """Return the fixture, and what the variant's loss makes of it, chosen and set up as a config does."""
    name, options = CASES[variant]
    of = inputs(proximal=NEW if on_policy else PROXIMAL[name], sign=sign, dtype=dtype)
    table = {"proximal": "sampler" if name in TO_SAMPLER else "update", "loss": {"name": name, **options}}
    return of, token_losses(of, UpdateConfig.model_validate(table).loss)


def mean_of(loss_N: Tensor, aggregation: str, num_rows: int) -> Tensor:
    """Return the loss of an optimizer step of the fixture's first rows."""
    rows = StepRows(ROW_TOKENS[:num_rows].numpy(), PROMPT[:num_rows].numpy(), constant=FIXTURE["L_max"])
    denominator_B = torch.from_numpy(np.asarray(AGGREGATIONS[aggregation](rows))).to(loss_N.dtype)
    return weigh_tokens(loss_N, torch.ones_like(loss_N), denominator_B, ROW).sum()


def test_every_variant_and_every_loss_has_a_case() -> None:
    assert CASES.keys() == GOLDEN["variants"].keys()
    assert MEANS.keys() == GOLDEN["aggregation_modes"].keys()
    assert {name for name, _ in CASES.values()} | {"dppo_kl"} == LOSSES.keys()  # dppo_kl: by hand, below


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", CASES)
def test_losses_their_means_and_gradients_equal_the_golden_values(variant: str, dtype: torch.dtype) -> None:
    golden = GOLDEN["variants"][variant]
    _, found = golden_loss(variant, dtype=dtype)
    assert_close(found.loss_N.detach(), tokens(golden["per_token_loss_valid_else_0"], dtype))
    for mode, expected in golden["scalar"].items():
        assert_close(mean_of(found.loss_N, *MEANS[mode]).detach(), torch.tensor(expected, dtype=dtype))
    for mode, expected in golden["grad_logp_new"].items():
        of, found = golden_loss(variant, dtype=dtype)
        loss = mean_of(found.loss_N, *MEANS[mode])
        assert_close(gradient(loss, of.trainer_logprobs_N), tokens(expected, dtype))


@pytest.mark.parametrize("variant", CASES)
def test_on_policy_every_token_has_the_gradient_of_its_advantage(variant: str) -> None:
    """Under the mean that the loss is made for; LUFFY's shaping has no ratio that could be 1."""
    of, found = golden_loss(variant, on_policy=True)
    name, _ = CASES[variant]
    loss = mean_of(found.loss_N, *(("row_mean", 3) if name in OF_ROWS else ("token_mean", 3)))
    expected = -ADVANTAGE / (3 * ROW_TOKENS[ROW] if name in OF_ROWS else NUM_TOKENS)
    if name == "luspo":
        expected = expected * ROW_TOKENS[ROW]
    if name == "luffy":
        p = NEW.exp()
        expected = expected * 0.1 * p / (p + 0.1) ** 2
    if variant == "cispo_rel_low0.2_high0.2":
        assert not torch.stack(list(found.bounds.values())).any()
    assert_close(gradient(loss, of.trainer_logprobs_N), expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("variant", CASES)
def test_tokens_with_a_reason_are_those_without_gradient(variant: str, sign: float) -> None:
    of, found = golden_loss(variant, sign)
    slope = gradient(found.loss_N, of.trainer_logprobs_N)
    silent = torch.stack([torch.zeros_like(slope, dtype=torch.bool), *found.reasons.values()]).any(0)
    assert torch.equal(silent, slope == 0)
    assert all(held_N.dtype == torch.bool and held_N.shape == slope.shape for held_N in found.bounds.values())


def test_what_each_loss_says_of_the_fixture() -> None:
    """Ratios to the proximal policy 1.35 and 1.65 with A > 0, and .66 with A < 0."""

    def said(variant: str, sign: float = 1.0) -> dict[str, list[int]]:
        _, found = golden_loss(variant, sign)
        every = {**found.reasons, **found.bounds}
        return {name: held.nonzero().flatten().tolist() for name, held in every.items() if held.any()}

    assert said("ppo_clip_higher") == {"clipped_low": [6], "clipped_high": [1, 4]}
    assert said("ppo_dual_clip") == {"clipped_low": [6], "clipped_high": [1, 4], "dual_clip": [7]}
    assert said("cispo_rel_low0.2_high0.2") == {"ratio_floor": [2, 6], "ratio_cap": [1, 4, 5, 7]}
    assert said("gspo_wide_eps", -1.0) == {"clipped_high": [5, 6, 7]}
    assert said("gspo_paper_eps") == {"clipped_high": [0, 1, 2, 3, 4]}
    assert said("luspo") == said("gspo_paper_eps")
    assert said("gmpo") == {"clipped_low": [6], "clipped_high": [4]}
    assert said("dppo_binary_tv") == {"clipped_high": [4]}
    assert said("topr_vs_sampler") == {"ratio_cap": [5, 6, 7]}
    assert said("sapo") == said("reinforce") == said("vespo") == said("luffy_shaping") == {}


def test_a_clip_around_the_sampler_equals_the_golden_values() -> None:
    """The ratio to the sampler already holds what a correction would weigh (bypass)."""
    golden = VECTORS["off_policy"]["bypass_ppo_clip_higher_vs_sampler"]
    of = inputs(proximal=SAMPLER)
    loss = ppo_clip(of, dual_clip=None).loss_N
    assert_close(loss.detach(), tokens(golden["per_token_loss"]))
    assert loss.mean().item() == pytest.approx(golden["token_mean"], rel=1e-10)
    assert_close(gradient(loss / NUM_TOKENS, of.trainer_logprobs_N), tokens(golden["grad_logp_new"]))


def clipped_ratios(ratio: list[float], advantage: list[float], **bounds: float | None) -> TokenLosses:
    """Return what the clip makes of tokens with these importance ratios; all stand in one row."""
    new = torch.tensor(ratio, dtype=torch.float64).log()
    row = torch.zeros(len(new), dtype=torch.int64)
    old = torch.zeros_like(new)
    return ppo_clip(LossInputs(new, old, old, torch.tensor(advantage, dtype=torch.float64), row, 1), **bounds)


def test_one_side_can_be_left_unclipped() -> None:
    found = clipped_ratios([2.0, 0.1, 0.1], [1.0, -1.0, 1.0], clip_low=0.2, clip_high=None, dual_clip=None)
    assert found.loss_N.tolist() == pytest.approx([-2.0, 0.8, -0.1])
    assert {name: held.tolist() for name, held in found.reasons.items()} == {
        "clipped_low": [False, True, False],
        "clipped_high": [False, False, False],
    }


def test_dual_clip_leaves_positive_advantages_alone() -> None:
    found = clipped_ratios([9.0, 9.0, 2.0], [1.0, -1.0, -1.0], clip_low=None, clip_high=None, dual_clip=3.0)
    assert found.loss_N.tolist() == pytest.approx([-9.0, 3.0, 2.0])
    assert found.reasons["dual_clip"].tolist() == [False, True, False]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("delta", [1.5, 3.0])
def test_dual_clip_is_the_delta_of_intellect_2(delta: float, sign: float) -> None:
    """`min(min(r, delta) A, clip(r) A)`, arXiv:2505.07291, as its paper writes it."""
    of, again = inputs(sign=sign), inputs(sign=sign)
    loss = ppo_clip(of, clip_high=0.28, dual_clip=delta).loss_N
    ratio, advantage = again.ratio_N, again.advantage_N
    expected = -torch.minimum(ratio.clamp(max=delta) * advantage, ratio.clamp(0.8, 1.28) * advantage)
    assert_close(loss.detach(), expected.detach())
    assert_close(gradient(loss, of.trainer_logprobs_N), gradient(expected, again.trainer_logprobs_N))


def test_bounds_of_10_clip_no_ratio_here() -> None:
    """Those of DeepSeek-R1: no ratio is negative, and none here is over 11."""
    found = ppo_clip(inputs(), clip_low=10.0, clip_high=10.0, dual_clip=None)
    assert_close(found.loss_N.detach(), tokens(GOLDEN["variants"]["ratio_pg_no_clip"]["per_token_loss_valid_else_0"]))
    assert not torch.stack(list(found.reasons.values())).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dppo_kl_stops_tokens_by_the_divergence_of_two_outcomes(sign: float) -> None:
    """KL(q || p) of "this token or another", by hand from the probabilities; only away from q, and not back."""
    of = inputs(sign=sign)
    name, low, high = "dppo_kl", 0.02, 0.06
    found = LOSSES[name](of, low=low, high=high)
    p, q = NEW.exp(), OLD.exp()
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    low_N = (of.advantage_N < 0) & (p < q) & (divergence > low)
    high_N = (of.advantage_N > 0) & (p > q) & (divergence > high)
    assert torch.equal(found.reasons["clipped_low"], low_N)
    assert torch.equal(found.reasons["clipped_high"], high_N)
    assert low_N.any() or high_N.any()
    weight = torch.where(low_N | high_N, 0.0, p / q)
    assert_close(gradient(found.loss_N, of.trainer_logprobs_N), -weight * of.advantage_N)


def test_a_probability_of_one_has_a_finite_divergence() -> None:
    sure, row = torch.tensor([0.0, -1e-9, -3.0]), torch.tensor([0, 0, 0])
    found = LOSSES["dppo_kl"](LossInputs(sure, sure.flip(0), sure, torch.ones(3), row, 1))
    assert torch.isfinite(found.loss_N).all()


@pytest.mark.parametrize(
    ("name", "option", "changed"),
    [
        *[("ppo_clip", option, value) for option, value in (("clip_low", 0.5), ("clip_high", 0.5), ("dual_clip", 2.0))],
        *[("cispo", option, value) for option, value in (("ratio_cap", 1.1), ("ratio_floor", 0.9))],
        *[("sapo", option, 2.0) for option in ("temperature", "temperature_negative")],
        *[(name, option, 0.3) for name in ("gspo", "gspo_token", "luspo") for option in ("clip_low", "clip_high")],
        *[("gmpo", option, 0.1) for option in ("clip_low", "clip_high")],
        *[(name, option, 0.001) for name in ("dppo_tv", "dppo_kl", "dppo_k2") for option in ("low", "high")],
        *[(name, "ratio_cap", 1.1) for name in ("dppo_tv", "dppo_kl")],
        ("dppo_k2", "k2_coef", 1.0),
        *[("vespo", option, 1.0) for option in ("power", "decay", "power_negative", "decay_negative")],
        ("luffy", "gamma", 0.5),
    ],
)
def test_each_option_reaches_the_arithmetic(name: str, option: str, changed: float) -> None:
    """Through the config; with both signs, as most options act for one."""

    def slopes(options: dict[str, float]) -> Tensor:
        table = {"proximal": "sampler" if name in TO_SAMPLER else "update", "loss": {"name": name, **options}}
        config = UpdateConfig.model_validate(table)
        every = [inputs(proximal=PROXIMAL[name], sign=sign) for sign in (1.0, -1.0)]
        return torch.cat([gradient(token_losses(of, config.loss).loss_N, of.trainer_logprobs_N) for of in every])

    assert not torch.equal(slopes({}), slopes({option: changed}))


def test_every_option_is_among_those_that_reach_the_arithmetic() -> None:
    """A new option needs a line in the test above."""
    (mark,) = test_each_option_reaches_the_arithmetic.pytestmark  # type: ignore[attr-defined]
    tested = {(name, option) for name, option, _ in mark.args[1]}
    options = {(name, option) for name, loss in LOSSES.items() for option in (loss.__kwdefaults__ or {})}
    assert tested == options


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_has_the_same_loss_alone_and_among_others(name: str) -> None:
    of = inputs(proximal=PROXIMAL[name])
    together = LOSSES[name](of).loss_N
    for row in range(3):
        own = row == ROW
        fields = (of.trainer_logprobs_N, of.proximal_logprobs_N, of.sampling_logprobs_N, of.advantage_N)
        alone = LossInputs(*(values[own] for values in fields), torch.zeros_like(ROW[own]), 1)
        assert torch.equal(LOSSES[name](alone).loss_N, together[own])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_an_enormous_ratio_gives_a_finite_loss_and_gradient(name: str, far: float) -> None:
    new = torch.tensor([-1.0, -1.0, min(far, -1e-3)], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, min(-far, -1e-3)])
    for sign in (1.0, -1.0):
        of = LossInputs(new, old, old, sign * torch.ones(3), torch.tensor([0, 0, 1]), 2)
        loss = LOSSES[name](of).loss_N
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient(loss, new)).all()


@pytest.mark.parametrize("name", ["topr", "vespo", "dppo_k2"])
def test_a_loss_that_compares_with_the_sampler_is_weighed_by_no_correction_as_well(name: str) -> None:
    """In one step the ratio to another proximal policy is 1, and options that bound it would do nothing."""
    with pytest.raises(ValueError, match=f'the loss {name} compares with the sampler, .*proximal = "sampler"'):
        UpdateConfig.model_validate({"loss": {"name": name}, "proximal": "update"})


def test_a_loss_without_a_ratio_needs_the_corrections() -> None:
    """Under proximal = "sampler" the correction is 1, so that no stale answer would be weighed at all."""
    assert UpdateConfig.model_validate({"loss": {"name": "reinforce"}, "proximal": "update"}).proximal == "update"
    with pytest.raises(ValueError, match=r'reinforce has no ratio, .* set update.proximal = "update"'):
        UpdateConfig.model_validate({"loss": {"name": "reinforce"}, "proximal": "sampler"})


def test_gspo_token_gives_each_token_its_own_advantage() -> None:
    of = inputs()
    varied = LossInputs(of.trainer_logprobs_N, OLD, SAMPLER, torch.arange(10).double() / 10, ROW, NUM_ROWS)
    slope = gradient(LOSSES["gspo_token"](varied, clip_low=9.0, clip_high=9.0).loss_N, of.trainer_logprobs_N)
    assert_close(slope, -varied.advantage_N * of.row_mean_N(NEW - OLD).exp())


def test_an_exponential_is_bounded_and_has_no_gradient_there() -> None:
    x = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    found = bounded_exp(x)
    assert torch.isfinite(found).all()
    assert gradient(found, x).tolist() == [0.0, 0.0, 1.0]


def test_weight_zero_silences_a_loss_that_is_not_finite() -> None:
    loss = torch.tensor([float("nan"), float("inf"), 2.0])
    found = weigh_tokens(loss, torch.tensor([0.0, 0.0, 0.5]), torch.tensor([4.0]), torch.zeros(3, dtype=torch.int64))
    assert found.tolist() == [0.0, 0.0, 0.25]


def test_partial_sums_over_the_global_denominator_add_up_to_the_token_mean() -> None:
    golden = VECTORS["normalisation"]
    rows = [torch.tensor(row) for row in golden["per_token_loss"]]
    sums, means = [], []
    for first, second in golden["micro_batches_2x2"]:
        loss = torch.cat([rows[first], rows[second]])
        row = torch.tensor([0] * len(rows[first]) + [1] * len(rows[second]))
        denominator = torch.full((2,), float(golden["token_total"]))
        sums.append(weigh_tokens(loss, torch.ones_like(loss), denominator, row).sum().item())
        means.append(loss.mean().item())
    assert sums == pytest.approx(golden["correct_partial_sums_2x2_divided_by_global_tokens"])
    assert sum(sums) == pytest.approx(golden["token_mean_correct"])
    wrong = golden["WRONG_mean_of_micro_batch_token_means_2x2"]
    assert sum(means) / 2 == pytest.approx(wrong) != pytest.approx(sum(sums))


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": -0.2}, "clip_high"),
        ({"clip_high": 0.5, "dual_clip": 1.5}, "dual_clip is 1.5, inside of the clip"),
        ({"name": "gspo", "dual_clip": 3.0}, "dual_clip"),  # an option of another loss
        ({"name": "cispo", "ratio_cap": "none"}, "ratio_cap"),
        ({"name": "grpo"}, r"name should be ppo_clip, sapo.*dppo_k2, or module:function of your own"),
        ({"name": "topr"}, r'the loss topr compares with the sampler.*set update.proximal = "sampler"'),
    ],
)
def test_a_loss_that_cannot_be_meant_is_refused(table: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        UpdateConfig.model_validate({"loss": table})


def test_an_option_without_a_default_must_be_given() -> None:
    def scaled(inputs: LossInputs, *, factor: float) -> TokenLosses: ...

    table = options_of(scaled, "name", LossOptions)
    with pytest.raises(ValueError, match="factor"):
        table()
    assert given(scaled, table(factor=2.0)) == {"factor": 2.0}


def test_the_options_of_a_loss_are_the_keyword_parameters_of_its_function() -> None:
    config = UpdateConfig.model_validate({"loss": {"name": "cispo"}}).loss
    assert config.model_dump() == {"name": "cispo", "ratio_cap": 5.0, "ratio_floor": 0.0}
    assert UpdateConfig().loss.model_dump() == {"name": "ppo_clip", **(ppo_clip.__kwdefaults__ or {})}
