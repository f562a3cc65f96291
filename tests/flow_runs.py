"""A small training flow whose engine is a script of the user's, and what a Prefect server knows of its flow runs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.run_dir import RunDir

ROOT = Path(__file__).parent.parent
PATIENCE = 1200
"""Seconds after which a process hangs, on however busy a machine."""
ENGINE = '''
"""An engine: answers 2 or 3, as the seed says; dies once if there is a file `die`."""

import os
from pathlib import Path

from stages.engines.base import Engine, EngineSettings
from stages.engines.scripted import ScriptedEngine


def make(settings: EngineSettings) -> Engine:
    return ScriptedEngine(answer, logprob=-0.5)


def answer(request):
    if Path("die").exists():
        Path("die").unlink()
        os._exit(9)
    return [21 + request.seed % 2, 1]
'''
CONFIG = """
iterations = 2
[policy]
model = "{policy}"
[prompts]
source = "rows.jsonl"
prompts_per_iteration = 4
[generate]
group_size = 4
max_tokens = 8
engine = "scripted_answers:make"
[[score.rewards]]
name = "exact"
function = "stages.rewards.answers.matching:exact_match"
[update]
num_threads = 1
[evaluate]
every = 2
num_prompts = 2
num_samples = 2
held_out_share = 0.3
[resources]
reward_workers = 1
"""
NO_PREFECT = """
import sys
from flows.cli import main
try:
    main()
finally:
    print([m for m in sys.modules if m in ("prefect", "trackio", "tensorboard", "wandb", "mlflow")])
"""
SERVE = """
from flows.train import train
if __name__ == "__main__":
    train.serve(name="nightly", cron="0 3 * * *")
"""


def start(folder: Path, *command: str, server: str | None = None) -> "subprocess.Popen[str]":
    """Start Python as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if server is not None:
        environment["PREFECT_API_URL"] = server
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def digests(run: Path) -> dict[str, str]:
    return {os.path.relpath(a.path, run): a.digest for a in RunDir(run).artifacts()}


def new_flow_runs(client: Any, work: Callable[[], object]) -> list[Any]:
    """Return the flow runs that some work adds."""
    before = {found.id for found in client.read_flow_runs()}
    work()
    return [found for found in client.read_flow_runs() if found.id not in before]


def artifacts_of(client: Any, flow_run: Any) -> list[Any]:
    """Return the artifacts that the page shows of a flow run, the first one first."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    return sorted(client.read_artifacts(flow_run_filter=only), key=lambda artifact: artifact.created)


def events_of(client: Any, flow_run: Any, name: str) -> list[Any]:
    """Return the events of a name that are related to a flow run, the first one first."""
    from prefect.events.filters import EventFilter, EventNameFilter, EventRelatedFilter

    related = EventRelatedFilter(id=[f"prefect.flow-run.{flow_run.id}"])
    found = client.read_events(EventFilter(event=EventNameFilter(name=[name]), related=related), limit=50).events
    return sorted(found, key=lambda event: event.occurred)
