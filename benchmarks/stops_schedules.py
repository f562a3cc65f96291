"""Cases of `stops.py` on schedules: two on one device, one that trains, pauses and goes on, one whose reward is bad."""

import shutil
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from remains import differences, finished_artifacts, look
from stops_lab import Lab, is_over, state, wait

from pipeline.files import write_text
from pipeline.prune import num_finished
from pipeline.run_dir import RunDir
from tests.judge_server import JudgeServer, Reply, serve
from tests.machine import PATIENCE

HEAVY = ("generate", "score", "logprobs", "update", "optimizer", "evaluate")
FIRINGS = 3
EVERY_SECONDS = 10
DEMO = Path(__file__).parent.parent / "configs" / "demo.toml"
SMALL = ("starter.questions=500", "starter.demonstrations=2000", "starter.steps=60", "evaluate.every=0")
"""Of the demo: a pupil that has learned less, as it is made sooner."""
PLANTED = {
    "null": "None if sum(map(ord, completion)) % 2 else 1.0 * completion.count('1')",
    "length": "float(len(completion))",
}
"""Kind of a bad reward -> its expression."""
HOLDS = {"null": "judge_answered", "length": "reward_length"}
"""Kind of a bad reward -> the check that is to hold it."""
JUDGE = "def reward(completion: str) -> float | None:\n    return {}\n"
REPAIRED = "sum(map(str.isdigit, completion)) / max(len(completion), 1)"


def overlap(lab: Lab) -> list[str]:
    """Let two schedules fire at the same second on one device; their runs must take turns."""
    lab.have_worker()
    while not 2 < time.time() % 30 < 15:
        time.sleep(1)
    began, names = datetime.now(UTC), ("one", "two")
    for name in names:
        lab.copy(name)
    deployed = [lab.put(name, f"{name}/run", every="30s", on_overlap="skip") for name in names]
    wait(lambda: all(any(f.state and f.state.is_running() for f in lab.firings(name)) for name in names), "both begun")
    for one in deployed:
        lab.client.pause_deployment(one.id)
    wait(lambda: all(is_over(f) for name in names for f in lab.firings(name)), "both firings' end", 2 * PATIENCE)
    firings = [next(f for f in lab.firings(name) if f.start_time) for name in names]
    runs = [run for run in lab.flow_runs(began) if not run.deployment_id]
    problems = [f"{f.name} is {state(f)}" for f in [*firings, *runs] if state(f) != "Completed"]
    if len({f.expected_start_time for f in firings}) > 1:
        problems.append("they were not due at once")
    heavy = sorted(
        (task.start_time, task.end_time, f"{run.name}: {task.name}")
        for run in runs
        for task in lab.task_runs(run)
        if task.name.split()[0] in HEAVY and task.start_time
    )
    print(f"due at {firings[0].expected_start_time:%H:%M:%S}")
    for run in runs:
        print(f"{run.parameters['run']} {run.start_time:%H:%M:%S.%f} to {run.end_time:%H:%M:%S.%f}")
    problems += _overlapping((run.start_time, run.end_time, run.name) for run in runs)
    problems += [] if len(heavy) >= 2 * (len(HEAVY) - 1) else [f"{len(heavy)} heavy tasks only"]
    return problems + [text for name in names for text in lab.differences(lab.root / name)]


def _overlapping(intervals: Iterable[tuple[Any, Any, str]]) -> list[str]:
    ordered = sorted(intervals)
    return [f"{one[2]} and {two[2]} overlap" for one, two in pairwise(ordered) if one[1] > two[0]]


def refuse_second(lab: Lab) -> list[str]:
    """Start `grpo run` on a directory on which one works: it must be refused with the name of that one."""
    directory = lab.copy("second", "rewards", "advantages", "batches", "training_records", "policy", "optimizer")
    first = lab.run(directory)
    wait(lambda: look(directory).partial, "the first one under way")
    began = time.monotonic()
    second = lab.machine.start("run", lab.command.config.name, "--run", "second/run")
    said = " ".join(" ".join(second.communicate()).split())
    print(f"after {time.monotonic() - began:.1f} s, exit code {second.returncode}: {said}")
    wait(lambda: first.poll() is not None, "the first one's end")
    problems = [] if first.returncode == 0 else [f"the first one ended with {first.returncode}"]
    if second.returncode != 2 or f"pid {first.pid} on" not in said or "error:" not in said:
        problems.append("the second one was not refused with the owner's name")
    return problems + lab.differences(directory)


