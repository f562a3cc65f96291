"""Batches: order as data, denominators, and the reasons for what is dropped."""

from typing import Any

import polars as pl
import pytest

from stages.batch import BatchConfig, batch_rows
from stages.normalize import NormalizeConfig, normalize_rows
from tests.builders import advantage_rows, completion_rows, reward_rows


def tokens(count: int) -> list[int]:
    return [7] * (count - 1) + [1]


def make(
    completions: list[dict[str, Any]], advantages: list[dict[str, Any]] | None = None, **config: Any
) -> pl.DataFrame:
    rows = completion_rows(*completions)
    given = advantage_rows(*(advantages or [{} for _ in completions])).select(
        "completion_id", "advantage", "drop_reason"
    )
    return batch_rows(rows, given, BatchConfig(**config), seed=0, iteration=3)


def reasons(frame: pl.DataFrame) -> dict[str, str | None]:
    return dict(frame.sort("completion_id").select("completion_id", "drop_reason").iter_rows())


def test_rows_stand_by_length_and_are_cut_by_padded_tokens() -> None:
    # two prompt tokens each: lengths 4, 8, 5, 4 -> 4, 4, 5 fill 3 x 5 = 15 of 16, then 8 alone
    frame = make([{"completion_token_ids": tokens(n)} for n in (2, 6, 3, 2)], microbatch_tokens=16)
    assert frame.select("completion_id", "microbatch", "row").rows() == [
        ("c0", 0, 0),
        ("c3", 0, 1),
        ("c2", 0, 2),
        ("c1", 1, 0),
    ]


def test_the_denominator_counts_the_trainable_tokens_of_the_optimizer_step() -> None:
    masked = {"completion_token_ids": [7, 8, 1], "loss_mask": [True, False, True]}
    assert make([{}, masked])["loss_denominator"].to_list() == [4.0, 4.0]


def test_groups_that_tell_nothing_leave_the_loss() -> None:
    flat = {"advantage": 0.0, "drop_reason": "zero_variance"}
    frame = make([{}, {"group_id": "h"}], [{}, flat])
    assert reasons(frame) == {"c0": None, "c1": "zero_variance"}
    assert frame["loss_denominator"].to_list() == [2.0, None]
    assert frame["optimizer_step"].to_list() == [0, None]


def test_groups_that_tell_nothing_can_count_in_the_denominator() -> None:
    flat = {"advantage": 0.0, "drop_reason": "zero_variance"}
    frame = make([{}, {"group_id": "h"}], [{}, flat], zero_variance="keep_in_denominator")
    assert frame["loss_denominator"].to_list() == [4.0, None]


@pytest.mark.parametrize(
    ("completion", "config", "reason"),
    [
        ({"finish_reason": "length"}, {"drop_truncated": True}, "truncated"),
        ({"finish_reason": "length"}, {}, None),
        ({"completion_token_ids": tokens(9)}, {"max_tokens": 10}, "too_long"),
        ({"completion_token_ids": tokens(8)}, {"max_tokens": 10}, None),
        ({"policy_iteration": 1}, {"max_policy_age": 1}, "stale"),
        ({"policy_iteration": 2}, {"max_policy_age": 1}, None),
        ({"policy_iteration": None}, {"max_policy_age": 1}, "stale"),
        ({"loss_mask": [False, False]}, {}, "no_trainable_token"),
        ({"engine": "import"}, {}, "not_sampled"),
        ({"finish_reason": "abort"}, {}, "aborted"),
    ],
)
def test_each_rule_drops_with_its_reason(
    completion: dict[str, Any], config: dict[str, Any], reason: str | None
) -> None:
    assert reasons(make([{}, {"policy_iteration": 3, **completion}], **config))["c1"] == reason


def test_a_completion_without_advantage_is_unscored() -> None:
    rows = completion_rows({}, {})
    given = advantage_rows({}).select("completion_id", "advantage", "drop_reason")
    assert reasons(batch_rows(rows, given, BatchConfig(), seed=0, iteration=0))["c1"] == "unscored"


def test_groups_are_dealt_to_optimizer_steps_whole() -> None:
    completions = [{"group_id": f"g{i // 4}", "completion_id": f"c{i:02d}"} for i in range(32)]
    advantages = [{"group_id": c["group_id"], "completion_id": c["completion_id"]} for c in completions]
    frame = make(completions, advantages, optimizer_steps=4)
    per_step = frame.group_by("optimizer_step").agg(pl.col("group_id").n_unique(), pl.len()).sort("optimizer_step")
    assert per_step.rows() == [(0, 2, 8), (1, 2, 8), (2, 2, 8), (3, 2, 8)]


def test_every_epoch_trains_every_row_in_steps_of_its_own() -> None:
    frame = make([{}, {"group_id": "h"}], epochs=2, optimizer_steps=2)
    assert sorted(frame["completion_id"]) == ["c0", "c0", "c1", "c1"]
    assert frame["optimizer_step"].to_list() == [0, 1, 2, 3]


def test_the_mean_of_an_optimizer_step_is_over_its_own_rows() -> None:
    completions = [{"group_id": f"g{i}", "completion_token_ids": tokens(i + 1)} for i in range(4)]
    rows = make(completions, [{"group_id": f"g{i}"} for i in range(4)], optimizer_steps=2)
    per_step = rows.group_by("optimizer_step").agg(
        pl.col("completion_token_ids").list.len().sum(), pl.col("loss_denominator").unique()
    )
    sums = {step: (total, denominators) for step, total, denominators in per_step.iter_rows()}
    assert all(denominators == [float(total)] for total, denominators in sums.values())
    assert sum(total for total, _ in sums.values()) == 10
    assert len(sums) == 2


