"""Rewards for speaking of what the prompt asks."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.text.relevance import bm25, bm25_identity, coverage
from stages.rewards.words import sentences, words
from tests.work import check_case, instructions, reward_cases

CORPUS = "red apple\nred pear\n\ngreen pear plum\n"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("case", reward_cases("relevance"), ids=lambda case: case["case"])
def test_the_tabulated_cases_hold(case: dict[str, Any]) -> None:
    check_case(case)


def test_a_rare_word_of_the_corpus_weighs_more(corpus: str) -> None:
    # idf: apple ln(1 + 2.5 / 1.5), red ln(1 + 1.5 / 2.5); damping 1.2 * (0.25 + 0.75 * 1 / (7 / 3))
    score = bm25("apple", "red apple", corpus=corpus)
    assert score.reward == pytest.approx(0.401044, abs=1e-6)
    assert score.detail["matched"] == {"apple": {"count": 1, "idf": 0.980829}}
    red = bm25("red", "red apple", corpus=corpus).reward
    assert score.reward is not None
    assert red is not None
    assert red < score.reward


def test_a_word_that_the_corpus_lacks_has_the_highest_weight(corpus: str) -> None:
    assert bm25("mango", "mango", corpus=corpus).detail["matched"]["mango"]["idf"] == pytest.approx(
        math.log(8), abs=1e-6
    )


def test_the_scores_are_those_of_bm25s(corpus: str) -> None:
    bm25s = pytest.importorskip("bm25s")
    documents = [words(line) for line in CORPUS.splitlines() if line]
    retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    retriever.index(documents, show_progress=False)
    theirs = retriever.get_scores(["red", "pear"])
    ours = [bm25(" ".join(document), "red pear", corpus=corpus).reward for document in documents]
    weights = math.log(1.6) + math.log(1.6)  # both stand in two of three documents
    assert [value and value * weights for value in ours] == pytest.approx(list(theirs), abs=1e-6)


def test_an_answer_never_reaches_1() -> None:
    reward = bm25("capital " * 10_000, "capital", average_words=1_000_000).reward
    assert reward is not None
    assert 0.99 < reward < 1


def test_a_jsonl_corpus_is_read_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"body": "red apple"}\n{"body": "red pear"}\n{"body": "green pear plum"}\n', encoding="utf-8")
    assert bm25("apple", "red apple", corpus=str(path), corpus_key="body").reward == pytest.approx(0.401044, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", '{"text": "x"}\nnonsense\n', "line 2 of the corpus"),
        ("c.jsonl", '{"other": "x"}\n', "corpus_key"),
        ("c.txt", " \n", "has no content words"),
    ],
)
def test_an_unusable_corpus_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RewardError, match=message):
        bm25_identity(corpus=str(tmp_path / name))


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="where no file is"):
        bm25_identity(corpus=str(tmp_path / "none.txt"))


def test_the_identity_has_the_digest_of_the_corpus_and_not_its_place(corpus: str) -> None:
    identity = bm25_identity(corpus=corpus, k1=2.0)
    assert identity["corpus"] == hashlib.sha256(CORPUS.encode()).hexdigest()
    assert identity["k1"] == 2.0
    assert corpus not in str(identity)


def test_words_of_any_script() -> None:
    assert words("France's well-kept 3.14") == ["france", "s", "well", "kept", "3.14"]
    assert words("\uff21\uff22\uff11 so\u00adft \U0001f600") == ["ab1", "soft"]  # full width, soft hyphen, emoji
    assert words("\u732b\u5750 a\u30fc") == ["\u732b", "\u5750", "a", "\u30fc"]
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"
    assert words(hindi) == [hindi]  # its vowels are marks


def test_sentences_end_at_marks_of_any_script_and_at_lines() -> None:
    text = 'He said "no." Then\u2026 \u4f60\u597d\u3002\u518d\u89c1 3.14 x\n\ny'
    assert sentences(text) == ['He said "no."', "Then\u2026", "\u4f60\u597d\u3002", "\u518d\u89c1 3.14 x", "y"]
    assert sentences('It is 3.5 m. "Is it?" Yes!\n- a line') == ["It is 3.5 m.", '"Is it?"', "Yes!", "- a line"]


@pytest.mark.parametrize("function", [bm25, coverage])
def test_the_work_grows_with_the_answer_and_no_faster(function: Any) -> None:
    function("a b", "cat a", stop_words="none")
    small = instructions(lambda: function("a cat " * 1000, "cat a", stop_words="none"))
    large = instructions(lambda: function("a cat " * 2000, "cat a", stop_words="none"))
    assert large <= 2.1 * small


@pytest.mark.parametrize("unit", ["a ", "1,", "\u0e01"])
def test_a_megabyte_of_anything_is_scored(unit: str) -> None:
    # a quadratic step would need some 10^12 operations here
    assert coverage(unit * (1_000_000 // len(unit)), "cat").reward == 0.0
    assert bm25(unit * (1_000_000 // len(unit)), "cat").reward == 0.0
