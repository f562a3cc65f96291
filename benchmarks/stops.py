"""Stops training in every heavy stage in every way, on a real Prefect server and worker, and runs it on schedules.

    python benchmarks/stops.py benchmarks/stops.toml --runs scratch
    python benchmarks/stops.py benchmarks/stops.toml --runs scratch --only cancel-score term-score schedule

A case WAY-STAGE begins a run that lacks what the stage makes, waits until the stage is under way, stops it, and then
runs the same again to its end. Ways: cancel (`grpo schedule cancel` of a firing), term and kill (SIGTERM and SIGKILL of
`grpo run`), worker (SIGKILL of the worker of a firing). No process may live 10 seconds later, Prefect's states must be
terminal (after SIGKILL: once it has been started again), and all digests must be those of an undisturbed run.

The cases overlap, schedule, null and length are in `stops_schedules.py`.

Prints a table and a verdict; the exit code is 1 when a case fails. The load stands beside the seconds. Linux only.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from remains import look
from stops_lab import Lab, Late, is_over, load, open_lab, state, wait
from stops_schedules import hold, overlap, refuse_second, train_on_schedule

from pipeline.errors import GrpoError
from pipeline.run_dir import RunDir

LIMIT_SECONDS = 10.0
"""By when nothing of a stopped run may live."""
HOLD_SECONDS = 1.0
"""How long a stage has been under way when it is stopped."""
WAYS = ("cancel", "term", "kill", "worker")
AFTER_COMPLETIONS = ("rewards", "advantages", "batches", "training_records", "optimizer_steps", "policy", "optimizer")
STAGES = {
    "engine": ("completions", *AFTER_COMPLETIONS),
    "generate": ("completions", *AFTER_COMPLETIONS),
    "score": AFTER_COMPLETIONS,
    "update": AFTER_COMPLETIONS[3:],
    "optimizer": ("optimizer",),
    "evaluate": ("evaluations",),
}
"""Stage -> the datasets of the last iteration that a run lacks which is to be stopped there: what it makes, and what is
made from that. An engine starts for those that generate or evaluate alone."""
REWARD = """
import time


def reward(completion: str) -> float:
    time.sleep(0.05)
    return sum(map(str.isdigit, completion)) / max(len(completion), 1)
"""


@dataclass
class Row:
    """What is printed of a stop."""

    seconds: float | None = None
    """Until no process was left."""
    load: str = ""
    then: str = ""
    """States of the flow runs, and of the tasks that had not ended, when no process was left."""
    later: str = ""
    """The same after the next start."""
    problems: tuple[str, ...] = ()


def is_under_way(lab: Lab, directory: Path, stage: str, name: str) -> bool:
    """Return whether a run is in the stage now. Read-only."""
    if stage == "engine":
        lines = list(lab.living().values())
        return any("stages.engines.worker" in line for line in lines) and not look(directory).partial
    if stage == "optimizer":  # the state is made again by training again, before it is written
        logs = (lab.root / "logs" / f"{directory.name}.log", directory / ".schedules" / f"{name}.log")
        return any("training again" in log.read_text(encoding="utf-8") for log in logs if log.exists())
    main = {"generate": "completions", "score": "rewards", "update": "policy", "evaluate": "evaluations"}[stage]
    return f"run/iterations/000001/{main}" in look(directory).partial


def stop_case(lab: Lab, way: str, stage: str) -> Row:
    """Begin a run, stop it in the stage, and run it to its end."""
    from flows.schedule import deployments

    name, is_firing = f"{way}-{stage}", way in ("cancel", "worker")
    directory, row, problems = lab.copy(name, *STAGES[stage]), Row(), []
    process = deployed = None
    if is_firing:
        lab.have_worker()
        deployed = lab.put(name, f"{name}/run")
    began = datetime.now(UTC)
    if deployed is None:
        process = lab.run(directory)
    else:
        deployments.run_now(lab.client, deployed)
    wait(lambda: is_under_way(lab, directory, stage, name), f"{stage} under way")
    time.sleep(HOLD_SECONDS)
    row.load = load()
    died, command = stop(lab, way, name, process)
    while lab.living() and time.monotonic() - died < 6 * LIMIT_SECONDS:
        time.sleep(0.02)
    row.seconds = time.monotonic() - died
    if row.seconds > LIMIT_SECONDS:
        problems.append(f"gone after {row.seconds:.1f} s only: {list(lab.living().values()) or ''}")
    if RunDir(directory / "run").has(1, STAGES[stage][0]):
        problems.append("the stage was over before the stop")
    if command is not None and command.wait():
        problems.append(f"grpo schedule cancel ended with {command.returncode}")
    is_orderly = way in ("cancel", "term")
    if is_orderly:
        until_over(lambda: lab.flow_runs(began))
    row.then = states(lab, began, None)
    if is_orderly and not all(map(is_over, lab.flow_runs(began))):
        problems.append("a flow run goes on in Prefect")
    if process is not None and process.wait() != (130 if way == "term" else -signal.SIGKILL):
        problems.append(f"exit code {process.returncode}")
    again = datetime.now(UTC)
    problems += go_on(lab, directory, name, deployed)
    old = lab.flow_runs(began, again)
    until_over(lambda: [task for run in old for task in lab.task_runs(run)])
    row.later = states(lab, began, again)
    if not all(map(is_over, [*lab.flow_runs(began, again), *(task for run in old for task in lab.task_runs(run))])):
        problems.append("not terminal in Prefect after the next start")
    problems += lab.differences(directory)
    row.problems = tuple(problems)
    return row


def stop(
    lab: Lab, way: str, name: str, process: "subprocess.Popen[bytes] | None"
) -> tuple[float, "subprocess.Popen[str] | None"]:
    """Stop a run; return the time of the signal, or of Prefect's being told, and the command that has told it."""
    if process is not None:
        process.send_signal(signal.SIGTERM if way == "term" else signal.SIGKILL)
    elif way == "worker":
        lab.kill_worker()
    else:
        command = lab.machine.start("schedule", "cancel", name)
        lab.own.add(command.pid)
        wait(lambda: state(lab.firings(name)[-1]) != "Running", "Prefect's being told of the cancellation")
        return time.monotonic(), command
    return time.monotonic(), None


