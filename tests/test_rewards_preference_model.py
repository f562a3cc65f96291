"""Rewards by a reward model, on tiny ones whose logits are known."""

from pathlib import Path

import pytest

from pipeline.errors import RewardError
from stages.rewards.models.preference_model import preference_score
from tests.tiny_models import answer_rows, detail, save_constant_classifier, save_last_word_reward_model


def test_the_reward_is_the_logit_of_the_conversation(reward_model: str) -> None:
    rows = answer_rows({"completion": "is red"}, {"completion": "the sky is blue"}, {"completion": "green"})
    found = preference_score(rows, reward_model)
    assert found["reward"].to_list() == pytest.approx([1.5, -2.0, 0.0], abs=1e-4)
    assert detail(found)["tokens"] == 8  # user : the sky assistant : is red


def test_the_logit_can_be_squashed(reward_model: str) -> None:
    found = preference_score(answer_rows({"completion": "blue"}, {"completion": "green"}), reward_model, squash=True)
    assert found["reward"].to_list() == pytest.approx([0.1192029, 0.5], abs=1e-4)


def test_without_chat_template_prompt_and_answer_are_a_pair(tmp_path: Path) -> None:
    save_last_word_reward_model(tmp_path / "rm", chat=False, scores={"red": 1.5})
    found = preference_score(answer_rows({"completion": "is red", "prompt": "the sky"}), str(tmp_path / "rm"))
    assert found["reward"].to_list() == pytest.approx([1.5], abs=1e-4)
    assert detail(found)["tokens"] == 5  # the sky <eos> is red


def test_an_empty_answer_is_scored_like_any_other(tmp_path: Path) -> None:
    save_constant_classifier(tmp_path / "rm", [0.75])
    assert preference_score(answer_rows({"completion": ""}), str(tmp_path / "rm"))["reward"].to_list() == [0.75]


def test_a_reward_model_without_padding_token_gets_the_tokenizers(tmp_path: Path) -> None:
    save_last_word_reward_model(tmp_path / "rm", chat=True, scores={"red": 1.5}, pad=None)
    rows = answer_rows({"completion": "red"}, {"completion": "the sky is red"})
    assert preference_score(rows, str(tmp_path / "rm"))["reward"].to_list() == pytest.approx([1.5, 1.5], abs=1e-4)


def test_a_conversation_over_the_context_is_null(reward_model: str) -> None:
    found = preference_score(answer_rows({"completion": "red " * 27}, {"completion": "red " * 26}), reward_model)
    assert found["reward"].to_list() == [None, pytest.approx(1.5, abs=1e-4)]
    assert "33 tokens, the model reads 1 to 32" in found["error"][0]


def test_classifiers_that_are_no_reward_models_are_refused(nli: str, uniform: str) -> None:
    with pytest.raises(RewardError, match="3 labels"):
        preference_score(answer_rows({}), nli)
    with pytest.raises(RewardError, match=r"lacks 1 weights of LlamaForSequenceClassification, such as score\.weight"):
        preference_score(answer_rows({}), uniform)
