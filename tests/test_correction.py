"""Tests of grpo.correction: the weight of tokens that another policy sampled."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.correction import KINDS, OPTIONS, CorrectionConfig, TokenWeights, correct
from grpo.losses.base import LossInputs, weigh_tokens
from grpo.losses.clip import ppo_clip
from grpo.settings import UpdateConfig
from tests.vectors import NEW, NUM_ROWS, NUM_TOKENS, OLD, ROW, SAMPLER, VECTORS, assert_close, gradient, inputs, tokens

GOLDEN: dict[str, Any] = VECTORS["off_policy"]["weights"]


def correction(kind: str, **options: float) -> CorrectionConfig:
    """Return the options of a correction, as a config gives them."""
    return UpdateConfig.model_validate({"correction": {"kind": kind, **options}}).correction


def bounded(kind: str, **options: float) -> CorrectionConfig:
    """Return the options of a correction with those of these options that its kind has."""
    known = type(correction(kind)).model_fields
    return correction(kind, **{name: value for name, value in options.items() if name in known})


CORRECTIONS: dict[str, CorrectionConfig] = {
    "none": correction("none"),
    "token_truncate_2": correction("token_truncate", high=2.0),
    "token_clip_0.5_2": correction("token_clip", low=0.5, high=2.0),
    "token_mask_0.5_2": correction("token_mask", low=0.5, high=2.0),
    "seq_truncate_2": correction("sequence_truncate", high=2.0),
    "geo_mask_0.99_1.01_times_token_truncate_2": correction("geometric_mask", low=0.99, high=1.01, token_cap=2.0),
    "k3_mask_0.01_times_token_truncate_2": correction("k3_mask", high=0.01, token_cap=2.0),
}


def corrected(proximal: Tensor, sampler: Tensor, row: Tensor, num_rows: int, config: CorrectionConfig) -> TokenWeights:
    """Return what a correction makes of tokens; the current policy is the proximal one."""
    return correct(LossInputs(proximal, proximal, sampler, torch.ones_like(proximal), row, num_rows), config)


def weights_of(w: list[float], rows: list[int], config: CorrectionConfig) -> list[float]:
    """Return the weights of tokens with these ratios proximal / sampler; NaN is an unknown sampler."""
    sampler = -torch.tensor(w, dtype=torch.float64).log()
    proximal = torch.zeros(len(w), dtype=torch.float64)
    found = corrected(proximal, sampler, torch.tensor(rows), max(rows) + 1, config)
    silent = torch.stack(list(found.reasons.values())).any(0)
    assert torch.equal(silent, found.weight_N == 0)
    return [round(weight, 9) for weight in found.weight_N.tolist()]


def test_every_golden_weight_has_a_case() -> None:
    assert CORRECTIONS.keys() == GOLDEN.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CORRECTIONS)
def test_weights_and_the_loss_that_they_weigh_equal_the_golden_values(case: str, dtype: torch.dtype) -> None:
    golden, of = GOLDEN[case], inputs(dtype=dtype)
    weight = correct(of, CORRECTIONS[case]).weight_N
    denominator = torch.full((NUM_ROWS,), NUM_TOKENS, dtype=dtype)
    loss = weigh_tokens(ppo_clip(of, dual_clip=None).loss_N, weight, denominator, ROW)
    assert_close(weight, tokens(golden["token_weight"], dtype))
    assert (weight > 0).double().mean().item() == pytest.approx(golden["kept_token_fraction"])
    expected = golden["ppo_clip_higher_token_mean_keep_denominator"]
    assert_close(loss.sum().detach(), torch.tensor(expected, dtype=dtype))
    if golden["kept_token_fraction"] < 1:
        assert expected != pytest.approx(golden["ppo_clip_higher_token_mean_kept_tokens_denominator"])
    assert_close(gradient(loss, of.trainer_logprobs_N), tokens(golden["grad_logp_new_keep_denominator"], dtype))


@pytest.mark.parametrize(
    ("sign", "delta", "key"),
    [
        (1.0, 0.01, "keep_at_delta_0.0"),
        (-1.0, 0.01, "advantages_negated_keep_at_delta_0.01"),
        (1.0, -0.5, "keep_at_delta_-0.5"),
    ],
)
def test_the_off_policy_sequence_mask_equals_the_golden_values(sign: float, delta: float, key: str) -> None:
    """At 0.01 the first case keeps what it keeps at 0, as its only row with A < 0 has become likelier.

    No config takes the last bound, which is there to drop a row.
    """
    golden = VECTORS["off_policy"]["off_policy_sequence_mask"]
    found = correct(inputs(sign=sign), OPTIONS["none"].model_construct(off_policy_sequence_mask=delta))
    assert torch.equal(found.weight_N > 0, torch.tensor(golden[key])[ROW])
    assert torch.equal(found.reasons["off_policy_sequence_mask"], ~torch.tensor(golden[key])[ROW])


def test_the_off_policy_sequence_mask_compares_with_the_mean_over_the_row() -> None:
    """Whose golden values are those of rows 0 to 2; a bound just below one drops it, one just above keeps it."""
    mean = VECTORS["off_policy"]["off_policy_sequence_mask"]["mean_log_sampler_minus_new"]
    fallen = SAMPLER - NEW
    for row in (0, 1, 2):
        assert fallen[row == ROW].mean().item() == pytest.approx(mean[row])
    for delta, is_kept in ((mean[2] - 1e-9, False), (mean[2] + 1e-9, True)):
        found = correct(inputs(sign=-1.0), correction("token_truncate", off_policy_sequence_mask=delta))
        assert bool((found.weight_N[ROW == 2] > 0).all()) == is_kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_equal_to_the_proximal_policy_gives_weight_one(kind: str) -> None:
    found = corrected(OLD, OLD, ROW, 4, bounded(kind, low=0.5, veto_low=0.1, veto_high=10.0)).weight_N
    assert torch.equal(found, torch.ones_like(OLD))


def test_products_over_rows_equal_the_golden_values() -> None:
    product = torch.tensor(VECTORS["off_policy"]["seq_product_w"], dtype=torch.float64)[ROW]
    for kind in ("sequence_mask", "sequence_truncate"):
        torch.testing.assert_close(corrected(OLD, SAMPLER, ROW, 4, correction(kind)).weight_N, product)


def test_sequence_weights_are_the_product_within_bounds() -> None:
    """Products by hand: 3/2, 4/5, 3, 1/4."""
    w, rows = [2.0, 0.75, 2.0, 0.4, 2.0, 1.5, 0.5, 0.5], [0, 0, 1, 1, 2, 2, 3, 3]
    masked = weights_of(w, rows, correction("sequence_mask", low=0.5, high=2.0))
    assert masked == [1.5, 1.5, 0.8, 0.8, 0.0, 0.0, 0.0, 0.0]
    truncated = weights_of(w, rows, correction("sequence_truncate", high=2.0))
    assert truncated == [1.5, 1.5, 0.8, 0.8, 2.0, 2.0, 0.25, 0.25]


def test_geometric_and_k3_masks_look_at_the_mean_over_known_tokens() -> None:
    geometric = correction("geometric_mask", low=0.99, high=1.01)
    assert weights_of([1.006, 1.006], [0, 0], geometric) == [1.006, 1.006]
    assert weights_of([1.012, float("nan")], [0, 0], geometric) == [0.0, 0.0]
    # w - 1 - log w is 0.0177 at 1.2 and 0 at 1.
    k3 = correction("k3_mask", high=0.01)
    assert weights_of([1.2, 1.0], [0, 0], k3) == [1.2, 1.0]
    assert weights_of([1.2, float("nan")], [0, 0], k3) == [0.0, 0.0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_an_unknown_sampler_masks_its_token_and_leaves_its_row_alone(kind: str) -> None:
    config = bounded(kind, low=0.1, high=1.3)
    with_unknown = weights_of([1.2, float("nan"), 0.9], [0, 0, 0], config)
    without = weights_of([1.2, 0.9], [0, 0], config)
    assert with_unknown == [without[0], 0.0, without[1]]
    assert 0.0 not in without


def test_without_correction_an_unknown_sampler_is_no_reason_to_leave_a_token_out() -> None:
    assert weights_of([3.0, float("nan"), 0.1], [0, 0, 1], correction("none")) == [1.0, 1.0, 1.0]
    vetoed = correction("none", veto_high=2.0)
    assert weights_of([3.0, float("nan"), float("nan")], [0, 0, 1], vetoed) == [0.0, 0.0, 1.0]


def test_an_infinite_sampling_logprob_is_unknown() -> None:
    sampler = torch.tensor([float("-inf"), -1.0])
    found = corrected(torch.tensor([-1.0, -1.0]), sampler, torch.tensor([0, 0]), 1, correction("token_truncate"))
    assert found.weight_N.tolist() == [0.0, 1.0]


def test_an_extreme_token_vetoes_its_row_only() -> None:
    config = correction("token_truncate", veto_low=1e-2, veto_high=10.0)
    rows = [0, 0, 1, 1, 2, 2]
    assert weights_of([1.0, 1e-3, 1.0, 20.0, 1.0, 5.0], rows, config) == [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]


def test_an_enormous_ratio_gives_a_finite_weight() -> None:
    for kind in KINDS:
        proximal, sampler = torch.tensor([-1.0, -1e4]), torch.tensor([-1e4, -1.0])
        found = corrected(proximal, sampler, torch.tensor([0, 1]), 2, bounded(kind, high=1e30))
        assert torch.isfinite(found.weight_N).all(), kind


def test_weights_are_constants() -> None:
    proximal = OLD.clone().requires_grad_()
    assert not corrected(proximal, SAMPLER, ROW, 4, correction("token_truncate")).weight_N.requires_grad


def test_a_token_of_an_unknown_sampler_does_not_thin_the_mean_of_the_off_policy_sequence_mask() -> None:
    own = torch.full((3,), -1.6)
    sampler = torch.tensor([-1.0, float("nan"), -1.0])
    of = LossInputs(own, own, sampler, -torch.ones(3), torch.tensor([0, 0, 1]), 2)
    for bound, is_masked in ((0.5, [True, True, True]), (0.7, [False, False, False])):
        found = correct(of, correction("token_truncate", off_policy_sequence_mask=bound))
        assert found.reasons["off_policy_sequence_mask"].tolist() == is_masked


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_weights_alone_and_among_others(kind: str) -> None:
    config = bounded(kind, low=0.9, high=1.6)
    rows = [0, 0, 1, 1, 1]
    w = [1.5, 0.9, 1.1, 2.5, 0.3]
    together = weights_of(w, rows, config)
    alone = weights_of(w[:2], [0, 0], config) + weights_of(w[2:], [0, 0, 0], config)
    assert together == alone


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("token_mask", {"low": 1.5}, "low"),  # on-policy tokens would be masked
        ("token_mask", {"high": 0.9}, "high"),
        ("token_mask", {"low": -1.0}, "low"),
        ("token_truncate", {"low": 0.5}, "low"),  # an option of another kind
        ("none", {"high": 2.0}, "high"),
        ("k3_mask", {"low": 0.0}, "low"),
        ("sequence_mask", {"token_cap": 2.0}, "token_cap"),
        ("token_truncate", {"veto_low": 0.0}, "veto_low"),
        ("token_truncate", {"veto_high": 1.0}, "veto_high"),
        ("token_truncate", {"off_policy_sequence_mask": 0.0}, "off_policy_sequence_mask"),
        ("token_tuncate", {}, "kind should be none, token_truncate"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(kind: str, options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        correction(kind, **options)


def test_the_options_of_a_kind_are_the_keyword_parameters_of_its_function() -> None:
    off = {"veto_low": None, "veto_high": None, "off_policy_sequence_mask": None}
    for name, kind in KINDS.items():
        assert correction(name).model_dump() == {"kind": name, **off, **(kind.__kwdefaults__ or {})}
    assert UpdateConfig().correction.kind == "token_truncate"


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_a_kind_keep_what_is_near_and_act_on_what_is_far(kind: str) -> None:
    """A mask that no drift ever meets would be a correction in name only."""
    assert weights_of([1.004, 0.998], [0, 1], correction(kind)) == pytest.approx([1.004, 0.998], abs=0.005)
    far = weights_of([6.0] * 8 + [0.1] * 8, [0] * 8 + [1] * 8, correction(kind))
    truncated = {"none": 1.0, "token_clip": 5.0, "token_truncate": 2.0, "sequence_truncate": 2.0}
    assert far[0] == truncated.get(kind, 0.0)


@pytest.mark.parametrize(
    ("kind", "option", "changed", "w", "expected"),
    [
        ("token_truncate", "high", 1.5, 1.8, 1.5),
        ("token_clip", "low", 0.75, 0.6, 0.75),
        ("token_clip", "high", 1.5, 1.8, 1.5),
        ("token_mask", "low", 0.75, 0.6, 0.0),
        ("token_mask", "high", 1.5, 1.8, 0.0),
        ("sequence_truncate", "high", 1.5, 1.8, 1.5),
        ("sequence_mask", "low", 0.75, 0.6, 0.0),
        ("sequence_mask", "high", 1.5, 1.8, 0.0),
        ("geometric_mask", "low", 0.5, 0.6, 0.6),
        ("geometric_mask", "high", 1.9, 1.8, 1.8),
        ("geometric_mask", "token_cap", 1.001, 1.005, 1.001),
        ("k3_mask", "high", 0.5, 1.8, 1.8),
        ("k3_mask", "token_cap", 1.001, 1.005, 1.001),
    ],
)
def test_each_option_reaches_its_kind(kind: str, option: str, changed: float, w: float, expected: float) -> None:
    assert weights_of([w], [0], correction(kind, **{option: changed})) == [expected]
    assert weights_of([w], [0], correction(kind)) != [expected]


def test_the_default_vetoes_no_more_long_rows_than_short_ones() -> None:
    """Log ratios with heavy tails: any rule about a single token meets a long row sooner than a short one."""
    random = np.random.default_rng(0)
    vetoed = {}
    for length in (16, 256, 4096):
        log_w = torch.from_numpy(random.standard_t(3, (200, length)) / 3**0.5).flatten()
        row = torch.arange(200).repeat_interleave(length)
        vetoed[length] = [
            float(corrected(torch.zeros_like(log_w), -log_w, row, 200, options).reasons["veto"].double().mean())
            for options in (correction("token_truncate"), correction("token_truncate", veto_low=1e-4, veto_high=1e2))
        ]
    assert [default for default, _ in vetoed.values()] == [0.0, 0.0, 0.0]
    assert vetoed[16][1] < 0.1 < 0.9 < vetoed[4096][1]


def test_each_token_of_weight_0_has_the_reasons_for_it() -> None:
    w = torch.tensor([1.0, float("nan"), 5.0, 1e-3, 1.0], dtype=torch.float64)
    row = torch.tensor([0, 0, 0, 1, 1])
    config = correction("token_mask", low=0.5, high=2.0, veto_low=1e-2)
    reasons = corrected(torch.zeros_like(w), -w.log(), row, 2, config).reasons
    assert {name: held.tolist() for name, held in reasons.items()} == {
        "veto": [False, False, False, True, True],
        "off_policy_sequence_mask": [False] * 5,
        "unknown_sampler": [False, True, False, False, False],
        "correction": [False, False, True, True, False],
    }
