"""The commands that look, on a small run whose answers are scripted."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from flows.commands.groups import groups
from flows.commands.ls import ls
from flows.commands.metrics import metrics
from flows.commands.rows import rows
from flows.commands.schema import schema
from flows.commands.show import show
from flows.printing import Format, print_rows
from pipeline.errors import UsageError
from pipeline.manifest import MANIFEST
from pipeline.run_dir import RunDir
from stages.inspect.metrics import recorded_metrics
from tests.manifests import manifest_of
from tests.policies import EOS
from tests.small_run import DIGIT_0, make_small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a run of one iteration: one group with one right answer of two, one group without any."""
    return make_small_run(tmp_path_factory.mktemp("look"), tiny_policy)


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_ls_lists_runs_and_then_the_artifacts_of_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ls(run.parent, Format.jsonl)
    assert [(r["iterations"], r["finished"]) for r in rows_of(capsys)] == [(1, 1)]
    ls(run, Format.jsonl)
    listed = {r["artifact"]: (r["rows"], r["dropped"]) for r in rows_of(capsys)}
    assert listed["iterations/000000/completions"] == (4, None)
    assert listed["iterations/000000/batches"] == (4, "zero_variance:2")


def test_groups_has_a_row_for_each_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups(run, None, "-mean", 0, Format.jsonl)
    found = [(r["members"], r["mean"], r["best"], r["drop_reason"]) for r in rows_of(capsys)]
    assert found == [(2, 0.5, 1.0, None), (2, 0.0, 0.0, "zero_variance")]


def test_show_prints_the_best_member_first_and_text_as_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(run, 0, None, Format.table)
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    members = [line[:4] for line in lines if line and line[0] in {"0.5", "-0.5"}]
    assert members == [["0.5", "1", "1", "2"], ["-0.5", "0", "0", "3"]]
    assert "reference answer: 2" in output
    assert "mean 0.5, std 0.7071" in output


def test_markup_in_a_prompt_is_shown_and_not_obeyed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups(run, 0, None, 0, Format.table)
    assert "[red]0 + 2 =" in capsys.readouterr().out


def test_rows_takes_columns_a_condition_and_a_limit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(run, "completions", 0, "completion,finish_reason", "completion = '3'", 2, Format.jsonl)
    assert rows_of(capsys) == [{"completion": "3", "finish_reason": "stop"}] * 2


@pytest.mark.parametrize(
    "condition",
    [
        "completion in (select a from read_csv('{file}'))",
        "completion in (from read_csv('{file}'))",
        "completion in (with t as (select a from read_csv('{file}')) select a from t)",
        "completion in (table t)",
        "completion in (values ('2'))",
        "completion > ALL (select 1)",
        "$$ ' $$ = '' or completion in (select a from read_csv('{file}')) or '' = $$ ' $$",
        "E'\\'' = '' and completion in (select a from read_csv('{file}')) and completion = ''",
        "completion = '2' -- '\n or completion in (select a from read_csv('{file}')) --'",
        "completion = '2' /* ' */ or completion in (select a from read_csv('{file}')) /* ' */",
        "`'` = '' or completion in (select a from read_csv('{file}')) or `'` = ''",
        "completion = '2",
    ],
)
def test_a_condition_reads_nothing_but_the_rows(
    run: Path, condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.csv").write_text("a\n2\n")
    opened: list[str] = []
    monkeypatch.setattr(pl, "sql_expr", opened.append)
    with pytest.raises(UsageError, match="is more than a condition over the columns"):
        rows(str(run), "completions", 0, None, condition.replace("{file}", str(tmp_path / "file.csv")), 0, Format.jsonl)
    assert opened == []


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        ("completion like '%select from%' or \"completion\" = '2'", 1),
        ("completion is not distinct from '2'", 1),
        ("kept_mass is null and completion ~ '^[23]$' and not (seed < 0)", 4),
        ("completion::int between 3 and 4 and length(completion) in (1, 2)", 3),
        ("completion_token_ids[1] = 22", 3),
    ],
)
def test_a_condition_is_sql(run: Path, condition: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows(str(run), "completions", 0, "completion", condition, 0, Format.jsonl)
    assert len(rows_of(capsys)) == count


@pytest.mark.parametrize("condition", ["completion::date = 1", "no_such = 1", "completion", "'a' > any ('b', )"])
def test_a_wrong_condition_is_one_error(run: Path, condition: str) -> None:
    with pytest.raises(UsageError, match="is not an SQL condition over completions"):
        rows(str(run), "completions", 0, "completion", condition, 0, Format.jsonl)


def test_a_panic_of_polars_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "sql_expr", panic)
    with pytest.raises(UsageError, match="is not an SQL condition over completions"):
        rows(str(run), "completions", 0, "completion", "a = 1", 0, Format.jsonl)


def panic(_: str) -> None:
    raise pl.exceptions.PanicException("entered unreachable code")


def test_csv_can_be_read_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(run, "completions", 0, "completion_id,completion_token_ids", None, 0, Format.csv)
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(printed) == 4
    assert json.loads(printed[0]["completion_token_ids"]) == [DIGIT_0 + 2, EOS]


def test_metrics_are_those_of_the_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(run, Format.jsonl)
    row = rows_of(capsys)[0]
    expected = {
        "reward_mean": 0.25,
        "pass_rate": 0.25,
        "completion_tokens_mean": 2.0,
        "truncated_share": 0.0,
        "zero_variance_share": 0.5,
        "num_completions": 4,
        "num_trained": 2,
        "num_tokens": 4,
        "rewards": [{"name": "exact", "mean": 0.25, "null_count": 0, "timed_out_count": 0}],
        "eval_pass_at_1": None,
    }
    assert {key: row[key] for key in expected} == expected


def test_the_table_of_metrics_has_failed_checks_where_there_are_checks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    metrics(copy.root, Format.table)
    assert "failed checks" not in capsys.readouterr().out
    known = copy.read_metrics()
    for checked, is_shown in ((known.with_columns(num_failed_checks=pl.lit(2)), True),
                              (known.drop("num_failed_checks"), False)):  # fmt: skip
        checked.write_parquet(copy.metrics)
        metrics(copy.root, Format.table)
        assert ("failed checks" in capsys.readouterr().out) is is_shown


def test_metrics_that_stand_in_the_table_are_used_while_the_artifacts_are_the_same(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    row = recorded_metrics(copy, 0)
    assert row is not None
    assert (row["iteration"], row["reward_mean"]) == (0, 0.25)
    assert recorded_metrics(copy, 1) is None
    place = copy.place(0, "rewards")
    manifest = manifest_of(place)
    (place / MANIFEST).write_text(json.dumps({**manifest, "seconds": manifest["seconds"] + 1}))
    assert recorded_metrics(copy, 0) is None


def test_a_table_in_a_file_is_as_wide_as_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    values = [letter * 60 for letter in "abc"]
    print_rows([dict(zip(("one", "two", "three"), values, strict=True))], Format.table)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert values in lines


def test_a_reader_that_stops_early_ends_a_looking_command_without_a_word() -> None:
    """As `| head` does."""
    command = [sys.executable, "-m", "flows.cli", "schema", "completions"]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == -signal.SIGPIPE


@pytest.mark.parametrize("dataset", [None, "completions"])
def test_schema_explains_datasets_and_columns(dataset: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    schema(dataset, format_=Format.jsonl)
    assert all(row["doc"] for row in rows_of(capsys))
