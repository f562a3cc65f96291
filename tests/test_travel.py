"""The worked example's data: facts stand where they should, confusions do not, and answers are what their note says."""

import inspect
import json
import re
import unicodedata
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.functions import import_function
from pipeline.run_dir import RunDir
from stages.config import load_config
from stages.importing import import_completions, read_completions, read_questions
from stages.rewards.base import Score

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "travel"
RIGHT = ("grounded", "true_quote", "terse")
QUALITIES = {*RIGHT, "partly_right", "invented_quote", "wrong_city", "off_topic", "repetitive"}
QUOTE_MARKS = {"en": ('"', '"'), "de": ("\u201e", "\u201c"), "es": ("\u00ab", "\u00bb"), "fr": ("\u00ab", "\u00bb")}
QUOTE_MARKS["it"] = QUOTE_MARKS["es"]


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


QUESTIONS = read("questions.jsonl")
COMPLETIONS = read("completions.jsonl")
BY_TEXT = {row["question"]: row for row in QUESTIONS}


def plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def names(text: str, alias: str) -> bool:
    """Return whether the alias stands in the text as words of its own; in Japanese, which has no spaces, at all."""
    bound = "" if re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", alias) else r"\b"
    return re.search(bound + re.escape(plain(alias)) + bound, plain(text)) is not None


def facts_in(text: str, question: dict[str, Any]) -> int:
    return sum(any(names(text, alias) for alias in fact) for fact in question["facts"])


def confusions_in(text: str, question: dict[str, Any]) -> list[str]:
    """Return the forbidden aliases in the text, also inside of words: a matcher of any kind must agree."""
    return [alias for aliases in question["forbidden"] for alias in aliases if plain(alias) in plain(text)]


def quoted(completion: str, language: str) -> list[str]:
    """Return what stands between quotation marks, without the punctuation at its ends."""
    opening, closing = QUOTE_MARKS[language]
    return [plain(text).strip(" .,") for text in re.findall(f"{opening}([^{closing}]+){closing}", completion)]


def of_quality(*qualities: str) -> list[Any]:
    chosen = [(row, BY_TEXT[row["question"]]) for row in COMPLETIONS if row["quality"] in qualities]
    return [pytest.param(row["completion"], asked, id=f"{asked['id']} {row['quality']}") for row, asked in chosen]


def test_there_are_enough_questions_with_all_their_columns() -> None:
    assert len(QUESTIONS) >= 40
    columns = ["id", "question", "answer", "city", "language", "facts", "forbidden", "context"]
    assert [row["id"] for row in QUESTIONS if list(row) != columns or not all(row.values())] == []


def test_ids_and_questions_are_unique() -> None:
    assert [key for key, count in Counter(row["id"] for row in QUESTIONS).items() if count > 1] == []
    assert len(BY_TEXT) == len(QUESTIONS)


def test_several_languages_ask() -> None:
    languages = Counter(row["language"] for row in QUESTIONS)
    assert set(languages) >= {"en", "es", "ja", "de", "fr", "it"}
    assert languages["en"] > len(QUESTIONS) / 2


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["id"])
def test_every_fact_stands_in_the_passage_and_in_the_reference(row: dict[str, Any]) -> None:
    assert len(row["facts"]) >= 2
    assert facts_in(row["context"], row) == len(row["facts"])
    assert facts_in(row["answer"], row) == len(row["facts"])


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["id"])
def test_no_confusion_stands_in_passage_reference_or_question(row: dict[str, Any]) -> None:
    assert len(row["forbidden"]) >= 2
    assert confusions_in(" ".join((row["context"], row["answer"], row["question"])), row) == []


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["id"])
def test_passages_have_the_length_of_a_paragraph(row: dict[str, Any]) -> None:
    length = len(row["context"]) / 2 if row["language"] == "ja" else len(row["context"].split())
    assert 60 <= length <= 120


def test_every_question_has_a_group_of_four_to_six_different_answers() -> None:
    sizes = Counter(row["question"] for row in COMPLETIONS)
    assert set(sizes) == set(BY_TEXT)
    assert set(sizes.values()) == {4, 5, 6}, "even and uneven groups"
    assert len({(row["question"], row["completion"]) for row in COMPLETIONS}) == len(COMPLETIONS)


def test_every_kind_of_answer_is_there_often_and_every_group_has_a_good_one() -> None:
    counts = Counter(row["quality"] for row in COMPLETIONS)
    assert set(counts) == QUALITIES
    assert min(counts.values()) >= 15
    assert {row["question"] for row in COMPLETIONS if row["quality"] == "grounded"} == set(BY_TEXT)


@pytest.mark.parametrize(("completion", "question"), of_quality(*RIGHT))
def test_right_answers_name_every_fact_and_no_confusion(completion: str, question: dict[str, Any]) -> None:
    assert facts_in(completion, question) == len(question["facts"])
    assert confusions_in(completion, question) == []


