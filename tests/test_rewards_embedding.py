"""Relevance by an embedding model, on tiny encoders whose outputs are known."""

from pathlib import Path

import pytest

from pipeline.errors import RewardError
from stages.rewards.models.embedding import embedding, embedding_identity
from tests.tiny_models import answer_rows, detail, save_random_encoder


def test_embedding_is_the_cosine_of_the_mean_word_vectors(encoder: str) -> None:
    rows = answer_rows(
        {"completion": "red", "prompt": "blue"},  # (1, 0) . (3, 4) / 5
        {"completion": "red green", "prompt": "green"},  # (0.5, 0.5) . (0, 1) / sqrt(0.5)
        {"completion": "minus", "prompt": "red"},
        {"completion": "green", "prompt": "red"},
    )
    found = embedding(rows, encoder)
    assert found["reward"].to_list() == pytest.approx([0.6, 0.70710678, -1.0, 0.0])
    assert detail(found, 1) == {"against": "prompt", "tokens": 2}


def test_embedding_to_the_reference_is_null_without_one(encoder: str) -> None:
    rows = answer_rows({"completion": "green", "reference": "blue"}, {"completion": "green", "reference": None})
    found = embedding(rows, encoder, against="reference")
    assert found["reward"].to_list() == [pytest.approx(0.8), None]
    assert found["error"].to_list() == [None, "the row has no reference to compare the answer with"]


def test_embedding_of_an_empty_answer_is_the_documented_value(encoder: str) -> None:
    rows = answer_rows({"completion": " \n", "prompt": "red"})
    assert embedding(rows, encoder)["reward"].to_list() == [0.0]
    assert embedding(rows, encoder, empty=-0.5)["reward"].to_list() == [-0.5]


def test_embedding_never_cuts_a_text(encoder: str) -> None:
    found = embedding(answer_rows({"completion": "red " * 9, "prompt": "red"}), encoder)
    assert found["reward"].to_list() == [None]
    assert "9 tokens and the prompt 1, the model reads 8" in found["error"][0]


def test_embedding_never_cuts_for_a_transformer_either(tmp_path: Path) -> None:
    save_random_encoder(tmp_path / "encoder", context=16)
    rows = answer_rows({"completion": "red " * 16, "prompt": "red"}, {"completion": "red " * 17, "prompt": "red"})
    found = embedding(rows, str(tmp_path / "encoder"))
    assert found["reward"].is_null().to_list() == [False, True]
    assert "17 tokens and the prompt 1, the model reads 16" in found["error"][1]


def test_embedding_puts_the_prefixes_before_the_texts(encoder: str) -> None:
    rows = answer_rows({"completion": "green", "prompt": "red"})
    # (0.5, 0.5) . (1, 0) / sqrt(0.5); (0.5, 0.5) . (0.5, 0.5) / 0.5
    assert embedding(rows, encoder, answer_prefix="red ")["reward"][0] == pytest.approx(0.70710678)
    assert embedding(rows, encoder, answer_prefix="red ", against_prefix="green ")["reward"][0] == pytest.approx(1.0)


def test_embedding_does_not_depend_on_the_batch_size(encoder: str) -> None:
    rows = answer_rows(*({"completion": "red " * n + "green", "prompt": "red"} for n in (3, 1, 5, 2)))
    one = embedding(rows, encoder, batch_size=1)["reward"].to_list()
    assert embedding(rows, encoder, batch_size=3)["reward"].to_list() == pytest.approx(one, abs=1e-6)
    # (n, 1) . (1, 0) / sqrt(n^2 + 1)
    assert one == pytest.approx([0.9486833, 0.7071068, 0.9805807, 0.8944272])


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "modules.json").write_text("no json", encoding="utf-8")
    with pytest.raises(RewardError, match="cannot be loaded by sentence-transformers"):
        embedding(answer_rows({}), str(tmp_path / "empty"))
    with pytest.raises(RewardError, match="expected prompt or reference"):
        embedding_identity(model=str(tmp_path / "empty"), against="question")
