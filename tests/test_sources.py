"""Sources: files, generated tasks, and the split into training and held-out questions."""

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import SourceError
from stages.source_rows import SourceRow, is_held_out
from stages.sources import SourceConfig, draw, source_identity
from stages.tables import file_records, read_table

SUMS = SourceConfig(source="reasoning_gym:chain_sum", options={"min_terms": 2, "max_terms": 2, "max_digits": 2})


def questions(rows: list[SourceRow]) -> list[str]:
    return [row.question for row in rows]


def file_source(tmp_path: Path, count: int = 20, name: str = "rows.jsonl") -> SourceConfig:
    frame = pl.DataFrame({"question": [f"q{i}" for i in range(count)], "answer": [str(i) for i in range(count)]})
    path = tmp_path / name
    {"jsonl": frame.write_ndjson, "parquet": frame.write_parquet, "csv": frame.write_csv}[name.split(".")[1]](path)
    return SourceConfig(source=str(path))


def take(config: SourceConfig, turn: int = 0, count: int = 4, seed: int = 0, split: str = "train", share: float = 0.0):  # type: ignore[no-untyped-def]
    return draw(config, split=split, held_out_share=share, count_=count, seed=seed, iteration=turn)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = take(file_source(tmp_path, name=name), count=20)
    assert sorted((row.question, row.reference_answer) for row in rows) == sorted((f"q{i}", str(i)) for i in range(20))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_path_with_brackets_is_no_pattern(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "[a-z]*?" / f"rows{suffix}"
    path.parent.mkdir()
    rows = pl.DataFrame({"question": ["1 + 1 ="]})
    {".jsonl": rows.write_ndjson, ".csv": rows.write_csv, ".parquet": rows.write_parquet}[suffix](path)
    assert [record for _, record in file_records(path)] == rows.to_dicts()
    assert read_table(path).to_dicts() == rows.to_dicts()


def test_an_epoch_holds_each_row_once_and_the_next_one_is_shuffled_anew(tmp_path: Path) -> None:
    source = file_source(tmp_path)
    first = [q for turn in range(5) for q in questions(take(source, turn))]
    second = [q for turn in range(5, 10) for q in questions(take(source, turn))]
    assert len(set(first)) == len(set(second)) == 20
    assert first != second


def test_the_same_turn_gives_the_same_rows(tmp_path: Path) -> None:
    source = file_source(tmp_path)
    assert take(source, 3) == take(source, 3)
    assert take(SUMS, 3) == take(SUMS, 3)
    assert questions(take(SUMS, 3)) != questions(take(SUMS, 4))
    assert questions(take(SUMS, 3)) != questions(take(SUMS, 3, seed=1))


def test_training_never_sees_a_held_out_question() -> None:
    held_out = set(questions(take(SUMS, 0, 200, split="held_out", share=0.2)))
    trained = {q for turn in range(20) for q in questions(take(SUMS, turn, 100, share=0.2))}
    assert len(held_out) == 200
    assert not held_out & trained


def test_the_held_out_share_is_about_what_was_asked() -> None:
    rows = take(SUMS, 0, 2000)
    assert 0.07 < sum(is_held_out(row.messages, 0.1) for row in rows) / len(rows) < 0.13


def test_generated_questions_of_a_turn_are_different() -> None:
    drawn = questions(take(SUMS, 0, 500))
    assert len(set(drawn)) == 500


def test_metadata_holds_the_rest_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "city": "Rome"}) + "\n")
    assert take(SourceConfig(source=str(path)), count=1)[0].metadata == '{"answer":"a","city":"Rome","question":"q"}'


def test_messages_are_used_as_they_stand_after_the_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    row = take(SourceConfig(source=str(path), answer_column=None, system_prompt="Be brief."), count=1)[0]
    assert row.messages == [{"role": "system", "content": "Be brief."}, *turns]
    assert row.reference_answer is None


def test_a_changed_file_has_another_identity(tmp_path: Path) -> None:
    source = file_source(tmp_path)
    before = source_identity(source)
    Path(source.source).write_text('{"question": "other", "answer": "1"}\n')
    assert source_identity(source) != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:nonsense", "reasoning-gym has no task 'nonsense': choose one of .*chain_sum"),
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("some/dataset", r"need prompts\.revision"),
    ],
)
def test_a_source_that_is_none_is_named(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        take(SourceConfig(source=source))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv"])
def test_an_empty_source_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("question,answer\n" if name.endswith("csv") else "")
    with pytest.raises(SourceError, match="is empty: expected at least one row"):
        take(SourceConfig(source=str(path)))


def test_too_few_rows_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has 20 different train rows, 21 are wanted"):
        take(file_source(tmp_path), count=21)


def test_wrong_options_of_a_task_are_named() -> None:
    with pytest.raises(SourceError, match=r"options do not fit the reasoning-gym task chain_sum: .*nonsense"):
        take(SourceConfig(source="reasoning_gym:chain_sum", options={"nonsense": 1}))


def test_a_row_without_its_question_is_named_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n')
    with pytest.raises(SourceError, match=r"columns \['prompt'\].*set prompts\.question_column"):
        take(SourceConfig(source=str(path)))


def test_equal_rows_of_a_file_count_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n' * 3 + '{"question": "b", "answer": "2"}\n')
    assert sorted(questions(take(SourceConfig(source=str(path)), count=2))) == ["a", "b"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n', encoding="utf-8-sig")
    assert questions(take(SourceConfig(source=str(path)), count=1)) == ["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"question": "caf\u00e9"}'.encode("latin-1"), "cannot be read as .jsonl"),
        (b'{"messages": "hi"}', "expected a list of objects with a role and a content"),
        (b'{"messages": []}', "expected a list of objects"),
        (b'{"messages": [{"from": "human", "value": "hi"}]}', "expected a list of objects"),
        (b'{"messages": [{"role": "user", "content": ["hi"]}]}', "expected a list of objects"),
        (b'["q"]', "line 1 of .* is not a JSON object"),
        (b'{"question": "q"}\n{', "line 2 of .* is not JSON"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=message):
        take(SourceConfig(source=str(path)), count=1)