@pytest.mark.parametrize(("completion", "question"), of_quality("wrong_city"))
def test_answers_about_another_city_name_a_confusion_and_not_all_facts(
    completion: str, question: dict[str, Any]
) -> None:
    assert confusions_in(completion, question) != []
    assert facts_in(completion, question) < len(question["facts"])


@pytest.mark.parametrize(("completion", "question"), of_quality("partly_right"))
def test_partly_right_answers_name_some_facts(completion: str, question: dict[str, Any]) -> None:
    assert 0 < facts_in(completion, question) < len(question["facts"])
    assert confusions_in(completion, question) == []


@pytest.mark.parametrize(("completion", "question"), of_quality("off_topic"))
def test_answers_off_the_topic_name_no_fact(completion: str, question: dict[str, Any]) -> None:
    assert facts_in(completion, question) == 0


@pytest.mark.parametrize(("completion", "question"), of_quality("repetitive"))
def test_repetitive_answers_are_few_words_again_and_again(completion: str, question: dict[str, Any]) -> None:
    text = plain(completion)
    pieces = re.findall(r"\w+", text) if question["language"] != "ja" else re.findall(r"\w{4}", text)
    assert len(set(pieces)) <= len(pieces) / 2


@pytest.mark.parametrize(("completion", "question"), of_quality("invented_quote"))
def test_invented_quotes_stand_nowhere_in_the_passage(completion: str, question: dict[str, Any]) -> None:
    assert quoted(completion, question["language"])
    assert [text for text in quoted(completion, question["language"]) if text in plain(question["context"])] == []


@pytest.mark.parametrize(("completion", "question"), of_quality("true_quote"))
def test_true_quotes_stand_in_the_passage_word_for_word(completion: str, question: dict[str, Any]) -> None:
    assert quoted(completion, question["language"])
    assert [text for text in quoted(completion, question["language"]) if text not in plain(question["context"])] == []


@pytest.mark.parametrize("quality", sorted(QUALITIES - {"true_quote", "invented_quote"}))
def test_other_english_answers_quote_nothing(quality: str) -> None:
    assert [row["completion"] for row in COMPLETIONS if row["quality"] == quality and '"' in row["completion"]] == []


def test_the_config_is_a_valid_one_with_five_named_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(Path("configs/travel.toml"))
    assert [reward.name for reward in config.score.rewards] == [
        "accuracy",
        "relevance",
        "fluency",
        "alignment",
        "quotes",
    ]
    assert set(config.normalize.weights) == {reward.name for reward in config.score.rewards}
    assert len(read_questions(config.prompts)) == len(QUESTIONS) >= config.prompts.prompts_per_iteration


def test_the_example_can_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(Path("configs/travel.toml"))
    file = Path("configs/travel/completions.jsonl")
    assert len(read_completions(file, read_questions(config.prompts))) == len(COMPLETIONS)
    result = import_completions(config.prompts, file, RunDir(tmp_path / "run"))
    completions = result.main.read()
    assert completions.select(pl.len(), pl.col("group_id").n_unique()).row(0) == (len(COMPLETIONS), len(QUESTIONS))
    assert result.outputs["prompts"].read()["drop_reason"].null_count() == len(QUESTIONS)


def test_the_five_rewards_together_put_the_kinds_of_answers_in_their_order() -> None:
    config = load_config(ROOT / "configs" / "travel.toml")
    totals: dict[str, list[float]] = {}
    for row in COMPLETIONS:
        known = {**BY_TEXT[row["question"]], "completion": row["completion"], "prompt": row["question"]}
        total = 0.0
        for reward in config.score.rewards:
            function, _ = import_function(reward.function)
            arguments = {name: known[name] for name in inspect.signature(function).parameters if name in known}
            score = function(**arguments, **reward.arguments)
            assert isinstance(score, Score)
            assert score.reward is not None
            total += config.normalize.weights[reward.name] * score.reward
        totals.setdefault(row["quality"], []).append(total)
    order = sorted(totals, key=lambda quality: -sum(totals[quality]) / len(totals[quality]))
    assert order[:5] == ["grounded", "true_quote", "terse", "invented_quote", "partly_right"]


def test_the_imported_example_can_be_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.commands.verify import print_verification
    from flows.printing import Format
    from flows.session import Session
    from pipeline.run_dir import RunDir
    from stages.config import load_config
    from stages.importing import import_completions

    monkeypatch.chdir(Path(__file__).parent.parent)
    settings = load_config(Path("configs/travel.toml"))
    run = RunDir(tmp_path / "travel")
    import_completions(settings.prompts, Path("configs/travel/completions.jsonl"), run)
    run.record_config("", settings.model_dump(mode="json"))
    with closing(Session(settings, run)) as session:
        session.perform("score", 0)
        session.perform("normalize", 0)
    assert print_verification(run.root, 20, Format.table)
