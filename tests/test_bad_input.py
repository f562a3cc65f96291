"""Every mistake a user can make ends in one message, exit code 2, and nothing written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.cli import main
from tests.builders import reward_rows, write_artifact

CONFIG = """
iterations = 1
[policy]
model = "{policy}"
[prompts]
source = "reasoning_gym:chain_sum"
prompts_per_iteration = 4
[generate]
engine = "transformers"
group_size = 2
max_tokens = 8
[[score.rewards]]
name = "accuracy"
function = "stages.rewards.answers.reasoning_gym:verify"
"""


@dataclass(frozen=True)
class Result:
    """What a command left on the terminal."""

    returncode: int
    stdout: str
    stderr: str


Grpo = Callable[..., Result]


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grpo:
    """Return a function that runs the command line in a folder."""

    def run_command(folder: Path, *arguments: str) -> Result:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return Result(int(exit_.value.code or 0), printed.out, printed.err)

    return run_command


def expect_refusal(result: Result, *fragments: str) -> None:
    """Check that the command said one thing, in which all fragments occur, and exited with 2."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.fixture
def folder(tmp_path: Path, tiny_policy: Path) -> Path:
    """Return a folder with a config that is right."""
    (tmp_path / "config.toml").write_text(CONFIG.format(policy=tiny_policy))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("update.learning_rat=1", ["update.learning_rat: unknown key", "did you mean learning_rate?"]),
        ("update.learning_rate=fast", ["update.learning_rate", "valid number", "'fast'"]),
        ("prompts.source=missing.jsonl", ["missing.jsonl does not exist"]),
        ("prompts.source=reasoning_gym:nonsense", ["no task 'nonsense'", "chain_sum"]),
        ("prompts.source=empty.jsonl", ["empty.jsonl is empty"]),
        ("policy.model=./nowhere", ["./nowhere has no config.json"]),
        ("policy.model=./encoder", ["BertModel", "expected a causal language model"]),
        ("policy.model=no/such-model", ["no/such-model", "neither a directory nor a model that can be loaded"]),
        ("generate.group_size=1", ["group_size is 1", "2 or more"]),
        ("generate.max_tokens=128", ["generate.max_tokens is 128", "context is 128 tokens"]),
        ("score.rewards=[{name='a', function='no.module:f'}]", ["'no.module:f'", "cannot be imported"]),
        ("generate.num_threads=4096", ["num_threads is 4096", "set it to"]),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(
    grpo: Grpo, folder: Path, override: str, fragments: list[str]
) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text('{"architectures": ["BertModel"]}')
    before = sorted(folder.rglob("*"))
    expect_refusal(grpo(folder, "run", "config.toml", "--set", override), *fragments)
    assert sorted(folder.rglob("*")) == before


def test_a_missing_config_is_refused(grpo: Grpo, folder: Path) -> None:
    expect_refusal(grpo(folder, "run", "absent.toml"), "absent.toml does not exist")


