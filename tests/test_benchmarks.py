"""The benchmark scripts: what they decide without starting a run."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    """Return a script as a module."""
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


BENCHMARKED = (
    "digests",
    "evaluated_answers",
    "fuzz_configs",
    "hostile_runs",
    "kill",
    "overhead",
    "pause",
    "prefect_overhead",
    "report",
    "stops",
)


@pytest.mark.parametrize("name", BENCHMARKED)
def test_help_shows_what_is_measured(name: str) -> None:
    result = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python benchmarks/{name}.py" in result.stdout


def test_look_finds_what_a_killed_run_left(tmp_path: Path) -> None:
    remains = load("remains")
    iteration = tmp_path / "run" / "iterations" / "000000"
    for name in (".completions.partial", ".policy.doomed", "prompts"):
        (iteration / name).mkdir(parents=True)
    (tmp_path / "run" / ".metrics.parquet.0123456789abcdef.tmp").touch()
    state = remains.look(tmp_path)
    assert list(state.partial) == ["run/iterations/000000/completions"]
    assert state.doomed == {"run/iterations/000000/policy"}
    assert state.temporary == {"metrics.parquet"}
    assert len(remains.leftovers(tmp_path)) == 3


def test_clock_counts_inner_times_once() -> None:
    overhead = load("overhead")
    ticks = iter([-5.0, 0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    clock = overhead.Clock(lambda: next(ticks))
    clock.begin_iteration()  # what was before is no iteration
    with clock.during("artifacts", "score"), clock.during("fsync"):
        pass
    clock.begin_iteration()
    assert clock.iterations == [
        {("between", "other"): 1.0 + 16.0, ("score", "artifacts"): 2.0 + 8.0, ("score", "fsync"): 4.0}
    ]


def test_strange_configs_are_refused_or_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the cases, in this process: what computes without end would run into the suite's limit."""
    fuzz = load("fuzz_configs")
    fuzz.sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = {case: fuzz.examine(fuzz.write_case(case, 7, tmp_path), tmp_path) for case in range(50)}
    assert {case: outcome.text for case, outcome in found.items() if not outcome.is_fine} == {}
    assert len({outcome.kind for outcome in found.values()} - {"accepted"}) > 1
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "config.toml"])