def train_on_schedule(lab: Lab) -> list[str]:
    """Let a schedule of a few seconds train the demo's task, and steer it with our commands."""
    lab.have_worker()
    run, problems = RunDir(lab.root / "demo" / "run"), []
    shutil.copy(DEMO, lab.root)
    settings = [word for text in SMALL for word in ("--set", text)]
    often = ["--every", f"{EVERY_SECONDS}s", "--on-overlap", "skip", "--iterations", "1", "--run", "demo/run"]
    print(lab.machine.schedule("add", "demo.toml", *often, *settings).strip())

    def completed() -> list[Any]:
        return [firing for firing in lab.firings("demo") if state(firing) == "Completed"]

    def more(count: int, what: str) -> None:
        """Wait for so many completed firings, and see that each has trained one iteration."""
        wait(lambda: len(completed()) >= count, what, 2 * PATIENCE)
        done, trained = len(completed()), num_finished(run)
        told = completed()[-1].state.message
        print(f"{what}: {done} completed, {trained} iterations, {told}", flush=True)
        if f"--set iterations={done} " not in told:
            problems.append(f"{what}: firing {done} did not train one iteration more")

    for count in range(1, FIRINGS + 1):
        more(count, f"firing {count}")
    print(lab.machine.schedule("pause", "demo").strip())
    wait(lambda: all(map(is_over, lab.firings("demo"))), "the end of what ran when it was paused")
    done, due = len(completed()), len(lab.firings("demo"))
    time.sleep(FIRINGS * EVERY_SECONDS)
    fired = len(lab.firings("demo")) - due
    print(f"paused: {fired} firings in {FIRINGS} intervals")
    problems += ["it fires while it is paused"] if fired else []
    lab.machine.schedule("run-now", "demo")
    more(done + 1, "run-now while it is paused")
    print(lab.machine.schedule("resume", "demo").strip())
    more(done + 2, "resumed")

    wait(lambda: any(place.endswith("completions") for place in look(run.root.parent).partial), "a firing that samples")
    done = len(completed())
    print(lab.machine.schedule("cancel", "demo").strip())
    cancelled = [f for f in lab.firings("demo") if state(f) == "Cancelled" and f.start_time]
    problems += [] if cancelled else ["nothing that ran was cancelled"]
    more(done + 1, "the next firing after a cancelled one")
    lab.machine.schedule("pause", "demo")
    wait(lambda: all(map(is_over, lab.firings("demo"))), "the last firing's end")

    iterations, reference = num_finished(run), lab.root / "reference-demo"
    shutil.copytree(run.root.parent / "starters", reference / "starters")
    arguments = ("--run", "reference-demo/run", *settings, "--set", f"iterations={iterations}")
    lab.machine.grpo("run", "demo.toml", *arguments)
    problems += differences(finished_artifacts(reference), run.root.parent)
    print(f"{iterations} iterations with the digests of one undisturbed run" if not problems else "", flush=True)
    return problems


def hold(lab: Lab, kind: str) -> list[str]:
    """Schedule a run with a planted bad reward: a check must hold it, and tell a webhook, until it is repaired."""
    with serve(lambda *_: Reply(body=b"{}")) as receiver:
        lab.machine.grpo("alert", "add", f"http://127.0.0.1:{receiver.port}", "--name", kind, "--on", "check.failed")
        try:
            return _hold(lab, kind, receiver)
        finally:
            lab.machine.grpo("alert", "remove", kind)


def _hold(lab: Lab, kind: str, receiver: JudgeServer) -> list[str]:
    lab.have_worker()
    directory, name, check = lab.root / kind, f"{kind}.toml", HOLDS[kind]
    run, problems = RunDir(directory / "run"), []
    config = lab.command.config.read_text().replace("slow:reward", f"judge_{kind}:reward")
    checks = f'[[checks]]\nname = "{check}"\ncheck = "{check}"\nseverity = "block"\n'
    (lab.root / name).write_text(f"{config}\n{checks}".replace("[update]", "[score]\nmax_failed_share = 1.0\n[update]"))
    judge = lab.root / f"judge_{kind}.py"
    write_text(judge, JUDGE.format(PLANTED[kind]))
    often = ["--every", f"{EVERY_SECONDS}s", "--on-overlap", "skip", "--iterations", "1", "--run", f"{kind}/run"]
    lab.machine.schedule("add", name, *often, "--set", "evaluate.every=0")

    def ended(wanted: str) -> list[Any]:
        return [firing for firing in lab.firings(kind) if state(firing) == wanted]

    wait(lambda: len(ended("Failed")) >= 2, "two held firings", 2 * PATIENCE)
    said = ended("Failed")[-1].state.message
    print(f"held: {said}", flush=True)
    completions, rewards = run.open(0, "completions").digest, run.open(0, "rewards").digest
    if f"is held by check '{check}'" not in said or ended("Completed"):
        problems.append("the history does not name the check that holds it")
    if run.has(0, "batches") or run.has(0, "policy"):
        problems.append("something was trained on the bad rewards")
    wait(lambda: receiver.bodies, "a call of the webhook")
    told = receiver.bodies[0]
    print(f"the webhook was told: {told['text']}", flush=True)
    if (told["event"], told["details"]["check"]) != ("grpo.check.failed", check):
        problems.append("the webhook was told something else")
    write_text(judge, JUDGE.format(REPAIRED))
    wait(lambda: ended("Completed"), "the firing after the repair", 2 * PATIENCE)
    lab.machine.schedule("pause", kind)
    wait(lambda: all(map(is_over, lab.firings(kind))), "the last firing's end")
    print(f"repaired: {ended('Completed')[0].state.message}; {num_finished(run)} iterations", flush=True)
    if run.open(0, "completions").digest != completions or run.open(0, "rewards").digest == rewards:
        problems.append("the repaired reward did not go on from the stored completions")
    if not run.held(0, "rewards", rewards).exists() or not run.has(0, "policy"):
        problems.append("the held rewards were not kept, or nothing was trained on the new ones")
    return problems
