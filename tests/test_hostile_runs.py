"""A stranger's run is data: looking at it writes nothing, asks nobody, ends, and says 0, 1 or 2."""

import hashlib
import json
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.cli import main
from pipeline import artifact, run_dir
from pipeline.files import locked
from pipeline.run_dir import RunDir
from pipeline.writer import ArtifactWriter
from stages.inspect.verify import files as verify_files
from stages.inspect.verify import verify as verify_module
from stages.inspect.verify.verify import verify_run
from tests import hostile
from tests.finished import finished_run, forge, replace_value
from tests.manifests import fix_chain, fix_hashes, manifest_of

COMPLETIONS = "iterations/000000/completions"
POLICY = "iterations/000000/policy"
LOOKS = (
    "ls run", "ls .", "show run", "rows run completions -i 0", "groups run", "metrics run", "verify run", "audit run",
    "report run -o page.html", "diff run other", "whatif run --set normalize.scale=none", "lineage run -c {id}",
    "tokens run -i 0 -c {id}", f"lineage run/{POLICY}", "prune run --keep-last 1 --dry-run",
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunDir:
    """Return a finished run, not to be changed."""
    return finished_run(tmp_path_factory.mktemp("hostile"), tiny_policy)


@pytest.fixture
def run(original: RunDir, tmp_path: Path) -> RunDir:
    """Return a copy of the finished run, next to what nobody may touch."""
    shutil.copytree(original.root, tmp_path / "run")
    (tmp_path / hostile.OUTSIDE).mkdir()
    (tmp_path / hostile.OUTSIDE / "secret.txt").write_text("secret")
    (tmp_path / hostile.OUTSIDE / "model.safetensors").write_text("dear")
    return RunDir(tmp_path / "run")


Grpo = Callable[[str], tuple[int, str]]


@pytest.fixture
def grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Grpo]:
    """Return a function that gives a command in the folder around the run: its exit code, and what it said."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPO_WORK", str(tmp_path / "work"))

    def give(command: str) -> tuple[int, str]:
        for name in ("_verify", "_check_parts"):
            if hasattr(artifact, name):
                getattr(artifact, name).cache_clear()  # by paths, which are the same after a change
        monkeypatch.setattr(sys, "argv", ["grpo", *command.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(end.value.code or 0), printed.out + printed.err

    yield give
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outside_of(run: RunDir) -> dict[str, str]:
    """Return what lies around the run, but for what the commands may write."""
    found = {}
    for path in run.root.parent.rglob("*"):
        if not path.is_relative_to(run.root) and path.name != "page.html":
            found[str(path)] = path.read_text() if path.is_file() and path.parent.name == hostile.OUTSIDE else ""
    return found


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """Serve a payload under every path of a local server; return its URL, and the list of what it was asked for."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"prize" if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def list_prize(run: RunDir, name: str, url: str) -> None:
    """Make the completions list a file that only a store has, and name that store."""
    place = run.root / COMPLETIONS
    manifest = manifest_of(place)
    manifest["files"][name] = {"rows": None, "bytes": 5, "sha256": hashlib.sha256(b"prize").hexdigest()}
    hostile.write_manifest(place, manifest)
    (place / ".store.json").write_text(json.dumps({"url": url}))


@pytest.mark.parametrize("name", ["../../../../outside/new.txt", "extra.txt"])
def test_a_store_that_a_run_names_is_not_asked_and_nothing_is_written(
    run: RunDir, grpo: Grpo, asked: tuple[str, list[str]], name: str
) -> None:
    url, requests = asked
    completion = pl.read_parquet(run.root / COMPLETIONS / "part-00000.parquet")["completion_id"][0]
    list_prize(run, name, f"{url}/evil")
    shutil.copytree(run.root, run.root.with_name("other"))
    before = outside_of(run)
    for command in LOOKS:
        code, said = grpo(command.format(id=completion))
        assert code in (0, 1, 2), command
        assert (code, "completions" in said) == (1, True) or command != "verify run"
    assert requests == []
    assert outside_of(run) == before
    assert not (run.root / COMPLETIONS / "extra.txt").exists()