def test_a_dead_prefect_server_is_named_before_anything_is_written(
    grpo: Grpo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    before = sorted(folder.rglob("*"))
    expect_refusal(grpo(folder, "run", "config.toml"), "http://127.0.0.1:9/api, where no Prefect server answers")
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a run whose first iteration has prompts; made without an engine, and not to be changed."""
    from pipeline.run_dir import RunDir
    from pipeline.stage import run_stage
    from stages.config import load_config
    from stages.wiring import Wiring

    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "config.toml").write_text(CONFIG.format(policy=tiny_policy))
    config = load_config(folder / "config.toml")
    run_dir = RunDir(folder / "runs" / "config")
    wiring = Wiring(config, run_dir)
    run_dir.record_config((folder / "config.toml").read_text(), config.model_dump(mode="json"))
    run_stage(wiring.initial_policy(Path(config.policy.model)), Path(config.policy.model))
    run_stage(wiring.call("prompts", 0), None)
    return run_dir.root


@pytest.fixture
def run(original: Path, folder: Path) -> Path:
    """Return a copy of the run."""
    return Path(shutil.copytree(original, folder / "runs" / "config"))


def part_of(run: Path) -> Path:
    return run / "iterations" / "000000" / "prompts" / "part-00000.parquet"


def test_a_truncated_part_is_refused(grpo: Grpo, run: Path) -> None:
    part = part_of(run)
    part.write_bytes(part.read_bytes()[:-20])
    expect_refusal(
        grpo(run.parent.parent, "stage", "generate", str(run), "-i", "0"), "part-00000.parquet has", "delete"
    )
    assert not (run / "iterations" / "000000" / "completions").exists()


def test_a_part_with_a_flipped_byte_is_refused(grpo: Grpo, run: Path) -> None:
    part = part_of(run)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    for command in (["stage", "prompts", str(run), "-i", "0"], ["rows", str(run), "prompts"]):
        expect_refusal(grpo(run.parent.parent, *command), "part-00000.parquet has SHA-256", "restore")


def test_an_artifact_of_another_recipe_is_refused_and_kept(grpo: Grpo, run: Path) -> None:
    place = run / "iterations" / "000000" / "rewards"
    foreign = write_artifact(place, "rewards", reward_rows(a=[1.0]))
    shutil.rmtree(run / "iterations" / "000000" / "prompts")
    write_artifact(run / "iterations" / "000000" / "prompts", "rewards", reward_rows(a=[1.0]))
    result = grpo(run.parent.parent, "stage", "prompts", str(run), "-i", "0")
    expect_refusal(result, "is taken by an artifact of another recipe", "never overwritten")
    assert (place / "manifest.json").is_file()
    assert foreign.digest


def test_another_config_for_the_same_run_is_refused(grpo: Grpo, run: Path) -> None:
    before = (run / "config.resolved.json").read_bytes()
    result = grpo(run.parent.parent, "run", "config.toml", "--set", "update.learning_rate=0.5")
    expect_refusal(result, "update.learning_rate was 1e-06, now 0.5", "new run directory")
    assert (run / "config.resolved.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--set", "generate.num_threads=4096"], "generate.num_threads is 4096"),
        (["--run", "runs/config"], "was made with another config"),
    ],
)
def test_a_fork_is_refused_before_anything_is_written(
    grpo: Grpo, folder: Path, run: Path, arguments: list[str], fragment: str
) -> None:
    (folder / "other.toml").write_text("[update]\nlearning_rate = 0.5\n")
    before = sorted(folder.rglob("*"))
    expect_refusal(grpo(folder, "fork", str(run), "other.toml", "--at", "0", *arguments), fragment)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("text", "fragment"), [("[]", "it holds a list"), ("{", "Expecting property name")])
def test_settings_of_a_run_that_are_none_are_refused(grpo: Grpo, run: Path, text: str, fragment: str) -> None:
    (run / "config.resolved.json").write_text(text)
    result = grpo(run.parent.parent, "stage", "prompts", str(run), "-i", "0")
    expect_refusal(result, "config.resolved.json cannot be read", fragment, "restore it from a copy")


def test_a_run_that_another_process_writes_is_refused(grpo: Grpo, run: Path) -> None:
    from pipeline.run_dir import RunDir
    from pipeline.runs import lock

    with lock(RunDir(run)):
        result = grpo(run.parent.parent, "stage", "prompts", str(run), "-i", "0")
    expect_refusal(result, "another process is writing")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["ls", "nowhere"], "nowhere does not exist"),
        (["show", "."], "is not a run directory"),
        (["rows", "{run}", "nonsense"], "there is no dataset 'nonsense'"),
        (["rows", "{run}", "prompts", "-c", "nonsense"], "has no columns ['nonsense']"),
        (["rows", "{run}", "prompts", "-w", "nonsense ="], "is not an SQL condition"),
        (["rows", "{run}", "completions"], "has no finished completions yet"),
        (["schema", "nonsense"], "there is no dataset 'nonsense'"),
        (["stage", "nonsense", "{run}", "-i", "0"], "there is no stage 'nonsense'"),
        (["stage", "score", "{run}", "-i", "0"], "has no manifest.json"),
        (["metrics", "{run}"], "has no finished iteration yet"),
    ],
)
def test_a_wrong_argument_is_one_message(grpo: Grpo, run: Path, arguments: list[str], fragment: str) -> None:
    expect_refusal(grpo(run.parent.parent, *(a.replace("{run}", str(run)) for a in arguments)), fragment)


FULL_DEVICE = """
set -eu
mount -t tmpfs -o size=4m tmpfs "$DISK"
cp -r "$RUN" "$DISK/run"
dd if=/dev/zero of="$DISK/filler" bs=4k 2>/dev/null || true
code=0; "$PYTHON" -m flows.cli stage prompts "$DISK/run" -i 1 || code=$?
ls -A "$DISK/run/iterations/000001" > "$LEFT" 2>/dev/null || true
rm "$DISK/filler"
"$PYTHON" -m flows.cli stage prompts "$DISK/run" -i 1
exit $code
"""


def test_a_full_device_is_one_message_and_nothing_half_written_stays(run: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own; the same command goes on once there is room."""
    namespace = ["unshare", "--map-root-user", "--user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("this system lets nobody make a mount namespace, without which a device cannot be filled")
    disk, left = tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    root = str(Path(__file__).parent.parent)
    variables = {"DISK": str(disk), "RUN": str(run), "LEFT": str(left), "PYTHON": sys.executable, "PYTHONPATH": root}
    shell = [*namespace, "bash", "-c", FULL_DEVICE]
    done = subprocess.run(
        shell, env={**os.environ, **variables}, capture_output=True, text=True, timeout=600, check=False
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    expect_refusal(result, "no space left on the device", "run the same command again")
    assert "part-00000.parquet" not in left.read_text()
    assert "iterations/000001/prompts" in result.stdout
