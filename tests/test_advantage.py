"""Tests of grpo.advantages: group statistics, baselines, scales, and the rule of equal rewards."""

import math
import random
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages.baselines import BASELINES
from grpo.advantages.estimate import ADVANTAGE_COLUMNS, advantages
from grpo.advantages.scales import SCALES
from grpo.groups import differ
from tests.builders import by_group
from tests.vectors import VECTORS

GOLDEN: dict[str, Any] = VECTORS["advantages"]

GOLDEN_OPTIONS: dict[str, dict[str, Any]] = {
    "mean_only": {"baseline": "group_mean", "scale": "none"},
    "group_std_population_eps1e-6": {"scale": "group_std", "ddof": 0, "eps": 1e-6},
    "group_std_sample_eps1e-6": {"scale": "group_std", "ddof": 1, "eps": 1e-6},
    "group_std_sample_eps1e-4": {"scale": "group_std", "ddof": 1, "eps": 1e-4},
    "group_std_population_eps0": {"scale": "group_std", "ddof": 0, "eps": 0.0},
    "leave_one_out": {"baseline": "leave_one_out", "scale": "none"},
    "leave_one_out_mean__leave_one_out_sample_std_eps1e-6": {
        "baseline": "leave_one_out",
        "scale": "leave_one_out_std",
        "eps": 1e-6,
    },
    "mean_normalised_maxrl_eps0": {"scale": "group_mean", "eps": 0.0},
    "batch_std_of_raw_rewards_sample_eps1e-4": {"scale": "batch_raw_std", "eps": 1e-4},
}

REWARD_LISTS = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=12)


def reward_rows(**groups: list[float | None]) -> pl.DataFrame:
    """Return scored rows, one group per keyword; completion ids are the group id and a number."""
    return pl.DataFrame(
        [
            {"group_id": group, "completion_id": f"{group}{index}", "reward": reward}
            for group, rewards in groups.items()
            for index, reward in enumerate(rewards)
        ],
        schema={"group_id": pl.String, "completion_id": pl.String, "reward": pl.Float64},
    )


def test_every_golden_case_has_its_options() -> None:
    assert GOLDEN_OPTIONS.keys() == GOLDEN["cases"].keys()


@pytest.mark.parametrize("case", GOLDEN_OPTIONS)
def test_advantages_equal_the_golden_values(case: str) -> None:
    result = by_group(advantages(reward_rows(**GOLDEN["groups"]), **GOLDEN_OPTIONS[case]))
    for group, expected in GOLDEN["cases"][case].items():
        assert result[group] == pytest.approx(expected, rel=1e-10, abs=1e-12), group


@pytest.mark.parametrize(("ddof", "key"), [(0, "advantage_population"), (1, "advantage_sample")])
def test_whitening_over_tokens_equals_the_golden_values(ddof: Any, key: str) -> None:
    """Flat groups beside them change nothing: the formula is that over the groups that train."""
    golden = GOLDEN["token_whitening"]
    rows = reward_rows(**golden["groups"], flat=[1.0, 1.0], unknown=[None, 1.0])
    lengths = [length for group in golden["token_lengths"].values() for length in group] + [7, 9, 100, 100]
    found = by_group(advantages(rows.with_columns(tokens=pl.Series(lengths)), scale="token_whitened", ddof=ddof))
    for group in golden["groups"]:
        assert found[group] == pytest.approx(golden[key][group], rel=1e-10)
    assert found["flat"] == found["unknown"] == [0.0, 0.0]


