"""normalize: what it refuses."""

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


def test_a_weight_for_a_reward_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names \['acuracy'\], the rewards are \['accuracy'\]"):
        normalize_rows(reward_rows(a=[1, 0]).lazy(), NormalizeConfig(weights={"acuracy": 1.0}))
