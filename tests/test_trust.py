"""What a command executes: nothing that lies in the directory or that a run brought along, unless its user says so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from pipeline.errors import UntrustedFunction
from pipeline.functions import LIBRARY, import_function, permit, permitting_only
from pipeline.run_dir import RunDir
from stages.checkpoints import hub_config, hub_tokenizer
from tests.small_run import make_small_run

ROOT = Path(__file__).parent.parent
TAKEN = ("grpo", "polars", "pyarrow", "typer", "rich", "pydantic", "jinja2", "numpy", "signal", "csv", "tempfile")
"""Names of modules that files in the current directory take."""
PAYLOAD = 'from pathlib import Path\nPath(__file__).with_name("PWNED_" + Path(__file__).stem).touch()\n'
OWN = "def seven(completion: str) -> float:\n    return float('7' in completion)\n"
IN_TURN = """
import sys
from flows.cli import main
for line in sys.argv[1].splitlines():
    sys.argv = ["grpo", *line.split()]
    try:
        main()
    except SystemExit as end:
        print(line, end.code, file=sys.stderr)
"""
LOOKING = """verify RUN
show RUN
rows RUN completions
groups RUN
metrics RUN
schema completions
report RUN -o report.html
lineage RUN/iterations/000000/policy
audit RUN
ls RUN
diff RUN RUN
tokens RUN --completion ID
whatif RUN --set normalize.scale=none
prune RUN --keep-last 1 --dry-run
replay RUN --stage normalize"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run, not to be changed."""
    return make_small_run(tmp_path_factory.mktemp("trust"), tiny_policy)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, which brings along files with the names of modules."""
    root = Path(shutil.copytree(original, tmp_path / "runs" / "small"))
    for name in TAKEN:
        (root / f"{name}.py").write_text(PAYLOAD)
    return root


def executed(folder: Path) -> list[str]:
    """Return what was executed of the files in a folder."""
    return sorted(path.name for path in folder.rglob("PWNED_*"))


def in_turn(folder: Path, commands: str, *, start: tuple[str, ...] = ()) -> dict[str, str]:
    """Run commands in a folder, one after the other in one process; return command -> exit code."""
    script = folder.parent / "elsewhere" / "grpo"  # as the installed script: its own folder comes first on the path
    script.parent.mkdir(exist_ok=True)
    script.write_text(IN_TURN)
    done = subprocess.run(
        [sys.executable, *start, str(script), commands],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:", "HOME": str(folder)},  # an empty entry means the current directory
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("error: ")]
    return {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines}


def test_commands_that_look_execute_nothing_that_lies_in_the_directory(run: Path) -> None:
    completion = RunDir(run).open(0, "completions").read()["completion_id"][0]
    commands = LOOKING.replace("RUN", ".").replace("ID", completion)
    codes = in_turn(run, commands)
    assert executed(run) == []
    assert set(codes) == set(commands.splitlines())
    assert {command: code for command, code in codes.items() if code != "0"} == {}


@pytest.mark.parametrize("start", [["-m", "flows.cli"], ["-P", "-m", "flows.cli"]])
def test_python_m_does_not_either(run: Path, start: list[str]) -> None:
    command = [sys.executable, *start, "rows", ".", "completions", "-c", "completion", "-f", "csv"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "completion"), done.stderr
    assert executed(run) == []


def test_a_folder_that_pythonpath_names_in_full_stays_on_the_path(run: Path) -> None:
    (run / "own.py").write_text(OWN)
    code = "import sys; from flows.cli import leave_current_directory as leave; leave(); print(sys.path); import own"
    for name in TAKEN:
        (run / f"{name}.py").unlink()
    for start in ([], ["-P"]):
        environment = {"PYTHONPATH": f"{ROOT}:{run}"}
        command = [sys.executable, *start, "-c", code]
        done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.count(repr(str(run))) == 1


def test_a_function_of_the_users_is_found_and_replaces_nothing(run: Path) -> None:
    """In the workers too, which import it anew."""
    (run / "own.py").write_text(OWN)
    (run / "new.toml").write_text('[[score.rewards]]\nname = "seven"\nfunction = "own:seven"\n')
    (run / "hidden.toml").write_text('[[score.rewards]]\nname = "seven"\nfunction = "grpo:seven"\n')
    commands = "rescore . new.toml --run new\nreward try own:seven .\nrescore . hidden.toml --run other"
    codes = in_turn(run, commands)
    assert list(codes.values()) == ["0", "0", "2"]
    assert executed(run) == []
    assert RunDir(run / "new").open(0, "rewards").read()["reward"].to_list() == [0.0] * 4


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command in a folder; it returns the exit code and all that was printed."""

    def run_command(folder: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out + printed.err

    return run_command


def touch(folder: Path) -> dict[str, Any]:
    return {"cmd": f"touch {folder}/PWNED_shell"}


NAMES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "a reward": lambda c, folder: c["score"]["rewards"][0].update(function="payload:f"),
    "a shell": lambda c, f: c["score"]["rewards"][0].update(function="subprocess:getoutput", arguments=touch(f)),
    "not a reward": lambda c, f: c["score"]["rewards"][0].update(
        function="stages.rewards.code.sandbox:python", arguments={}
    ),
    "a verifier": lambda c, f: c["score"]["rewards"][0].update(
        function="stages.rewards.answers.format:cosine_length", arguments={"max_tokens": 9, "verifier": "payload:f"}
    ),
    "a judge": lambda c, f: c["score"]["rewards"][0].update(
        function="stages.rewards.judge.judge:judge", arguments={"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    ),
    "less isolation": lambda c, f: c["score"]["rewards"][0].update(
        function="stages.rewards.code.code:code", arguments={"isolation": "process"}
    ),
    "files to read": lambda c, f: c["score"]["rewards"][0].update(
        function="stages.rewards.code.code:code", arguments={"readable": ["/root"]}
    ),
    "a hub model": lambda c, f: c["score"]["rewards"][0].update(
        function="stages.rewards.models.perplexity:perplexity",
        arguments={"model": "evil/model", "revision": "0" * 40},
    ),
    "a baseline": lambda c, f: c["normalize"].update(baseline="payload:f"),
    "a scale": lambda c, f: c["normalize"].update(scale="payload:f"),
    "a loss": lambda c, f: c["update"].update(loss={"name": "payload:f", "arguments": {}}),
    "an engine": lambda c, f: c["generate"].update(engine="payload:f"),
    "an address": lambda c, f: c["prompts"].update(source="http://127.0.0.1:9/evil.jsonl"),
    "a hub dataset": lambda c, f: c["prompts"].update(source="evil/rows", revision="0" * 40),
}
STAGE_OF = {
    "a baseline": "normalize",
    "a scale": "normalize",
    "a loss": "update",
    "an engine": "generate",
    "an address": "prompts",
    "a hub dataset": "prompts",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_only_the_runs_own_config_names_is_not_executed(
    name: str, run: Path, tmp_path: Path, grpo: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "payload.py").write_text(PAYLOAD + "def f(*a, **k): ...\n")
    config = json.loads((run / "config.resolved.json").read_text())
    NAMES[name](config, tmp_path)
    (run / "config.resolved.json").write_text(json.dumps(config))
    (tmp_path / "new.toml").write_text("[normalize]\neps = 0.5\n" if "normalize" not in STAGE_OF.get(name, "") else "")
    stage = STAGE_OF.get(name, "score")
    # what is stored is replayed, what is missing is made
    whole = shutil.copytree(run, tmp_path / "whole")
    made = {"generate": "completions", "score": "rewards", "normalize": "advantages", "update": "policy"}
    shutil.rmtree(run / "iterations" / "000000" / made.get(stage, stage))
    before = sorted(tmp_path.rglob("*"))
    grpo(tmp_path, "replay", str(whole), "-i", "0", "--stage", stage)
    grpo(tmp_path, "verify", str(whole))
    for command in (
        ["stage", stage, str(run), "-i", "0"],
        ["fork", str(run), "new.toml", "--at", "0"],
        *([["rescore", str(run), "new.toml"]] if stage in ("score", "normalize") else []),
    ):
        code, printed = grpo(tmp_path, *command)
        assert code == 2, (command, printed)
        assert "give --trust" in printed, (command, printed)
    assert executed(tmp_path) == []
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.name != ".lock"] == []


def test_a_run_at_an_address_that_only_the_config_names_is_not_asked_for(
    run: Path, tmp_path: Path, grpo: Callable[..., tuple[int, str]]
) -> None:
    config = json.loads((run / "config.resolved.json").read_text())
    config["offline"] = [{"run": "http://127.0.0.1:9/evil", "iterations": [0]}]
    (run / "config.resolved.json").write_text(json.dumps(config))
    shutil.rmtree(run / "iterations" / "000000" / "completions")
    code, printed = grpo(tmp_path, "stage", "generate", str(run), "-i", "0")
    assert code == 2
    assert "http://127.0.0.1:9/evil, which lies on another machine" in printed


def test_a_hub_model_that_only_the_config_names_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("was asked"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("was asked"))
    for look in (hub_config, hub_tokenizer):
        with (
            permitting_only(),
            pytest.raises(UntrustedFunction, match="evil/model, which would be asked for on the hub"),
        ):
            look("evil/model", None)
    with permitting_only(["evil/model"]), pytest.raises(pytest.fail.Exception, match="was asked"):
        hub_tokenizer("evil/model", None)


def test_a_function_that_the_run_names_is_executed_when_its_user_trusts_the_run(
    tiny_policy: Path, tmp_path: Path, grpo: Callable[..., tuple[int, str]]
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    run = make_small_run(folder, tiny_policy, function="tests.rewards:has_seven")
    code, printed = grpo(tmp_path, "replay", str(run), "-i", "0", "--stage", "score")
    assert code == 2  # no answer
    assert "not computed" in printed
    assert "tests.rewards:has_seven, which lies outside of the library" in printed
    assert grpo(tmp_path, "replay", str(run), "-i", "0", "--stage", "score", "--trust")[0] == 0


def test_recipes_are_compared_before_a_trusted_function_is_imported(
    run: Path, tmp_path: Path, grpo: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "payload.py").write_text(PAYLOAD + "def f(groups): return groups.values\n")
    config = json.loads((run / "config.resolved.json").read_text())
    config["normalize"] |= {"baseline": "payload:f", "eps": 0.5}
    (run / "config.resolved.json").write_text(json.dumps(config))
    code, printed = grpo(tmp_path, "replay", str(run), "-i", "0", "--stage", "normalize", "--trust")
    assert (code, "other recipe" in printed, executed(tmp_path)) == (1, True, [])


def test_another_normalization_keeps_the_stored_rewards(
    run: Path, tmp_path: Path, grpo: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "new.toml").write_text("[normalize]\neps = 0.5\n")
    code, printed = grpo(tmp_path, "rescore", str(run), "new.toml", "--run", "new")
    assert code == 0, printed
    new, old = RunDir(tmp_path / "new"), RunDir(run)
    assert new.open(0, "rewards").digest == old.open(0, "rewards").digest
    assert not new.place(0, "rewards").exists()
    assert new.open(0, "advantages").digest != old.open(0, "advantages").digest
    assert grpo(tmp_path, "verify", "new")[0] == 0


def test_every_family_of_rewards_is_of_the_library() -> None:
    folders = [path.parent.name for path in (ROOT / "stages" / "rewards").glob("*/__init__.py")]
    assert sorted(LIBRARY) == sorted(f"stages.rewards.{name}." for name in folders)


def test_the_users_own_names_are_permitted_and_the_gate_opens_again() -> None:
    with permitting_only(["tests.rewards:has_seven"]):
        assert import_function("tests.rewards:has_seven")
        with pytest.raises(ValueError, match=r"tests\.rewards:opposite, which lies outside of the library"):
            import_function("tests.rewards:opposite")
        permit(["tests.rewards:opposite"])
        assert import_function("tests.rewards:opposite")
    assert import_function("tests.rewards:share_of_digits")