def test_a_reference_to_a_url_is_not_followed_and_the_message_says_how_it_would_be(
    run: RunDir, grpo: Grpo, asked: tuple[str, list[str]]
) -> None:
    url, requests = asked
    place = run.root / COMPLETIONS
    note = {
        "path": f"{url}/steal/runs/x/iterations/000000/completions",
        "digest": manifest_of(place)["digest"],
    }
    shutil.rmtree(place)
    place.with_name("completions.reference.json").write_text(json.dumps(note))
    for command, expected in (("ls run", 2), ("show run -i 0", 2), ("verify run", 1), ("rows run completions -i 0", 2)):
        code, said = grpo(command)
        assert code == expected, command
        assert f"`grpo ls {url}/steal/runs/x` once" in said.replace("\n", " ")
    assert requests == []
    assert not (run.root.parent / "work").exists()


def cut(name: str) -> Callable[[RunDir], Any]:
    """Return a change that puts half a part in the place of a whole one, and fits every hash."""

    def change(run: RunDir) -> None:
        path = run.root / name / "part-00000.parquet"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        hostile.reseal(run.root / name)

    return change


def write(name: str, data: bytes) -> Callable[[RunDir], Any]:
    return lambda run: (run.root / name).write_bytes(data)


def make(name: str, kind: str) -> Callable[[RunDir], Any]:
    return lambda run: hostile.special(run.root / name, kind)


def bomb(how: str) -> Callable[[RunDir], Any]:
    return lambda run: hostile.write_bomb(run.root / "iterations/000000/rewards", how, 1 << 20)


def change_setting(key: str, value: Any) -> Callable[[RunDir], Any]:
    def change(run: RunDir) -> None:
        tables = json.loads(run.resolved_config.read_text())
        run.resolved_config.write_text(json.dumps({**tables, key: value}))

    return change


def drop_column(run: RunDir) -> None:
    path = run.root / COMPLETIONS / "part-00000.parquet"
    pl.read_parquet(path).drop("completion").write_parquet(path)
    hostile.reseal(run.root / COMPLETIONS)


def forget_rewards(run: RunDir) -> None:
    """Let the rewards be those of other completions."""
    forge(run, run.place(0, "rewards"), lambda rows: rows.with_columns(completion_id=pl.col("completion_id") + "x"))


