"""Text of a model, a run or a config reaches a terminal, a pipe or a file only with its steering characters visible."""

import ast
import csv
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import regex
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import TextColumn

from flows import progress
from flows.app import COMMANDS, module_of
from flows.cli import main
from flows.commands.rows import rows
from flows.printing import Format, complain, print_anything, print_rows, say, say_text
from pipeline.config import without_nulls
from pipeline.conformance import conform
from pipeline.manifest import MANIFEST
from pipeline.run_dir import RunDir
from pipeline.text import STEERING, escaped, json_text, one_line, restored, visible, without_login
from tests.manifests import fix_chain
from tests.small_run import make_small_run

ROOT = Path(__file__).parent.parent
HOSTILE = "\x1b]0;t\x07\x1b[2Jk\rz\x08\x9b\u202e\u200b\u2028\ufeff\U000e0041[red]:100:[link=x]"
IDS = ("completion_id", "group_id", "prompt_id")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\x08\x00\x7f\x9b", "a\\x0db\\x08\\x00\\x7f\\x9b"),
        ("\u202eabc\u2066\u200f", "\\u202eabc\\u2066\\u200f"),
        ("\u200b\ufeff\u2028\u2029\ud800", "\\u200b\\ufeff\\u2028\\u2029\\ud800"),
        ("\U000e0041\ufffe", "\\U000e0041\\ufffe"),
        ("a\n\tb \\neq \\x1b", "a\n\tb \\neq \\x1b"),
        (
            "\u4e2d\u0645\u00e9\u00a0\u3000\U0001f600\u2764\ufe0f",
            "\u4e2d\u0645\u00e9\u00a0\u3000\U0001f600\u2764\ufe0f",
        ),
    ],
)
def test_what_steers_or_hides_is_an_escape_and_nothing_else_is(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    assert one_line(text) == shown.replace("\n", "\\n").replace("\t", "\\t")
    assert json.loads(json_text(text)) == text


def test_the_steering_characters_are_those_of_unicode() -> None:
    wanted = regex.compile(r"(?![\t\n\ufe0e\ufe0f])[\p{Cc}\p{Zl}\p{Zp}\p{Cs}\p{DI}\ufff9-\ufffb\ufffe\uffff]")
    odd = [hex(c) for c in range(0x110000) if bool(wanted.match(chr(c))) != bool(STEERING.match(chr(c)))]
    assert odd == []


@given(
    st.lists(st.sampled_from([*"\\xu01be52cU\n,\"'", "\x1b", "\u202e", "\U000e0041", "\ud800", "\\u00e9"])).map("".join)
)
def test_a_text_comes_back_from_csv_and_json(text: str) -> None:
    assert restored(escaped(text)) == text
    assert json.loads(json_text([text])) == [text]
    assert not STEERING.search(escaped(text) + json_text([text]) + json_text([text], ensure_ascii=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    return make_small_run(tmp_path_factory.mktemp("text"), tiny_policy)


@pytest.fixture(scope="module")
def hostile(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run each of whose texts steers the terminal: rows, manifests, settings, its own name."""
    root = tmp_path_factory.mktemp("hostile") / f"run{HOSTILE.replace('/', '')}"
    shutil.copytree(small, root)
    run = RunDir(root)
    order = [artifact.path for artifact in run.artifacts()]
    for place in order:
        manifest = json.loads((place / MANIFEST).read_text())
        for part in place.glob("*.parquet"):
            stored = pl.read_parquet(part, glob=False)
            pq.write_table(conform(stored.select(poisoned(stored.schema)), manifest["dataset"]), part)
        manifest["drops"] = {f"{reason}{HOSTILE}": count for reason, count in manifest["drops"].items()}
        manifest["stage"] += HOSTILE
        (place / MANIFEST).write_text(json.dumps(manifest))
    fix_chain(order)
    return root


def poisoned(schema: pl.Schema) -> Iterator[pl.Expr]:
    """Yield the columns with the hostile text behind every text; equal ids stay equal."""
    for name, type_ in schema.items():
        column = pl.col(name)
        if name == "messages":
            fields = [pl.element().struct.field(key) + HOSTILE for key in ("role", "content")]
            yield column.list.eval(pl.struct(fields))
        elif type_ == pl.String and name != "metadata":
            yield column + HOSTILE if name in IDS else column.fill_null("") + HOSTILE
        else:
            yield column


def named_by_a_stranger(small: Path, folder: Path) -> Path:
    """Return a copy of the run whose settings have hostile names."""
    root = folder / "named"
    shutil.copytree(small, root)
    text = RunDir(root).resolved_config.read_text().replace('"exact"', json.dumps(f"exact{HOSTILE}"))
    RunDir(root).resolved_config.write_text(text)
    return root


def looking(run: Path, completion: str) -> dict[str, list[list[str]]]:
    """Return the arguments with which each looking command reads a run."""
    policy = str(run / "iterations" / "000000" / "policy")
    datasets = ("prompts", "completions", "rewards", "advantages", "batches", "training_records")
    checks = run.parent / "checks.toml"
    checks.write_text(tomli_w.dumps({"checks": [{"name": "some", "where": "num_tokens > 0"}]}))
    config = run.parent / "config.toml"
    config.write_text(tomli_w.dumps(without_nulls(RunDir(run).settings())))
    return {
        "verify": [[str(run)]],
        "lineage": [[policy], [str(run), "-c", completion]],
        "tokens": [[str(run), "-c", completion]],
        "check": [[str(run), "--checks", str(checks)]],
        "audit": [[str(run)]],
        "ls": [[str(run)], [str(run.parent)]],
        "rows": [*([str(run), dataset] for dataset in datasets), [str(run), "prompts", "-w", HOSTILE]],
        "show": [[str(run)], [str(run), "-g", HOSTILE]],
        "groups": [[str(run)], [str(run), "-s", HOSTILE]],
        "metrics": [[str(run)]],
        "schema": [[], [HOSTILE]],
        "whatif": [[str(run), "--set", "normalize.baseline=none"]],
        "diff": [[str(run), str(run)], [str(run), f"{run.parent.parent}/clean"]],
        "plan": [[str(config), "--run", str(run)]],
        "reward": [["try", "tests.rewards:share_of_digits", str(run)]],
    }


def test_no_looking_command_prints_a_character_that_steers(
    hostile: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readers = {name for name in COMMANDS if not module_of(name).WRITES}
    completion = RunDir(hostile).open(0, "completions").read()["completion_id"][0]
    commands = looking(hostile, completion)
    assert set(commands) == readers, "a command that looks wants its arguments here"
    shutil.copytree(small, hostile.parent.parent / "clean", dirs_exist_ok=True)
    strange = named_by_a_stranger(small, tmp_path)
    calls = [
        *((name, arguments) for name in commands for arguments in commands[name]),
        *((name, arguments) for name, given in looking(strange, "x").items() for arguments in given[:1]),
    ]
    shown = set()
    for name, arguments in calls:
        for format_ in Format:
            given = ["-f", format_] if name != "plan" else ["--json"] * (format_ is Format.jsonl)
            monkeypatch.setattr(sys, "argv", ["grpo", name, *arguments, *given])
            with pytest.raises(SystemExit):
                main()
            out, err = capsys.readouterr()
            assert not STEERING.search(out + err), (name, arguments, format_)
            assert "\N{HUNDRED POINTS SYMBOL}" not in out + err
            if "\\x1b" in out or "\\u001b" in out:
                shown.add(name)
    assert shown == readers - {"metrics", "schema"}  # these print numbers, and our own words


def test_csv_gives_back_what_stands_in_the_rows(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(str(hostile), "completions", 0, "completion,policy_name", None, 0, Format.csv)
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    stored = RunDir(hostile).open(0, "completions").read()
    assert [restored(row["completion"]) for row in printed] == stored["completion"].to_list()
    rows(str(hostile), "completions", 0, "completion", None, 0, Format.jsonl)
    assert [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()] == stored[
        "completion"
    ].to_list()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_texts_and_tables_hold_no_markup_and_no_line_of_anothers(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    text = f"3:100:7 {HOSTILE}\nnothing is wrong"
    say(text, "bold")
    say_text(text, indent=2)
    print_rows([{text: text}], Format.table)
    print_rows([{f"{text}{i}": text for i in range(20)}], Format.table)
    out = capsys.readouterr().out
    styles = regex.compile("\x1b\\[[0-9;]*m")  # of ours
    out = styles.sub("", out)
    assert not STEERING.search(out)
    assert "3:100:7 \\x1b]0;t\\x07\\x1b[2Jk\\x0dz\\x08\\x9b\\u202e" in out
    assert "[red]:100:[link=x]" in out
    assert not [line for line in out.splitlines() if line.startswith("nothing")]


def test_the_progress_of_a_run_shows_text_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = progress.TerminalReporter()
    reporter.note(HOSTILE)
    reporter.stage(HOSTILE)(1, 2, HOSTILE)
    assert [column.markup for column in reporter.bar.columns if type(column) is TextColumn] == [False, False]
    fields = [reporter.bar.tasks[0].description, reporter.bar.tasks[0].fields["text"], capsys.readouterr().out]
    assert not STEERING.search("".join(fields))
    assert all("[red]:100:[link=x]" in field for field in fields)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_printed_as_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    print_anything()
    row = {"text": "\u4e2d\U0001f600\u00e9"}
    print_rows([row], Format.jsonl)
    print_rows([row], Format.csv)
    print_rows([row], Format.table)
    complain(row["text"])
    out.flush()
    err.flush()
    printed = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert json.loads(printed.splitlines()[0]) == row
    assert printed.count("\\u4e2d\\U0001f600") == 2
    assert err.buffer.getvalue().startswith(b"\\u4e2d\\U0001f600")  # type: ignore[attr-defined]


PRINTERS = {
    "flows/cli.py": {"sys.stderr.write"},  # that a package is missing, which nothing can be imported to say
    "flows/printing.py": {"print", "Console"},
    "flows/progress.py": {"Console"},  # the bar of a run; it makes its texts visible itself
    "stages/probe.py": {"print"},  # into the pipe to the process that tries something
    "stages/rewards/answers/reasoning_gym_tasks.py": {"print"},  # into the pipe out of the sandbox
    "stages/rewards/code/sandbox_init.py": {"sys.stdout.write"},
}
WRITERS = {"print", "Console", "typer.echo", "typer.secho", "click.echo", "sys.stdout.write", "sys.stderr.write"}


def test_only_one_module_writes_to_the_terminal() -> None:
    found: dict[str, set[str]] = {}
    packages = ("flows", "stages", "grpo", "pipeline")
    for path in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        names = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)}
        if printers := names & WRITERS:
            found[path.relative_to(ROOT).as_posix()] = printers
    odd = {path: names - PRINTERS.get(path, set()) for path, names in found.items()}
    assert {path: names for path, names in odd.items() if names} == {}, "use flows.printing"


def test_a_url_is_told_without_its_login() -> None:
    text = "http://me:s3cr3t@host:1/a@b and postgresql://me@host/x, or me@host"
    assert without_login(text) == "http://host:1/a@b and postgresql://host/x, or me@host"
    assert (
        without_login("https://me:s3@cr3t@host/a, http://host?to=me@host") == "https://host/a, http://host?to=me@host"
    )
