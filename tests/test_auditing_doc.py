"""docs/auditing.md: every block of the page runs, and what it claims about forgeries is so."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from flows import cli
from flows.commands.replay import print_replay
from flows.printing import Format
from pipeline.run_dir import RunDir
from stages.config import recorded_config
from stages.inspect.metrics import append_metrics, iteration_metrics
from stages.inspect.verify.verify import verify_run
from stages.normalize import normalize_rows
from tests.finished import audited_run, forge, replace_value
from tests.manifests import fix_hashes, manifest_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "auditing.md"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of the page: its language and the words after it."""

    question: int
    """0 = before the first one."""
    language: str
    words: tuple[str, ...]
    text: str

    def value(self, key: str, default: str) -> str:
        return next((word.removeprefix(f"{key}=") for word in self.words if word.startswith(f"{key}=")), default)


def read_blocks() -> list[Block]:
    """Return the blocks that have a language, in order; blocks without one are outputs."""
    found = []
    for section in re.split(r"^(?=#{2,3} )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = re.match(r"### (\d+)\. ", section)
        for info, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
            if info:
                language, *words = info.split()
                found.append(Block(int(heading[1]) if heading else 0, language, tuple(words), text))
    return found


BLOCKS = read_blocks()
QUESTIONS = sorted({block.question for block in BLOCKS if block.question})


def queries(question: int) -> list[str]:
    """Return the SQL of a question."""
    return [block.text for block in BLOCKS if block.question == question and block.language == "sql"]


def connect() -> duckdb.DuckDBPyConnection:
    """Return a connection that knows the page's macros."""
    connection = duckdb.connect()
    for block in BLOCKS:
        if block.language == "sql" and "setup" in block.words:
            connection.execute(block.text)
    return connection


def rows_of(question: int, query: int = 0) -> list[dict[str, Any]]:
    """Return what a query of the page gives in the current directory."""
    cursor = connect().execute(queries(question)[query])
    names = [column[0] for column in cursor.description or []]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def run_shell(block: Block, folder: Path) -> int:
    """Run a block as a reader would, and return its exit code: one plain command in this process, others in a shell."""
    if not block.text.startswith("grpo ") or block.text.count("\n") > 1 or set(block.text) & set("|$"):
        environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(["bash", "-ec", block.text], cwd=folder, env=environment, check=False).returncode
    before = sys.argv, list(sys.path), dict(os.environ), signal.getsignal(signal.SIGTERM)
    sys.argv = shlex.split(block.text)
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv, sys.path[:] = before[:2]
        os.environ.clear()
        os.environ.update(before[2])
        signal.signal(signal.SIGTERM, before[3])
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a folder with runs/demo, a command ``grpo``, and what the page's setup blocks make; not to be changed."""
    folder = tmp_path_factory.mktemp("auditing")
    command = folder / "bin" / "grpo"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m flows.cli "$@"\n')
    command.chmod(0o755)
    before = Path.cwd()
    os.chdir(folder)
    try:
        audited_run(Path(), tiny_policy)
        for block in BLOCKS:
            if block.language == "toml":
                (folder / block.value("file", "")).write_text(block.text)
            elif block.language == "sh" and "setup" in block.words:
                assert run_shell(block, folder) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder, and stand in it."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def forged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Return a copy of runs/demo to be forged, and stand in its folder."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.copy(folder / "rows.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return RunDir(Path("runs/demo"))


def test_the_questions_are_numbered_and_each_has_a_block() -> None:
    assert list(range(1, 23)) == QUESTIONS
    assert {block.language for block in BLOCKS} == {"sh", "sql", "python", "toml"}


def test_no_link_of_the_page_leads_nowhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target in anchors if target.startswith("#") else (PAGE.parent / target).is_file(), target


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_block_answers(question: int, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    connection = connect()
    for block in BLOCKS:
        if block.question != question or block.language == "toml" or {"skip", "setup"} & set(block.words):
            continue
        capfd.readouterr()
        if block.language == "sh":
            assert run_shell(block, here) == int(block.value("exit-code", "0")), block.text
            assert len(capfd.readouterr().out.splitlines()) > 1, block.text
        elif block.language == "sql":
            assert connection.execute(block.text).fetchall(), block.text
        else:
            exec(compile(block.text, PAGE.name, "exec"), {})
            printed = capfd.readouterr().out
            assert printed, block.text
            assert "shape: (0," not in printed, block.text


def test_the_answers_of_the_small_run_are_those_that_were_put_into_it(here: Path) -> None:
    authors = [(r["policy_name"], r["policy_iteration"], r["checkpoint"], r["answers"]) for r in rows_of(5)]
    assert authors == [
        ("current", 3, "runs/demo/iterations/000002/policy", 24),
        ("older", 2, "runs/demo/iterations/000001/policy", 12),
    ]
    assert [(r["times_asked"], r["questions"], r["prompts"]) for r in rows_of(6)] == [(2, 12, 24)]
    assert [(r["held_out"], r["also_trained_on"]) for r in rows_of(7)] == [(5, 0)]
    assert [(r["reward_name"], r["answers"]) for r in rows_of(10)] == [("exact", 24)]  # 2 questions, twice, 6 answers
    assert [(r["reward_name"], r["first"], r["last"]) for r in rows_of(11)] == [("brevity", 0, 3), ("exact", 0, 3)]
    dropped = {row["reason"]: row["answers"] for row in rows_of(15)}
    assert (dropped["unscored"], dropped["zero_variance"]) == (24, 24)
    assert dropped["(trained)"] + dropped["truncated"] == 96
    assert rows_of(16)[0]["max_ratio"] > 1.28
    assert sum(row["clipped"] for row in rows_of(16)) > 0


def test_the_shares_of_the_rewards_add_up_to_one(here: Path) -> None:
    shares = {row["reward_name"]: row["share_of_spread"] for row in rows_of(12)}
    assert set(shares) == {"exact", "brevity"}
    assert sum(shares.values()) == pytest.approx(1.0, abs=2e-3)
    assert 0 < abs(shares["brevity"]) < 1


def test_the_query_for_advantages_finds_a_forged_one(forged: RunDir) -> None:
    (row,) = rows_of(14)
    assert row["answers"] == 144
    assert row["missing"] == 0
    assert row["largest_difference"] < 1e-12
    forge(forged, forged.place(2, "advantages"), replace_value("advantage", 5, lambda value: value + 0.25))
    assert rows_of(14)[0]["largest_difference"] == pytest.approx(0.25)


def test_the_query_for_held_out_questions_finds_one_in_the_training_prompts(forged: RunDir) -> None:
    held_out = pl.read_parquet(forged.held_out_prompts / "*.parquet")
    forge(forged, forged.place(1, "prompts"), lambda frame: pl.concat([frame[:-1], held_out[:1]]))
    assert rows_of(7)[0]["also_trained_on"] == 1


def test_the_query_for_authors_has_no_checkpoint_for_a_foreign_policy(forged: RunDir) -> None:
    forge(forged, forged.place(3, "completions"), lambda frame: frame.with_columns(policy_digest=pl.lit("f" * 64)))
    assert None in {row["checkpoint"] for row in rows_of(5)}


def test_the_query_for_versions_finds_a_reward_that_changed(forged: RunDir) -> None:
    forge(forged, forged.place(2, "rewards"), lambda frame: frame.with_columns(reward_recipe=pl.lit("0" * 64)))
    assert {row["version"] for row in rows_of(11) if row["first"] == 2} == {"0" * 12}


@pytest.mark.parametrize(
    ("dataset", "column", "where", "value"),
    [
        ("evaluations", "reward", ~pl.col("is_correct"), lambda value: value - 0.01),
        ("evaluations", "error", pl.col("is_correct").is_null(), "another reason"),
        ("evaluations", "sampling_logprobs", pl.lit(True), lambda value: [-0.5] * len(value)),
        ("training_records", "correction_weight_mean", pl.lit(True), 0.125),
        ("training_records", "masked_tokens", pl.lit(True), lambda value: 1 - value),
        ("training_records", "logprob_difference_max", pl.lit(True), 0.125),
    ],
)
def test_verify_does_not_see_what_the_page_says_it_cannot(
    forged: RunDir, dataset: str, column: str, where: pl.Expr, value: object
) -> None:
    place = forged.place(3, dataset)
    rows = pl.read_parquet(place / "part-00000.parquet")
    row = rows.with_row_index().filter(where)["index"][0]
    forge(forged, place, replace_value(column, row, value))
    assert pl.read_parquet(place / "part-00000.parquet")[column].to_list() != rows[column].to_list()
    assert verify_run(forged).problems == []


def test_verify_does_not_see_a_forged_kl_once_the_metrics_are_made_again(forged: RunDir) -> None:
    forge(forged, forged.place(3, "training_records"), replace_value("kl_to_sampler", 0, 0.125))
    assert {problem.check for problem in verify_run(forged).problems} == {"metrics"}
    forged.metrics.unlink()
    for iteration in forged.iterations():
        append_metrics(forged, iteration_metrics(forged, iteration, pass_threshold=1.0))
    assert verify_run(forged).problems == []


@pytest.mark.parametrize(("field", "value"), [("started_at", "2001-01-01T00:00:00+00:00"), ("environment", {})])
def test_verify_does_not_see_another_time_or_place(forged: RunDir, field: str, value: object) -> None:
    place = forged.place(0, "prompts")
    fix_hashes(place, manifest_of(place) | {field: value})
    assert verify_run(forged).problems == []


def test_a_reward_forged_with_all_that_follows_passes_verify_and_not_replay(
    forged: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(Path("runs/demo-short"))
    informative = run.open(1, "advantages").read().filter(pl.col("drop_reason").is_null())["completion_id"][0]
    row = run.open(1, "rewards").read()["completion_id"].index_of(informative)
    forge(run, run.place(1, "rewards"), replace_value("reward", row, -0.9))
    advantages = normalize_rows(run.open(1, "rewards").scan(), recorded_config(run).normalize)
    forge(run, run.place(1, "advantages"), lambda _: advantages)
    assert verify_run(run).problems == []
    assert not print_replay(run.root, [1], "score", Format.jsonl)
    assert "stored -0.9" in capsys.readouterr().out