DEEP = b"[" * 100_000 + b"]" * 100_000
MANIFEST = f"{COMPLETIONS}/manifest.json"
REFERENCE = "iterations/000001/toys.reference.json"
CASES: dict[str, tuple[Callable[[RunDir], Any], dict[str, int]]] = {
    "manifest is a pipe": (make(MANIFEST, "fifo"), {"verify run": 1, "show run -i 0": 2, "ls run": 0}),
    "manifest is a device": (make(MANIFEST, "zero"), {"verify run": 1, "rows run completions -i 0": 2}),
    "manifest is deep": (write(MANIFEST, DEEP), {"verify run": 1, "show run -i 0": 2, "ls run": 2}),
    "manifest is long": (write(MANIFEST, b" " * (9 << 20)), {"verify run": 1, "show run -i 0": 2}),
    "policy is a pipe": (make(f"{POLICY}/manifest.json", "fifo"), {"verify run": 1, f"lineage run/{POLICY}": 2}),
    "config is a pipe": (make("config.resolved.json", "fifo"), {"ls .": 0, "verify run": 2, "show run": 2}),
    "config is deep": (write("config.resolved.json", DEEP), {"verify run": 1, "audit run": 2, "report run": 2}),
    "config has no tables": (change_setting("evaluate", []), {"verify run": 1, "report run": 2, "diff run run": 2}),
    "config has texts": (change_setting("seed", []), {"verify run": 1, "whatif run --set seed=1": 2}),
    "metrics are none": (write("metrics.parquet", b"PAR1"), {"verify run": 1, "metrics run": 2, "report run": 2}),
    "metrics are a pipe": (make("metrics.parquet", "fifo"), {"verify run": 1, "metrics run": 2}),
    "environment is a list": (write("environment.json", b"[1]"), {"verify run": 0, "report run": 2}),
    "half a part": (cut(COMPLETIONS), {"verify run": 1, "show run -i 0": 2, "groups run -i 0": 2, "audit run": 2}),
    "a column is gone": (drop_column, {"verify run": 1, "show run -i 0": 2, "audit run": 2}),
    "equal texts": (bomb("texts"), {"verify run": 1, "show run -i 0": 2, "audit run": 2, "report run": 2}),
    "rewards of others": (forget_rewards, {"verify run": 1, "show run -i 0": 0, "groups run -i 0": 0}),
    "folder of no iteration": (make("iterations/\u00b2", "folder"), {"verify run": 1, "ls run": 0}),
    "another number": (make("iterations/\u0663", "folder"), {"verify run": 1, "show run": 0}),
    "a huge number": (make("iterations/" + "9" * 30, "folder"), {"verify run": 1, "metrics run": 0}),
    "a file as iteration": (write("iterations/000007", b""), {"verify run": 1, "show run": 0}),
    "completions are a loop": (make(COMPLETIONS, "loop"), {"verify run": 1, "show run -i 0": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_run_is_answered_with_an_exit_code(run: RunDir, grpo: Grpo, case: str) -> None:
    change, expected = CASES[case]
    change(run)
    before = outside_of(run)
    assert {command: grpo(command)[0] for command in expected} == expected
    (run.root / "report.html").unlink(missing_ok=True)
    assert outside_of(run) == before


REFERENCES = (
    DEEP, b"[]", b"{}", b'{"path": 5, "digest": "x"}', b'{"path": "a\\u0000b", "digest": "x"}', b"\xff",
    b'{"path": "", "digest": ""}', b'{"path": "/dev", "digest": ""}', b'{"path": "../../..", "digest": "x"}',
    b'{"path": "s3://../x", "digest": "x"}',
)  # fmt: skip


@pytest.mark.parametrize("data", [*REFERENCES, "fifo", "zero"], ids=repr)
def test_a_reference_that_is_none_is_a_finding(run: RunDir, grpo: Grpo, data: bytes | str) -> None:
    shutil.rmtree(run.root / COMPLETIONS)
    path = run.root / f"{COMPLETIONS}.reference.json"
    hostile.special(path, data) if isinstance(data, str) else path.write_bytes(data)
    assert grpo("verify run")[0] == 1
    assert grpo("show run -i 0")[0] == 2


def test_pruning_deletes_nothing_behind_a_name_or_a_link_that_leads_out(run: RunDir, grpo: Grpo) -> None:
    place = run.root / POLICY
    dear = run.root.parent / hostile.OUTSIDE / "model.safetensors"
    facts = {"rows": None, "bytes": 4, "sha256": hashlib.sha256(b"dear").hexdigest()}
    (place / "sub").symlink_to(dear.parent)
    for name in ("../../../../outside/model.safetensors", "sub/model.safetensors"):
        manifest = manifest_of(place)
        manifest["files"][name] = facts
        hostile.write_manifest(place, manifest)
        code, said = grpo("prune run --keep-last 1")
        assert code == 2
        assert "model.safetensors" in said
        assert dear.read_text() == "dear"
        del manifest["files"][name]
        hostile.write_manifest(place, manifest)


def test_planted_links_are_not_written_through(run: RunDir, grpo: Grpo) -> None:
    secret = run.root.parent / hostile.OUTSIDE / "secret.txt"
    (run.root / ".lock").symlink_to(secret)
    (run.root / ".report.html.tmp").symlink_to(secret)
    (run.root / POLICY / ".pruned.json.tmp").symlink_to(secret)
    assert grpo("prune run --keep-last 1")[0] == 2
    assert grpo("prune run --keep-last 1 --dry-run")[0] == 0
    assert grpo("report run")[0] == 0
    (run.root / ".lock").unlink()
    assert grpo("prune run --keep-last 1")[0] == 0
    assert secret.read_text() == "secret"
    assert sorted(path.name for path in secret.parent.iterdir()) == ["model.safetensors", "secret.txt"]


@pytest.mark.parametrize("name", ["iterations", "iterations/000001", "members", "logs"])
def test_a_run_whose_folders_are_links_is_looked_at_and_not_written(run: RunDir, grpo: Grpo, name: str) -> None:
    elsewhere = run.root.parent / "elsewhere"
    if (run.root / name).exists():
        (run.root / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
    (run.root / name).symlink_to(elsewhere)
    code, said = grpo("prune run --keep-last 1")
    assert code == 2
    assert "nothing is written through a link" in said
    assert grpo("show run -i 0")[0] == 0


def test_a_link_in_the_place_of_unfinished_work_is_replaced(run: RunDir) -> None:
    outside = run.root.parent / hostile.OUTSIDE
    (outside / "recipe").write_text("a" * 64)
    for name in (".toys.partial", ".toys.doomed", "toys"):
        (run.iteration(0) / name).symlink_to(outside)
    ArtifactWriter(run.iteration(0) / "toys", "rewards", "a" * 64).open()
    assert sorted(path.name for path in outside.iterdir()) == ["model.safetensors", "recipe", "secret.txt"]
    assert not (run.iteration(0) / ".toys.partial").is_symlink()


def test_a_recipe_without_end_is_not_that_of_unfinished_work(run: RunDir) -> None:
    partial = run.iteration(0) / ".toys.partial"
    partial.mkdir()
    (partial / "recipe").write_text("a" * 1000)
    ArtifactWriter(run.iteration(0) / "toys", "rewards", "a" * 64).open()
    assert (partial / "recipe").read_text() == "a" * 64


def rename_stages(run: RunDir, names: dict[str, tuple[str, int]]) -> None:
    """Say that other stages, or other versions, have made the artifacts, and fit every hash."""
    order = [found.path for found in run.artifacts()]
    for place in order:
        manifest = manifest_of(place)
        stage, version = names.get(manifest["stage"], (manifest["stage"], manifest["stage_version"]))
        fix_hashes(place, {**manifest, "stage": stage, "stage_version": version})
    fix_chain(order)


def test_an_unknown_stage_in_a_known_place_is_wrong(run: RunDir, grpo: Grpo) -> None:
    forge(run, run.place(0, "advantages"), replace_value("advantage", 0, lambda value: -value - 1.0))
    later = ("normalize", "batch", "update", "evaluate", "optimizer")
    rename_stages(run, {name: (f"{name}_x", 1) for name in later})
    run.metrics.unlink()
    told = {(p.where.path, p.found) for p in verify_run(run).problems if p.check == "manifests"}
    assert ("iterations/000000/advantages", "it was made by stage 'normalize_x', expected normalize") in told
    assert ("iterations/000001/policy", "it was made by stage 'update_x', expected update") in told
    assert grpo("verify run")[0] == 1


def test_what_an_earlier_version_made_is_told_in_the_verdict(run: RunDir, grpo: Grpo) -> None:
    rename_stages(run, {"normalize": ("normalize", 1)})
    run.metrics.unlink()
    _, said = grpo("verify run")
    assert "not checked: advantages of 2 artifacts: made by stage normalize 1" in said
    assert said.rstrip().endswith("2 checks could not be made")


STEPS = ("rewards", "advantages", "batches", "training_records", "optimizer_steps", "policy", "metrics", "evaluations")


@pytest.mark.parametrize("beginning", range(0, 60, 6))
def test_a_run_that_is_being_written_has_nothing_wrong(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beginning: int
) -> None:
    """The writer goes one step further whenever an artifact is opened, from some opening on."""
    coming = tmp_path / "coming"
    coming.mkdir()
    for name in ("optimizer", *STEPS):
        (run.metrics if name == "metrics" else run.place(1, name)).rename(coming / name)
    pl.read_parquet(coming / "metrics").head(1).write_parquet(run.metrics)
    steps, openings = list(STEPS), 0

    def opening(real: Callable[[Path], Any], place: Path) -> Any:
        nonlocal openings
        openings += 1
        if steps and openings > beginning:
            name = steps.pop(0)
            (coming / name).rename(run.metrics if name == "metrics" else run.place(1, name))
        return real(place)

    for module in (run_dir, verify_files):
        monkeypatch.setattr(module, "open_artifact", partial(opening, artifact.open_artifact))
    with locked(run.root / ".lock"):
        assert verify_run(run).problems == []


def test_whatever_a_check_raises_is_a_finding(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: Any, **__: Any) -> None:
        raise pl.exceptions.PanicException("out of range")

    for name in ("check_completions", "check_prompts", "check_advantages", "check_metrics", "questions"):
        monkeypatch.setattr(verify_module, name, panic)
    told = {p.check for p in verify_run(run).problems if p.found == "cannot be checked: PanicException: out of range"}
    assert told == {"text", "prompt ids", "advantages", "metrics", "held out"}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_stands_in_a_run_verify_has_an_answer(run: RunDir, seed: int) -> None:
    rng = random.Random(seed)
    kinds = [kind for kind in hostile.KINDS if kind is not hostile.bomb]
    what = kinds[seed % len(kinds)](run.root, rng)
    verify_run(run)
    assert what
    assert sorted(path.name for path in (run.root.parent / hostile.OUTSIDE).iterdir())[-1] == "secret.txt"
    assert not Path("/tmp/hostile-new.txt").exists()