def until_over(read: Callable[[], list[Any]]) -> None:
    """Wait a little for what is told by events."""
    try:
        wait(lambda: all(map(is_over, read())), "states", LIMIT_SECONDS)
    except Late:
        return


def states(lab: Lab, since: datetime, before: datetime | None) -> str:
    """Return how flow runs stand, and how many of their tasks have not ended."""
    words = []
    for run in lab.flow_runs(since, before):
        tasks = sum(not is_over(task) for task in lab.task_runs(run))
        kind = "firing" if run.deployment_id else "run"
        words.append(f"{kind} {state(run)}" + (f" ({tasks} tasks open)" if tasks else ""))
    return ", ".join(words)


def go_on(lab: Lab, directory: Path, name: str, deployed: Any) -> list[str]:
    """Start the same again, and return what is wrong with how it ended."""
    from flows.schedule import deployments

    if deployed is None:
        lab.finish(directory)
        return []
    lab.have_worker()
    before = len(lab.firings(name))
    deployments.run_now(lab.client, deployed)
    wait(lambda: len(lab.firings(name)) > before and is_over(lab.firings(name)[-1]), "the next firing's end")
    last = lab.firings(name)[-1]
    said = last.state.message if last.state else ""
    return [] if state(last) == "Completed" else [f"the next firing is {state(last)}: {said}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/stopped"), help="scratch directory; must not exist")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases; default: all")
    arguments = parser.parse_args()
    cases: dict[str, Callable[[Lab], Row | list[str]]] = {
        f"{way}-{stage}": partial(stop_case, way=way, stage=stage) for stage in STAGES for way in WAYS
    }
    cases |= {"overlap": overlap, "second": refuse_second, "schedule": train_on_schedule}
    cases |= {kind: partial(hold, kind=kind) for kind in ("null", "length")}
    wanted = arguments.only or list(cases)
    if unknown := set(wanted) - set(cases):
        parser.error(f"no such cases: {', '.join(sorted(unknown))}; there are: {', '.join(cases)}")
    if arguments.runs.exists():
        parser.error(f"{arguments.runs} exists: name a directory that does not, or delete it")
    began, failed = time.monotonic(), []
    with open_lab(arguments.runs.resolve(), arguments.config.resolve()) as lab:
        (lab.root / "slow.py").write_text(REWARD)
        for name in wanted:
            print(f"\n{name}", flush=True)
            try:
                wait(lambda: not lab.living(), "the end of what earlier cases have begun")
                found = cases[name](lab)
            except (Late, GrpoError, AssertionError) as error:
                found = [str(error)]
            if isinstance(found, Row):
                print(f"| {name} | {found.seconds:.1f} | {found.load} | {found.then} | {found.later} |", flush=True)
                found = list(found.problems)
            print("\n".join(f"problem: {text}" for text in found) or "ok", flush=True)
            failed += [name] if found else []
    verdict = f"FAIL ({', '.join(failed)})" if failed else "PASS"
    print(f"\n{verdict}: {len(wanted)} cases in {time.monotonic() - began:.0f} s on {os.cpu_count()} cores")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
