"""Fluency by a language model, on tiny ones whose probabilities are known."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.models.perplexity import perplexity, perplexity_identity
from tests.tiny_models import answer_rows, detail, save_favourite_lm, save_uniform_lm


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(uniform: str) -> None:
    found = perplexity(answer_rows({"completion": "the sky is blue"}), uniform, worst=196.0)
    assert detail(found)["perplexity"] == pytest.approx(14.0, rel=1e-6)
    assert detail(found)["tokens"] == 4
    assert found["reward"][0] == pytest.approx(0.5)  # log 14 is half of log 196


def test_perplexity_names_the_worst_token(tmp_path: Path) -> None:
    save_favourite_lm(tmp_path / "lm", "red")
    found = perplexity(answer_rows({"completion": "red blue red"}), str(tmp_path / "lm"), worst=104.0)
    # probabilities 1/2, 1/26, 1/2: perplexity 104^(1/3)
    assert found["reward"][0] == pytest.approx(2 / 3, abs=1e-5)
    assert detail(found)["perplexity"] == pytest.approx(4.7026694, rel=1e-4)
    assert detail(found)["worst_token"] == {"index": 1, "text": "blue", "logprob": pytest.approx(-3.2580965, abs=1e-4)}


@pytest.mark.parametrize(("worst", "best", "reward"), [(14.0 - 1e-3, 1.0, 0.0), (100.0, 14.0 + 1e-3, 1.0)])
def test_perplexity_ends_at_0_and_1(uniform: str, worst: float, best: float, reward: float) -> None:
    assert perplexity(answer_rows({}), uniform, worst=worst, best=best)["reward"].to_list() == [reward]


@pytest.mark.parametrize(("given", "before"), [("nothing", 1), ("prompt", 3), ("messages", 6)])
def test_perplexity_reads_what_it_is_given_before_the_answer(uniform: str, given: Any, before: int) -> None:
    # <bos> / <bos> the sky / user : the sky assistant :
    found = perplexity(answer_rows({"completion": "blue " * 40, "prompt": "the sky"}), uniform, given=given)
    assert found["reward"].to_list() == [None]
    assert f"40 tokens after {before} of its context, the model reads 32" in found["error"][0]


def test_without_anything_before_it_the_first_token_is_not_scored(tmp_path: Path) -> None:
    save_uniform_lm(tmp_path / "lm", bos=False)
    found = perplexity(answer_rows({"completion": "blue sky"}, {}), str(tmp_path / "lm"), given="nothing", worst=196.0)
    assert found["reward"].to_list() == [pytest.approx(0.5), None]
    assert detail(found)["tokens"] == 1
    assert detail(found)["worst_token"]["index"] == 1
    assert "nothing before it" in found["error"][1]


def test_perplexity_of_an_empty_answer_is_the_documented_value(uniform: str) -> None:
    found = perplexity(answer_rows({"completion": ""}), uniform)
    assert (found["reward"][0], detail(found)) == (0.0, {"tokens": 0})


def test_perplexity_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    save_favourite_lm(tmp_path / "lm", "red")
    rows = answer_rows({"completion": "red"}, {"completion": "blue sky is the"}, {"completion": "red blue"})
    one = perplexity(rows, str(tmp_path / "lm"), batch_size=1)["reward"].to_list()
    assert perplexity(rows, str(tmp_path / "lm"), batch_size=3)["reward"].to_list() == pytest.approx(one, abs=1e-6)
    # perplexities 2, 26 and sqrt(52) of at most 100
    assert one == pytest.approx([0.8494850, 0.2925133, 0.5709992], abs=1e-5)


def test_perplexity_refuses_what_is_no_language_model_and_senseless_arguments(nli: str, uniform: str) -> None:
    with pytest.raises(RewardError, match="causal language model"):
        perplexity(answer_rows({}), nli)
    with pytest.raises(RewardError, match="1 <= best < worst"):
        perplexity_identity(model=uniform, best=5.0, worst=5.0)
    with pytest.raises(RewardError, match="expected one of messages, prompt, nothing"):
        perplexity_identity(model=uniform, given="all")
