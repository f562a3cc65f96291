"""normalize: what it refuses."""

from typing import Any

import polars as pl
import pytest

from pipeline.errors import ConfigError, RewardError
from stages.normalize import NormalizeConfig, normalize_rows
from tests.builders import reward_rows


def test_a_group_scored_by_two_versions_of_a_reward_is_refused() -> None:
    rows = reward_rows(a=[1, 0], b=[1, 0])
    mixed = rows.with_columns(reward_recipe=pl.Series(["old", "old", "old", "new"]))
    with pytest.raises(RewardError, match=r"1 groups mix versions .* group b with the versions \['new', 'old'\]"):
        normalize_rows(mixed.lazy(), NormalizeConfig())


def test_groups_scored_by_different_versions_are_comparable_within_themselves() -> None:
    rows = reward_rows(a=[1, 0], b=[1, 0]).with_columns(reward_recipe=pl.Series(["old", "old", "new", "new"]))
    assert normalize_rows(rows.lazy(), NormalizeConfig())["advantage"].to_list() == [0.5, -0.5, 0.5, -0.5]


def test_each_reward_may_be_normalized_by_itself() -> None:
    config = NormalizeConfig(combine="normalize_each", eps=0.0, weights={"accuracy": 3.0})
    frame = normalize_rows(reward_rows(a=[1, 0, 1, 0]).lazy(), config)
    # std of 1, 0, 1, 0 with ddof 1 is sqrt(1/3); 0.5 / that is sqrt(3) / 2
    assert frame["advantage"].to_list() == pytest.approx([3 * 3**0.5 / 2, -3 * 3**0.5 / 2] * 2)
    assert frame["reward"].to_list() == [3.0, 0.0, 3.0, 0.0]


def two_rewards() -> pl.LazyFrame:
    """Return a group of three members: accuracy 1, 0, 0 and style 0, 0, 4; and a flat group."""
    accuracy, style = reward_rows(a=[1, 0, 0], b=[1, 1]), reward_rows(a=[0, 0, 4], b=[1, 1])
    return pl.concat([accuracy, style.with_columns(reward_name=pl.lit("style"))]).lazy()


# Sums 1, 0, 4 have mean 5/3, deviations -2/3, -5/3, 7/3, the sum of whose squares is 26/3.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-2 / 3, -5 / 3, 7 / 3]),
        ({"baseline": "leave_one_out"}, [-1.0, -2.5, 3.5]),
        ({"baseline": "none"}, [1.0, 0.0, 4.0]),
        ({"scale": "group_std", "eps": 0.0}, [x / (13 / 3) ** 0.5 for x in (-2 / 3, -5 / 3, 7 / 3)]),
        ({"scale": "group_std", "eps": 0.0, "ddof": 0}, [x / (26 / 9) ** 0.5 for x in (-2 / 3, -5 / 3, 7 / 3)]),
        ({"scale": "group_std", "eps": 1.0}, [x / ((13 / 3) ** 0.5 + 1) for x in (-2 / 3, -5 / 3, 7 / 3)]),
        ({"scale": "batch_std", "eps": 1.0, "ddof": 0}, [x / ((26 / 9) ** 0.5 + 1) for x in (-2 / 3, -5 / 3, 7 / 3)]),
        ({"weights": {"style": 0.0}}, [2 / 3, -1 / 3, -1 / 3]),
        ({"weights": {"accuracy": 3.0, "style": 0.5}}, [4 / 3, -5 / 3, 1 / 3]),
        # each has deviations in the ratio 2 : -1 : -1, of std 1/sqrt(3) and 4/sqrt(3) with ddof 1
        ({"combine": "normalize_each", "eps": 0.0}, [3**-0.5, -2 * 3**-0.5, 3**-0.5]),
        ({"combine": "normalize_each", "eps": 0.0, "ddof": 0}, [2**-0.5, -2 * 2**-0.5, 2**-0.5]),
        (
            {"combine": "normalize_each", "eps": 1.0},
            [2 / 3 / (3**-0.5 + 1) - 4 / 3 / (4 * 3**-0.5 + 1), -1 / 3 / (3**-0.5 + 1) - 4 / 3 / (4 * 3**-0.5 + 1),
             -1 / 3 / (3**-0.5 + 1) + 8 / 3 / (4 * 3**-0.5 + 1)],
        ),
    ],
)  # fmt: skip
def test_every_setting_reaches_the_advantages(settings: dict[str, Any], expected: list[float]) -> None:
    frame = normalize_rows(two_rewards(), NormalizeConfig(**settings)).filter(pl.col("group_id") == "a")
    assert frame["advantage"].to_list() == pytest.approx(expected, abs=1e-12)


def test_a_weight_for_a_reward_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names \['acuracy'\], the rewards are \['accuracy'\]"):
        normalize_rows(reward_rows(a=[1, 0]).lazy(), NormalizeConfig(weights={"acuracy": 1.0}))
