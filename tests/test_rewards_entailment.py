"""Grounding by natural language inference, on tiny classifiers whose outputs are known."""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import RewardError
from stages.rewards.models.entailment import entailment, label_roles
from tests.tiny_models import NLI, answer_rows, detail, save_last_word_classifier


def with_context(*contexts: Any, completion: str = "the sky is blue.") -> pl.DataFrame:
    return answer_rows(*({"completion": completion, "metadata": json.dumps({"context": c})} for c in contexts))


def test_entailment_is_the_probability_of_entailment(nli: str) -> None:
    found = entailment(with_context("the sky is blue"), nli)
    assert found["reward"].to_list() == pytest.approx([0.5])
    assert detail(found)["sentences"] == [
        {
            "sentence": "the sky is blue.",
            "passage": 0,
            "entailment": pytest.approx(0.5),
            "contradiction": pytest.approx(0.25),
            "neutral": pytest.approx(0.25),
        }
    ]


def test_contradiction_takes_away_its_weight(nli: str) -> None:
    found = entailment(with_context("the sky is blue"), nli, contradiction_weight=2.0)
    assert found["reward"].to_list() == pytest.approx([0.0], abs=1e-6)  # 1/2 - 2 x 1/4


def test_entailment_combines_sentences_by_mean_or_minimum(tmp_path: Path) -> None:
    save_last_word_classifier(tmp_path / "nli", [{"red": math.log(3)}, {}], {0: "entailment", 1: "not_entailment"})
    rows = with_context("the sky", completion="the sky is red\nthe sky is blue")
    assert entailment(rows, str(tmp_path / "nli"))["reward"][0] == pytest.approx(0.625, abs=1e-5)  # 3/4 and 1/2
    assert entailment(rows, str(tmp_path / "nli"), combine="min")["reward"][0] == pytest.approx(0.5)


def test_a_sentence_is_held_against_the_passage_that_entails_it_most(tmp_path: Path) -> None:
    path = str(tmp_path / "nli")
    save_last_word_classifier(
        tmp_path / "nli", [{"blue": 4.0}, {}, {}], {0: "ENTAILMENT", 1: "x", 2: "y"}, looks_around=True
    )
    found = entailment(with_context(["red red", "blue blue", "green"], "red red", completion="the sky"), path)
    assert detail(found)["sentences"][0]["passage"] == 1
    assert found["reward"][0] > found["reward"][1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("context", [None, 7, [], ["", " "], [1]])
def test_entailment_is_null_without_a_context(nli: str, context: Any) -> None:
    found = entailment(with_context(context), nli)
    assert found["reward"].to_list() == [None]
    assert found["error"][0] == "the metadata has no context with a text or a list of texts"


def test_entailment_of_an_empty_answer_is_the_documented_value(nli: str) -> None:
    found = entailment(with_context("the sky", completion=" "), nli)
    assert (found["reward"][0], detail(found)) == (0.0, {"sentences": []})


def test_entailment_never_cuts_a_passage(nli: str) -> None:
    found = entailment(with_context("the sky " * 40, "the sky"), nli)
    assert found["reward"].to_list() == [None, pytest.approx(0.5)]
    assert "86 tokens together, the model reads 64" in found["error"][0]  # 80, <eos>, 5 of the sentence


def test_entailment_finds_the_context_under_another_key(nli: str) -> None:
    rows = answer_rows({"metadata": json.dumps({"source": "the sky"})})
    assert entailment(rows, nli, context_key="source")["reward"].to_list() == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("names", "labels", "roles"),
    [
        (NLI, None, {"entailment": 1, "contradiction": 0, "neutral": 2}),
        ({0: "ENTAILMENT", 1: "NOT_ENTAILMENT"}, None, {"entailment": 0}),
        ({0: "LABEL_0", 1: "LABEL_1"}, {"entailment": 1}, {"entailment": 1}),
    ],
)
def test_labels_are_read_by_name_or_given(names: Any, labels: Any, roles: Any) -> None:
    assert label_roles(names, labels, 0.0) == roles


@pytest.mark.parametrize(
    ("names", "labels", "weight"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, None, 0.0),
        ({0: "entailment", 1: "not_entailment"}, None, 1.0),
        ({0: "a", 1: "b"}, {"entailment": 2}, 0.0),
        ({0: "a", 1: "b"}, {"entailment": 0, "contradiction": 0}, 1.0),
        ({0: "a", 1: "b"}, {"entailed": 0}, 0.0),
    ],
)
def test_unclear_labels_are_refused(names: Any, labels: Any, weight: float) -> None:
    with pytest.raises(RewardError, match="give the argument labels"):
        label_roles(names, labels, weight)
