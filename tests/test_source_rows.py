"""What a row of a source may hold: what is taken, what is null, what is refused, and what makes two rows one."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import SourceError
from stages import sources
from stages.source_rows import SourceRow, is_held_out
from stages.sources import SourceConfig, draw, finite_rows

USER = {"role": "user", "content": "1+1?"}
SAID = {"role": "assistant", "content": "2"}


def rows_of(tmp_path: Path, *records: Any, name: str = "rows.jsonl", **settings: Any) -> list[SourceRow]:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pl.DataFrame(list(records)).write_parquet(path)
    else:
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return list(finite_rows(SourceConfig(source=str(path), **settings)))


@pytest.mark.parametrize(
    ("record", "settings", "messages", "answer"),
    [
        ({"prompt": [USER], "answer": "2"}, {"question_column": "prompt"}, [USER], "2"),
        ({"prompt": "1+1?", "answer": 2}, {"question_column": "prompt"}, [USER], "2"),
        ({"problem": "1+1?", "answer": "2", "messages": [USER, SAID]}, {"question_column": "problem"}, [USER], "2"),
        ({"question": "1+1?", "messages": None}, {}, [USER], None),
        ({"question": "x", "messages": [USER]}, {}, [USER], None),
        ({"question": "1+1?", "messages": [SAID]}, {"question_column": "question"}, [USER], None),
        ({"question": "1+1?", "answer": 12345678901234567890}, {}, [USER], "12345678901234567890"),
        ({"question": "1+1?", "answer": float("nan")}, {}, [USER], None),
        ({"question": "1+1?", "answer": 0.5}, {}, [USER], "0.5"),
        ({"question": "1+1?", "tools": [], "image": None}, {}, [USER], None),
        ({"messages": [{**USER, "tool_calls": None, "name": "ann"}]}, {}, [USER], None),
    ],
)
def test_what_a_row_asks_and_answers(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], messages: list[Any], answer: str | None
) -> None:
    row = rows_of(tmp_path, record, **settings)[0]
    assert (row.messages, row.reference_answer) == (messages, answer)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (Decimal("1.50"), "1.50"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (float("nan"), None),
        (2**63, "9223372036854775808"),
    ],
)
def test_a_typed_column_is_read_as_its_text(tmp_path: Path, value: Any, answer: str | None) -> None:
    assert rows_of(tmp_path, {"question": "q", "answer": value}, name="r.parquet")[0].reference_answer == answer


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "q", "answer": ["3", "-3"]},
            r"line 1 of .* has \['3', '-3'\] in the column answer: exp",
        ),
        ({"question": "q", "answer": {"a": 1}}, "in the column answer: expected text"),
        ({"question": "q", "answer": True}, "has True in the column answer"),
        ({"question": "q", "answer": float("inf")}, "has inf in the column answer"),
        ({"question": {"text": "q"}}, "in the column question: expected text"),
        ({"messages": [USER, SAID]}, "ends with the assistant's turn.*prompts.question_column"),
        ({"messages": [USER, {**SAID, "tool_calls": [{"id": 1}]}, USER]}, "a turn with tool_calls"),
        ({"messages": [{**USER, "role": "user|>x<|assistant"}]}, "a turn of the role .*expected one word"),
        ({"messages": [USER], "tools": [{"name": "weather"}]}, "a value in the column tools"),
        ({"question": "q", "images": ["a.png"]}, "a value in the column images"),
        ({"question": "q", "answer": "x", "score": float("inf")}, "inf in the column score, which JSON cannot hold"),
        ('{"question": "bad \\ud83d here"}', r"line 1 of .* half of a surrogate pair"),
        ('{"question": "q", "more": {"a": ["\\udc00"]}}', "half of a surrogate pair"),
        ("[" * 100_000, "line 1 of .* is not JSON"),
        ("{}", "with the columns .* has no value in messages or question"),
    ],
)
def test_a_row_that_cannot_be_asked_as_it_stands_is_refused(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        rows_of(tmp_path, record)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"image": {"bytes": b"\x89PNG"}}, "a value in the column image"),
        ({"raw": b"\x89PNG"}, "row 1 of .* a value of type bytes in the column raw"),
    ],
)
def test_bytes_are_refused(tmp_path: Path, value: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        rows_of(tmp_path, {"question": "q", **value}, name="r.parquet")


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    assert rows_of(tmp_path, '{"question": "\\ud83d\\ude00"}')[0].question == "\U0001f600"


def test_metadata_is_json_that_polars_reads(tmp_path: Path) -> None:
    record = {"question": "q", "answer": "x", "score": float("nan"), "nested": [{"day": None}, float("nan")]}
    text = rows_of(tmp_path, record)[0].metadata
    assert text == '{"answer":"x","nested":[{"day":null},null],"question":"q","score":null}'
    assert pl.Series([text]).str.json_path_match("$.answer").item() == "x"


@pytest.mark.parametrize("settings", [{"answer_column": "anwser"}, {"answer_column": "empty"}])
def test_a_named_column_in_which_no_row_has_a_value_is_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(SourceError, match=r"no row of .* has a value in the column '.*expected one of \['answer', 'em"):
        rows_of(tmp_path, {"question": "q", "answer": "x", "empty": None}, {"question": "p"}, **settings)


def test_a_named_column_may_be_empty_in_some_rows(tmp_path: Path) -> None:
    records = [{"question": "q", "solution": None}, {"question": "p", "solution": "x"}]
    assert [r.reference_answer for r in rows_of(tmp_path, *records, answer_column="solution")] == [None, "x"]


def test_rows_are_one_when_all_that_they_hold_is_equal(tmp_path: Path) -> None:
    twins = [{"question": "f", "answer": "a", "test": str(i % 3)} for i in range(100)]
    assert len(rows_of(tmp_path, *twins)) == 3
    assert len(rows_of(tmp_path, *[{"question": "f", "answer": "a"}] * 100)) == 1
    assert len(rows_of(tmp_path, {"question": "f", "answer": "a"}, {"question": "f", "answer": "b"})) == 2


def test_rows_that_ask_the_same_are_never_split(tmp_path: Path) -> None:
    records = [{"question": f"q{i}", "answer": str(j), "test": j} for i in range(30) for j in range(4)]
    rows_of(tmp_path, *records)
    config = SourceConfig(source=str(tmp_path / "rows.jsonl"))
    trained, held_out = (
        {row.question for row in finite_rows(config) if is_held_out(row.messages, 0.5) == wanted}
        for wanted in (False, True)
    )
    assert trained
    assert held_out
    assert not trained & held_out


def test_rows_of_a_task_that_ask_the_same_and_answer_otherwise_are_both_drawn() -> None:
    config = SourceConfig(source="reasoning_gym:number_sequence")
    rows = draw(config, split="train", held_out_share=0.0, count_=300, seed=0, iteration=0)
    assert len({row.prompt_id for row in rows}) == 300 > len({row.question for row in rows})
    assert not any("source_index" in row.metadata for row in rows), "a position would make equal rows differ"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_is_read_file_by_file(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("b", "a"):
        frame = pl.DataFrame({"question": [f"{part}0", f"{part}1"]})
        (frame.write_ndjson if suffix == "jsonl" else frame.write_parquet)(folder / f"{part}.{suffix}")
    (folder / "README.md").write_text("x")
    config = SourceConfig(source=str(folder))
    assert [row.question for row in finite_rows(config)] == ["a0", "a1", "b0", "b1"]
    before = sources.source_identity(config)
    (folder / f"b.{suffix}").unlink()
    assert sources.source_identity(config) != before


@pytest.mark.parametrize(("names", "found"), [(["x.arrow"], "none of them"), (["a.csv", "b.jsonl"], r"\.csv, \.jsonl")])
def test_a_folder_of_something_else_is_named(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"question": "q"}\n')
    with pytest.raises(SourceError, match=rf"is a folder that holds {found}: expected files of one kind"):
        finite_rows(SourceConfig(source=str(tmp_path)))


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows_of(tmp_path, {"question": "q"})
    assert len(finite_rows(SourceConfig(source="~/rows.jsonl"))) == 1


def test_a_source_is_read_once_however_many_iterations_draw_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of(tmp_path, *({"question": f"q{i}"} for i in range(50)), name="once.jsonl")
    config = SourceConfig(source=str(tmp_path / "once.jsonl"))
    draws = [draw(config, split="train", held_out_share=0.2, count_=8, seed=0, iteration=i) for i in range(3)]
    monkeypatch.setattr(sources, "file_records", None)  # another reading would fail
    again = [draw(config, split="train", held_out_share=0.2, count_=8, seed=0, iteration=i) for i in range(3)]
    assert again == draws
    Path(config.source).write_text('{"question": "other"}\n')
    with pytest.raises(TypeError):
        finite_rows(config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_terms": 10**30}, "gives no row with the options .*(did not end within|MemoryError|Overflow)"),
        ({"max_digits": 2**63}, "gives no row with the options .*(did not end within|MemoryError|Overflow)"),
    ],
)
def test_options_with_which_a_task_does_not_end_are_refused(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import probe

    monkeypatch.setattr(probe, "CPU_SECONDS", 1)
    monkeypatch.setitem(probe.MEMORY_BYTES, "task", 2 << 30)
    with pytest.raises(SourceError, match=reason):
        probe.try_task(SourceConfig(source="reasoning_gym:chain_sum", options=options).model_dump_json())


def test_a_machine_that_stands_still_is_told_from_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import probe

    monkeypatch.setattr(probe, "WALL_SECONDS", 0.01)
    with pytest.raises(SourceError, match=r"it did not end within 0\.01 s"):
        probe.try_task(SourceConfig(source="reasoning_gym:chain_sum", options={"max_terms": 7}).model_dump_json())