def test_a_group_without_a_token_that_trains_stops_no_iteration() -> None:
    """Its rows are dropped as no_trainable_token."""
    rows = reward_rows(a=[1.0, 0.0, None], b=[1.0, 0.0]).with_columns(tokens=pl.Series([0.0, 0.0, 3.0, 1.0, 3.0]))
    found = by_group(advantages(rows, baseline="length_weighted"))
    assert found == {"a": [0.0, 0.0, 0.0], "b": [0.75, -0.25]}


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-8), (0.0, 1e8)])
def test_the_std_of_the_others_depends_on_neither_the_unit_nor_the_zero_of_a_reward(
    shift: float, factor: float
) -> None:
    values = [0.0, 0.0005, 0.0007, 0.0002, 0.0002]
    rows = reward_rows(a=[shift + factor * value for value in values])
    found = advantages(rows, baseline="leave_one_out", scale="leave_one_out_std", eps=0.0)["advantage"].to_list()
    others = [values[:i] + values[i + 1 :] for i in range(5)]
    expected = [(v - np.mean(o)) / np.std(o, ddof=1) for v, o in zip(values, others, strict=True)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
def test_no_rewards_have_no_advantages(baseline: str) -> None:
    none = reward_rows(a=[1.0]).clear()
    more = {"tokens": pl.Float64, "policy": pl.Int64, "log_weight": pl.Float64}
    assert advantages(
        none.with_columns(pl.Series(n, [], dtype=t) for n, t in more.items()), baseline=baseline
    ).is_empty()


def test_the_length_weighted_baseline_equals_the_golden_values() -> None:
    golden = GOLDEN["length_weighted_baseline"]
    rows = reward_rows(b=[*golden["rewards"], None])
    frame = advantages(rows.with_columns(tokens=pl.Series([*golden["lengths"], 50])), baseline="length_weighted")
    assert frame["advantage"].to_list() == pytest.approx([*golden["advantage"], 0.0], rel=1e-10)


MIXTURE = GOLDEN["mixture_group_baselines"]


@pytest.mark.parametrize(
    ("baseline", "key"),
    [
        ("group_mean", "advantage_plain_mean"),
        ("importance_weighted", "advantage_snis_leave_one_out"),
        ("importance_weighted_squared", "advantage_w2_leave_one_out"),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 2000.0, -2000.0])
def test_baselines_of_a_mixed_group_equal_the_golden_values(baseline: str, key: str, shift: float) -> None:
    """Only ratios of weights count, so that none overflows; an unscored completion has no part in them."""
    rows = reward_rows(other=[0.0, 1.0], mixed=[*MIXTURE["rewards"], None])
    log_weight = [0.0, 0.0, *(w + shift for w in MIXTURE["seq_log_ratio_target_over_behaviour"]), 9.0 + shift]
    frame = advantages(rows.with_columns(log_weight=pl.Series(log_weight)), baseline=baseline)
    assert by_group(frame)["mixed"] == pytest.approx([*MIXTURE[key], 0.0], rel=1e-10)


def test_a_weight_beside_which_all_others_vanish_is_not_its_own_baseline() -> None:
    rows = reward_rows(a=[1.0, 0.0, 0.5]).with_columns(log_weight=pl.Series([0.0, -200.0, -201.0]))
    found = advantages(rows, baseline="importance_weighted")["advantage"].to_list()
    others = (0.0 + 0.5 * math.exp(-1)) / (1 + math.exp(-1))
    assert found == pytest.approx([1.0 - others, -1.0, -0.5])


def test_a_baseline_per_policy_compares_with_answers_of_the_same_policy_and_group() -> None:
    """self: 1, 1, 0 of mean 2/3; old and teacher are alone, and have nobody to be compared with."""
    rows = reward_rows(mixed=MIXTURE["rewards"], other=[0.0, 1.0])
    policy = pl.Series([0, 0, 0, 1, 2, 1, 1])
    found = by_group(advantages(rows.with_columns(policy=policy), baseline="per_policy"))
    assert found["mixed"] == pytest.approx([1 / 3, 1 / 3, -2 / 3, 0.0, 0.0])
    assert found["other"] == [-0.5, 0.5]


def test_equal_rewards_of_a_policy_have_exactly_no_advantage_per_policy() -> None:
    """Their mean is rounded, and a scale without eps would make the rounding an advantage of 0.9."""
    rows = reward_rows(a=[0.1, 0.1, 0.1, 0.7, 0.7, 0.7], b=[0.0, 1.0])
    frame = rows.with_columns(policy=pl.Series([0, 0, 0, 1, 1, 1, 0, 0]), tokens=pl.lit(3.0))
    for scale in ("none", "token_whitened"):
        found = by_group(advantages(frame, baseline="per_policy", scale=scale, ddof=0, eps=0.0))
        assert found["a"] == [0.0] * 6
        assert found["b"][1] > 0.4


@given(REWARD_LISTS)
def test_a_standard_deviation_without_oneself_is_that_of_the_others(rewards: list[float]) -> None:
    found = advantages(reward_rows(a=rewards), baseline="leave_one_out", scale="leave_one_out_std", eps=0.0)
    plain = advantages(reward_rows(a=rewards), baseline="leave_one_out")["advantage"]
    for index, value in enumerate(found["advantage"]):
        others = np.array(rewards[:index] + rewards[index + 1 :])
        std = float(np.std(others, ddof=1)) if len(others) > 1 else 0.0
        if std > 1e-3:
            assert value == pytest.approx(plain[index] / std, rel=1e-6)
        elif std == 0:
            assert value == plain[index]


def test_a_group_whose_mean_is_not_positive_has_no_mean_to_be_divided_by() -> None:
    found = advantages(reward_rows(a=[-1.0, 1.0], b=[-2.0, 1.0]), scale="group_mean")
    assert found["advantage"].to_list() == [0.0] * 4


def test_batch_scale_divides_by_the_std_of_centred_rewards_of_groups_that_differ() -> None:
    frame = advantages(reward_rows(**GOLDEN["groups"]), scale="batch_std", ddof=1, eps=0.0)
    constants = GOLDEN["batch_scaling_constants"]
    # the vector's std counts the four zeros of the flat group c as well: 21 values, of which 17 differ
    with_zeros = constants["sample_std_of_centred_rewards_of_groups_with_at_least_2_scored"]
    std = with_zeros * ((constants["n_centred"] - 1) / (constants["n_centred"] - 4 - 1)) ** 0.5
    for group, expected in GOLDEN["cases"]["mean_only"].items():
        assert by_group(frame)[group] == pytest.approx([value / std for value in expected], rel=1e-10, abs=1e-12)


def test_flat_groups_change_no_scale() -> None:
    """One informative group among ten has the advantages that it would have alone; raw rewards spread otherwise."""
    flat: dict[str, list[float | None]] = {f"flat{i}": [0.5] * 4 for i in range(9)}
    for scale in SCALES.keys() - {"batch_raw_std"}:
        one, ten = reward_rows(a=[1.0, 0.0, 0.0, 1.0]), reward_rows(a=[1.0, 0.0, 0.0, 1.0], **flat)
        alone, among = (
            advantages(rows.with_columns(tokens=pl.lit(3)), scale=scale)["advantage"] for rows in (one, ten)
        )
        assert among.to_list() == [*alone, *[0.0] * 36], scale


def test_statistics_are_those_of_the_scored_members() -> None:
    frame = advantages(reward_rows(a=[1.0, 0.0, None]), ddof=0)
    assert frame.columns == list(ADVANTAGE_COLUMNS)
    assert frame["group_reward_mean"].to_list() == [0.5, 0.5, 0.5]
    assert frame["group_reward_std"].to_list() == [0.5, 0.5, 0.5]
    assert frame["group_size"].to_list() == [2, 2, 2]
    assert frame["advantage"].to_list() == [0.5, -0.5, 0.0]
    assert frame["reward"].to_list() == [1.0, 0.0, None]


def test_each_dropped_row_says_why() -> None:
    frame = advantages(reward_rows(a=[1.0, 0.0, None], b=[0.7], c=[0.7, 0.7], d=[None], e=[0.7, None]))
    assert by_group(frame, "drop_reason") == {
        "a": [None, None, "unscored"],
        "b": ["singleton"],
        "c": ["zero_variance", "zero_variance"],
        "d": ["unscored"],
        "e": ["singleton", "unscored"],
    }
    assert frame.filter(pl.col("drop_reason").is_not_null())["advantage"].to_list() == [0.0] * 7


@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_does_not_move_the_baseline(unknown: float) -> None:
    frame = advantages(reward_rows(a=[1.0, 0.0, unknown]))
    assert frame["advantage"].to_list() == [0.5, -0.5, 0.0]
    assert frame["reward"].to_list() == [1.0, 0.0, None]


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
def test_equal_rewards_give_exactly_zero(reward: float, scale: Any) -> None:
    groups: dict[str, list[float | None]] = {f"n{size}": [reward] * size for size in range(2, 65)}
    frame = advantages(reward_rows(**groups, other=[0.0, 1.0]), scale=scale, eps=1e-8)
    assert set(frame.filter(pl.col("group_id") != "other")["advantage"]) == {0.0}


def test_equal_rewards_in_float32_give_exactly_zero() -> None:
    rows = reward_rows(a=[0.7] * 12).cast({"reward": pl.Float32})
    assert set(advantages(rows, scale="group_std", eps=1e-8)["advantage"]) == {0.0}


def test_the_spread_that_counts_as_equal_is_relative() -> None:
    groups: dict[str, list[float | None]] = {
        "large": [1e12, 1e12 + 1],
        "low": [-1e12, -1e12 - 1],
        "cancelled": [0.1 + 0.2 - 0.3, 0.0],  # 5.6e-17
        "unit": [1.0, 1.0 + 1e-8],
        "small": [1e-10, 3e-10],
    }
    found = by_group(advantages(reward_rows(**groups)), "drop_reason")
    flat, informative = ["zero_variance"] * 2, [None] * 2
    assert found == {"large": flat, "low": flat, "cancelled": flat, "unit": informative, "small": informative}
    looked_at = reward_rows(**groups).group_by("group_id").agg(differ(pl.col("reward")))
    assert dict(looked_at.iter_rows()) == {group: reasons == informative for group, reasons in found.items()}


def test_without_baseline_and_scale_every_scored_reward_is_its_advantage() -> None:
    frame = advantages(reward_rows(a=[1.0, 1.0], b=[0.7], c=[None]), baseline="none")
    assert frame["advantage"].to_list() == [1.0, 1.0, 0.7, 0.0]
    assert frame["drop_reason"].to_list() == [None, None, None, "unscored"]


def test_a_scale_drops_groups_without_spread_even_without_baseline() -> None:
    frame = advantages(reward_rows(a=[1.0, 1.0], b=[2.0]), baseline="none", scale="batch_std")
    assert frame["advantage"].to_list() == [0.0, 0.0, 0.0]


def test_rows_come_back_in_input_order_when_groups_are_scattered() -> None:
    rows = reward_rows(a=[1.0, 0.0], b=[3.0, 1.0])[[2, 0, 3, 1]]
    frame = advantages(rows)
    assert frame["completion_id"].to_list() == ["b0", "a0", "b1", "a1"]
    assert frame["advantage"].to_list() == [1.0, 0.5, -1.0, -0.5]


@pytest.mark.parametrize("scale", ["group_std", "batch_std"])
def test_every_chunking_gives_the_same_bits(scale: Any) -> None:
    generator = random.Random(3)
    count = 60_000
    rows = pl.DataFrame(
        {
            "group_id": [f"g{index // 7}" for index in range(count)],
            "completion_id": [f"c{index}" for index in range(count)],
            "reward": [generator.gauss(0, 1) for _ in range(count)],
        }
    )
    chunked = pl.concat([rows[:999], rows[999:40_000], rows[40_000:]], rechunk=False)
    expected = advantages(rows, scale=scale)
    assert advantages(chunked, scale=scale).equals(expected)


@given(rewards=REWARD_LISTS, seed=st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_permuted_rows_give_permuted_advantages(rewards: list[float], seed: int) -> None:
    rows = reward_rows(a=list(rewards), b=[1.0, 0.0, None])
    order = list(range(rows.height))
    random.Random(seed).shuffle(order)
    expected = advantages(rows, scale="batch_std")["advantage"].gather(order)
    found = advantages(rows[order], scale="batch_std")["advantage"]
    assert found.to_list() == pytest.approx(expected.to_list(), rel=1e-9, abs=1e-9)


@given(rewards=REWARD_LISTS, shift=st.floats(-5, 5), factor=st.floats(0.1, 10))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_a_shift_changes_nothing_and_a_factor_only_what_is_not_divided(
    rewards: list[float], shift: float, factor: float
) -> None:
    moved: list[float | None] = [reward * factor + shift for reward in rewards]
    for scale, expected_factor in (("none", factor), ("group_std", 1.0)):
        options: dict[str, Any] = {"scale": scale, "eps": 0.0}
        plain = advantages(reward_rows(a=list(rewards)), **options)["advantage"]
        found = advantages(reward_rows(a=moved), **options)["advantage"]
        assert found.to_list() == pytest.approx((plain * expected_factor).to_list(), rel=1e-6, abs=1e-6)


@given(rewards=REWARD_LISTS)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_advantages_of_a_group_sum_to_zero(rewards: list[float]) -> None:
    frame = advantages(reward_rows(a=list(rewards)), baseline="leave_one_out", scale="group_std")
    assert frame["advantage"].sum() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(("option", "value"), [("baseline", "mean"), ("scale", "std"), ("ddof", 2), ("eps", -1.0)])
def test_an_unknown_option_is_refused_by_name(option: str, value: object) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option} is .*expected"):
        advantages(reward_rows(a=[1.0]), **options)


def test_the_same_rewards_give_the_same_bits_every_time() -> None:
    """Sums by several threads, in the order in which they finish, would differ in the last bit."""
    rewards = [(i * 37 % 101) / 101 for i in range(2_000)]
    groups = [f"g{i * 13 % 250}" for i in range(2_000)]
    frame = pl.DataFrame({"completion_id": [str(i) for i in range(2_000)], "group_id": groups, "reward": rewards})
    bits = {advantages(frame, scale="group_std").hash_rows().sum() for _ in range(50)}
    assert len(bits) == 1