def test_every_epoch_has_an_order_of_its_own() -> None:
    completions = [{"group_id": f"g{i}"} for i in range(12)]
    frame = make(completions, [{"group_id": f"g{i}"} for i in range(12)], epochs=3, optimizer_steps=12)
    orders = [frame.filter(pl.col("optimizer_step") // 12 == epoch)["group_id"].to_list() for epoch in range(3)]
    assert [sorted(order) for order in orders] == [sorted(orders[0])] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_more_steps_than_groups_leave_no_empty_step() -> None:
    assert make([{}, {}], optimizer_steps=3)["optimizer_step"].to_list() == [0, 0]


def test_nothing_to_train_is_a_batch_of_dropped_rows() -> None:
    frame = make([{}], [{"drop_reason": "unscored"}])
    assert frame["drop_reason"].to_list() == ["unscored"]


def test_truncated_sampling_is_undone_in_the_sampling_logprobs() -> None:
    frame = make([{"kept_mass": [0.5, 1.0], "sampling_logprobs": [-1.0, -2.0]}, {}])
    assert frame.sort("completion_id")["sampling_logprobs"].to_list() == [
        pytest.approx([-1.6931472, -2.0]),
        [-1.0, -1.0],
    ]


def test_no_row_is_lost() -> None:
    frame = make([{}, {"finish_reason": "length"}, {}], [{}, {}, {"drop_reason": "unscored"}], drop_truncated=True)
    assert sorted(frame["completion_id"]) == ["c0", "c1", "c2"]


def test_tokens_that_another_rule_drops_do_not_count_in_the_denominator() -> None:
    flat = {"advantage": 0.0, "drop_reason": "zero_variance"}
    cut = {"group_id": "h", "finish_reason": "length"}
    frame = make([{}, cut], [{}, flat], zero_variance="keep_in_denominator", drop_truncated=True)
    assert frame["loss_denominator"].to_list() == [2.0, None]
    assert reasons(frame)["c1"] == "truncated"


def test_the_denominator_is_shared_by_the_steps_that_exist() -> None:
    flat = {"advantage": 0.0, "drop_reason": "zero_variance"}
    frame = make([{}, {"group_id": "h"}], [{}, flat], zero_variance="keep_in_denominator", optimizer_steps=4)
    assert frame["loss_denominator"].to_list() == [4.0, None]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"aggregation": "token_mean"}, [9.0, 9.0, 9.0]),  # 2 + 4 + 3 tokens
        ({"aggregation": "row_mean"}, [6.0, 12.0, 9.0]),  # 3 rows
        ({"aggregation": "constant_length", "aggregation_tokens": 8}, [24.0, 24.0, 24.0]),
        ({"aggregation": "prompt_mean"}, [12.0, 12.0, 6.0]),  # 2 prompts, of 6 and 3 tokens
    ],
)
@pytest.mark.parametrize("is_kept", [False, True])
def test_the_mean_that_the_config_names_decides_the_denominators(
    config: dict[str, Any], expected: list[float], is_kept: bool
) -> None:
    lengths, groups = [2, 4, 3, 5, 5, 5], ["g", "g", "h", "flat", "flat", "flat"]
    rows = [{"completion_token_ids": tokens(n), "group_id": g} for n, g in zip(lengths, groups, strict=True)]
    flat = {"advantage": 0.0, "drop_reason": "zero_variance"}
    zero_variance = "keep_in_denominator" if is_kept else "drop"
    frame = make(rows, [{}, {}, {}, flat, flat, flat], **config, zero_variance=zero_variance)
    # kept, the flat group adds its 15 tokens, 3 rows or 1 prompt to the 9, 3 or 2
    factor = {"token_mean": 24 / 9, "prompt_mean": 3 / 2}.get(config["aggregation"], 2.0) if is_kept else 1.0
    found = frame.filter(pl.col("drop_reason").is_null()).sort("completion_id")["loss_denominator"]
    assert found.to_list() == pytest.approx([value * factor for value in expected])


@pytest.mark.parametrize("config", [{"aggregation": "constant_length"}, {"aggregation_tokens": 8}])
def test_a_constant_that_is_missing_or_not_used_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="constant_length wants a number of tokens"):
        BatchConfig(**config)


def gradient_per_informative_token(informative: int, flat: int, scale: str, zero_variance: str) -> float:
    """Return how much a token of an informative group weighs, |A| / denominator, times all tokens there are."""
    groups = {f"g{i}": [1.0, 0.0, 0.0, 1.0] if i < informative else [1.0] * 4 for i in range(informative + flat)}
    advantages = normalize_rows(reward_rows(**groups).lazy(), NormalizeConfig(scale=scale))
    completions = completion_rows(*advantages.select("completion_id", "group_id").to_dicts())
    config = BatchConfig.model_validate({"zero_variance": zero_variance})
    rows = batch_rows(completions, advantages, config, seed=0, iteration=0).filter(pl.col("drop_reason").is_null())
    return float((rows["advantage"].abs() / rows["loss_denominator"]).mean()) * 8 * (informative + flat)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.05])
def test_of_the_share_of_informative_groups_only_the_mean_makes_a_gradient_larger(scale: str, share: float) -> None:
    """Dropped, flat groups leave the mean to the others: 1 / share. Kept, they change nothing for the others."""
    informative = 20
    flat = round(informative / share) - informative
    for zero_variance, expected in (("drop", 1 / share), ("keep_in_denominator", 1.0)):
        whole = gradient_per_informative_token(informative, 0, scale, zero_variance)
        found = gradient_per_informative_token(informative, flat, scale, zero_variance)
        assert found / whole == pytest.approx(expected, rel=1e-9)
