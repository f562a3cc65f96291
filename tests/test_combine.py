"""Tests of grpo.combine: several rewards of a completion become one."""

import random
from typing import Any

import polars as pl
import pytest

from grpo.advantages.estimate import advantages
from grpo.combine import combine, normalize_each
from tests.builders import by_group
from tests.vectors import VECTORS

GOLDEN: dict[str, Any] = VECTORS["advantages"]


def long_rows(*rows: tuple[str, str, float | None]) -> pl.DataFrame:
    """Return reward rows in long format; the group is the first letter of the completion."""
    return pl.DataFrame(
        [{"completion_id": c, "group_id": c[0], "reward_name": name, "reward": reward} for c, name, reward in rows],
        schema={
            "completion_id": pl.String,
            "group_id": pl.String,
            "reward_name": pl.String,
            "reward": pl.Float64,
        },
    )


def golden_rows() -> pl.DataFrame:
    """Return the rewards of the golden values for several rewards: r0, r1, ... of each completion."""
    return long_rows(
        *(
            (f"{group[1]}{member}", f"r{index}", reward)
            for group, members in GOLDEN["multi_reward"]["rewards_member_by_component"].items()
            for member, rewards in enumerate(members)
            for index, reward in enumerate(rewards)
        )
    )


def test_combine_then_normalise_equals_the_golden_values() -> None:
    golden = GOLDEN["multi_reward"]
    combined = combine(golden_rows(), {"r0": golden["weights"][0], "r1": golden["weights"][1]})
    result = by_group(advantages(combined, scale="group_std", ddof=1, eps=1e-4))
    expected = golden["sum_then_normalise_sample_std_eps1e-4"]
    assert result["1"] == pytest.approx(expected["g1"], rel=1e-10, abs=1e-12)
    assert result["2"] == pytest.approx(expected["g2"], rel=1e-10, abs=1e-12)


def test_combine_is_null_when_a_weighted_reward_is_unknown_or_absent() -> None:
    rows = long_rows(
        ("b0", "format", 0.5),
        ("a0", "correct", 1.0),
        ("a0", "format", None),
        ("b0", "correct", 2.0),
        ("a1", "correct", 1.0),
        ("a2", "correct", float("nan")),
        ("a2", "format", 1.0),
    )
    combined = combine(rows, {"correct": 1.0, "format": 0.2})
    assert combined.rows() == [("b0", "b", 2.1), ("a0", "a", None), ("a1", "a", None), ("a2", "a", None)]


def test_combine_keeps_the_order_of_first_appearance() -> None:
    ids = [f"a{number * 37 % 1009}" for number in range(1009)]
    rows = long_rows(*((completion, name, 1.0) for name in ("x", "y") for completion in ids))
    assert combine(rows, {"x": 1.0, "y": 1.0})["completion_id"].to_list() == ids


def test_combine_ignores_a_reward_of_weight_zero_or_without_weight() -> None:
    rows = long_rows(("a0", "correct", 1.0), ("a0", "length", None), ("a0", "other", 5.0))
    assert combine(rows, {"correct": 2.0, "length": 0.0}).rows() == [("a0", "a", 2.0)]


def test_combine_refuses_weights_that_select_nothing() -> None:
    with pytest.raises(ValueError, match=r"combine nothing.*at least one"):
        combine(long_rows(), {"correct": 0.0})


def test_rewards_normalized_one_by_one_equal_the_golden_values() -> None:
    golden = GOLDEN["multi_reward"]
    combined = normalize_each(golden_rows(), {"r0": golden["weights"][0], "r1": golden["weights"][1]}, ddof=1, eps=1e-4)
    assert combined["reward"].to_list() == pytest.approx([1.0, 0.25, 1.5, 0.1, 1.1])
    undivided = by_group(advantages(combined))
    whole = by_group(advantages(combined, scale="batch_std", ddof=1, eps=1e-4))
    lengths = pl.Series([n for group in golden["token_lengths"].values() for n in group])
    whitened = by_group(advantages(combined.with_columns(tokens=lengths), scale="token_whitened", ddof=1, eps=1e-4))
    for group in ("1", "2"):
        step = golden["gdpo_step1_2_per_component_sample_std_eps1e-4_weighted_sum"][f"g{group}"]
        assert undivided[group] == pytest.approx(step, rel=1e-10, abs=1e-12)
        final = golden["gdpo_final_sequence_level_batch_norm_sample_std_eps1e-4"][f"g{group}"]
        assert whole[group] == pytest.approx(final, rel=1e-10, abs=1e-12)
        of_tokens = golden["gdpo_final_token_level_whitening_sample_var_eps1e-8"][f"g{group}"]
        assert whitened[group] == pytest.approx(of_tokens, rel=1e-10, abs=1e-12)


def test_a_member_without_one_of_the_rewards_is_unscored_and_leaves_the_others_comparable() -> None:
    rows = long_rows(("a0", "x", 1.0), ("a0", "y", 5.0), ("a1", "x", 0.0), ("a1", "y", None), ("a2", "x", 0.0))
    rows = rows.vstack(long_rows(("a2", "y", 5.0)))
    frame = advantages(normalize_each(rows, {"x": 1.0, "y": 1.0}, ddof=0, eps=0.0))
    # of the two scored members, x has mean 1/2 and std 1/2, so 1 becomes 1 and 0 becomes -1; y says nothing
    assert frame["drop_reason"].to_list() == [None, "unscored", None]
    assert frame["advantage"].to_list() == pytest.approx([1.0, 0.0, -1.0])


@pytest.mark.parametrize("ddof", [0, 1])
def test_rewards_normalized_one_by_one_are_silent_in_a_group_of_one(ddof: Any) -> None:
    rows = long_rows(("a0", "x", 5.0), ("b0", "x", 1.0), ("b1", "x", None), ("c0", "x", 1.0), ("c1", "x", 0.0))
    signal = normalize_each(rows, {"x": 1.0}, ddof=ddof, eps=0.0)["signal"]
    assert signal.to_list()[:3] == [0.0, 0.0, None]
    assert signal.to_list()[3:] == pytest.approx([2**-0.5, -(2**-0.5)] if ddof else [1.0, -1.0])


def test_rows_in_any_order_combine_to_the_same_rewards() -> None:
    rows = [(f"{g}{m}", name, m + scale) for g in "ab" for m in range(3) for name, scale in (("x", 0.5), ("y", 2.0))]
    combined = combine(long_rows(*rows), {"x": 1.0, "y": 10.0})
    random.Random(0).shuffle(rows)
    shuffled = combine(long_rows(*rows), {"x": 1.0, "y": 10.0}).sort("completion_id")
    assert combined.equals(shuffled)
    assert combined["reward"].to_list() == [20.5, 31.5, 42.5] * 2


@pytest.mark.parametrize("names", ["xx", "xxyy", "xyxy", "xyx"])
def test_a_reward_that_stands_twice_is_refused(names: str) -> None:
    rows = [("a0", name, float(index)) for index, name in enumerate(names)]
    with pytest.raises(ValueError, match=r"completion a0 has several rewards named x .* score the completions again"):
        combine(long_rows(*rows, *(("a1", name, 1.0) for name in names)), {"x": 1.0})
