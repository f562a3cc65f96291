"""A run, its plan, and what the run then does."""

import shutil
from contextlib import closing
from pathlib import Path

from flows.planning.estimate import Estimator
from flows.planning.plan import Plan, because, make_plan
from flows.planning.planned import Verdict
from flows.prepare import check
from flows.reporter import SilentReporter
from flows.session import Session
from flows.training import PlainWork, train_in
from pipeline.run_dir import RunDir
from pipeline.stage import StageResult
from stages.config import RunConfig
from stages.engines.scripted import ScriptedEngine
from tests.finished import answer


class Recorder(SilentReporter):
    """Records what a run does about artifacts, and what it says."""

    def __init__(self) -> None:
        self.computed: set[Path] = set()
        self.reused: set[Path] = set()
        self.notes: list[str] = []

    def finished(self, label: str, result: StageResult) -> None:
        places = {artifact.path for artifact in result.outputs.values()}
        (self.reused if result.reused else self.computed).update(places)

    def note(self, text: str) -> None:
        self.notes.append(text)


def tree(folder: Path) -> dict[str, int]:
    """Return every path below a folder, with when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def planned(settings: RunConfig, run: RunDir) -> Plan:
    """Return the plan of a run, after checking that making it wrote nothing."""
    before = tree(run.root.parent)
    made = make_plan(settings, run, Estimator([run]))
    assert tree(run.root.parent) == before
    return made


def train(settings: RunConfig, run: RunDir) -> Recorder:
    """Train as `grpo run` does, without Prefect and with scripted answers; return what was done."""
    recorder = Recorder()
    check(settings, run, "")
    run.record_config("", settings.model_dump(mode="json"))
    with closing(Session(settings, run, recorder, _engine=ScriptedEngine(answer))) as session:
        train_in(session, PlainWork())
    return recorder


def places(plan: Plan, verdict: Verdict) -> set[Path]:
    """Return the artifacts of a verdict."""
    return {place for item, _ in plan.artifacts if item.verdict is verdict for place in item.places.values()}


def reasons(plan: Plan, verdict: Verdict) -> dict[str, str]:
    """Return why, by step and iteration, for the artifacts of a verdict."""
    found = [item for item, _ in plan.artifacts if item.verdict is verdict]
    return {f"{item.step} {item.iteration}": because(item) for item in found}


def check_equal(plan: Plan, done: Recorder) -> None:
    """Assert that a run did what its plan says."""
    assert not plan.refusals
    assert places(plan, Verdict.compute) == done.computed
    assert done.reused - done.computed <= places(plan, Verdict.reuse)  # held-out prompts are found again
    assert all((place / "manifest.json").is_file() for place in places(plan, Verdict.reuse) if in_run(plan, place))


def in_run(plan: Plan, place: Path) -> bool:
    return not plan.run.refers(int(place.parent.name), place.name) if place.parent.name.isdigit() else True


def digests(run: RunDir) -> dict[Path, str]:
    return {artifact.path: artifact.digest for artifact in run.artifacts()}


def drop(run: RunDir, iteration: int, *datasets: str) -> None:
    for dataset in datasets:
        shutil.rmtree(run.place(iteration, dataset))
