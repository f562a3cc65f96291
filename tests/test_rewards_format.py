"""Form and length: what holds for any length, and what decides a reward that calls another one."""

import itertools
import math
from typing import Any

import polars as pl
import pytest

from pipeline.errors import RewardError
from stages.rewards.answers.format import cosine_length, cosine_length_identity, soft_overlong, tags_in_order
from stages.rewards.functions import RewardConfig, find_reward
from tests.vectors import VECTORS

EXACT = "stages.rewards.answers.matching:exact_match"
SYMBOLIC = "stages.rewards.answers.symbolic:math_match"


def length_reward(answer: str, num_tokens: int) -> float:
    reward = cosine_length(answer, num_tokens, max_tokens=1000, verifier=EXACT, reference="7").reward
    assert reward is not None
    return reward


def test_right_answers_lose_and_wrong_answers_win_by_every_further_token() -> None:
    right = [length_reward("7", n) for n in range(1000)]
    wrong = [length_reward("8", n) for n in range(1000)]
    assert all(a > b for a, b in itertools.pairwise(right))
    assert all(a < b for a, b in itertools.pairwise(wrong))
    assert min(right) > max(wrong)


def test_the_cosine_at_two_thirds_of_the_length() -> None:
    # 1 + (2 - 1) (1 + cos 120 degrees) / 2 = 1 + 0.5 / 2
    reward = cosine_length("7", 20, max_tokens=30, verifier=EXACT, reference="7").reward
    assert reward is not None
    assert math.isclose(reward, 1.25)


def test_the_identity_of_a_length_reward_follows_its_verifier() -> None:
    given: dict[str, Any] = {"max_tokens": 10, "verifier": EXACT, "verifier_arguments": {"ignore_case": True}}
    identity = cosine_length_identity(**given)
    exact = RewardConfig(name="right", function=EXACT, arguments={"ignore_case": True})
    assert identity["verifier"] == find_reward(exact).recipe
    assert (identity["max_tokens"], identity["correct_short"], identity["exceeded"]) == (10, 2.0, -10.0)
    for change in ({"max_tokens": 11}, {"verifier_arguments": {}}, {"verifier": SYMBOLIC, "verifier_arguments": {}}):
        assert cosine_length_identity(**given | change) != identity


def test_a_verifier_that_lacks_an_argument_is_refused() -> None:
    with pytest.raises(RewardError, match=r"'verifier' \(.*exact_match\) has no parameters \['digits'\]"):
        cosine_length_identity(max_tokens=10, verifier=EXACT, verifier_arguments={"digits": 3})


def test_the_overlong_punishment_equals_the_golden_values() -> None:
    golden = VECTORS["advantages"]["soft_overlong_punishment"]
    lengths = [case["length"] for case in golden["cases"]]
    frame = pl.DataFrame({"num_tokens": lengths, "finish_reason": ["stop"] * len(lengths)})
    found = frame.select(soft_overlong(golden["L_max"], golden["L_cache"]).alias("r")).unnest("r")["reward"]
    assert found.to_list() == [case["reward"] for case in golden["cases"]]


def test_the_overlong_punishment_never_rises_and_stays_between_minus_one_and_zero() -> None:
    frame = pl.DataFrame({"num_tokens": range(200), "finish_reason": ["stop"] * 200})
    rewards = frame.select(soft_overlong(100, 30).alias("r")).unnest("r")["reward"].to_list()
    assert rewards == sorted(rewards, reverse=True)
    assert (rewards[70], rewards[85], rewards[100], rewards[199]) == (0.0, -0.5, -1.0, -1.0)


@pytest.mark.parametrize(("max_tokens", "buffer_tokens"), [(10, 11), (10, -1), (0, 0)])
def test_a_buffer_that_does_not_fit_is_refused(max_tokens: int, buffer_tokens: int) -> None:
    with pytest.raises(RewardError, match="expected 0 < buffer_tokens <= max_tokens"):
        soft_overlong(max_tokens, buffer_tokens)


def test_a_tag_named_inside_another_word_is_no_tag() -> None:
    assert tags_in_order("<thinking>a</thinking>", tags=["think"]).detail["problem"] == "no <think>"
