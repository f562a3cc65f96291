"""Kills runs with SIGKILL at random moments of every stage, and compares what they end with to an undisturbed run.

    python benchmarks/kill.py configs/demo.toml --runs scratch --kills 20 --set iterations=3

First the config runs once without disturbance: the reference. Then the same command runs in another directory and is
killed again and again; each kill is aimed at the stage that was hit least so far, when its hidden directory is seen.
When a run is done and more kills are wanted, a fresh one begins. Three ways to kill:

    tree     the process and all that it started, at once: what a power cut does
    main     the main process alone: all that it started must end by itself within 5 seconds
    engine   the engine's process alone: the run must end with one message, and the same command must go on

After each kill every finished artifact must be whole and have the reference's digest already. In the end all digests
and all figures of `metrics.parquet` but the times must be equal, and no half-written file may be left.

Prints one line per kill with what was open at the moment of death, a table by stage, and a verdict; the exit code is 1
when anything differs. Linux only. `--prefect shared` (default) starts one Prefect server for all runs, which makes a
restart cheap; with `--prefect temporary` each run has its own, as users' runs have, and it is killed too.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from disturbed_runs import Command, conduct, end_all, make_reference, reap, started
from remains import State, compare, differences, look

from pipeline.manifest import MANIFEST, Manifest

POLL_SECONDS = 0.0005
"""The short stages are open for a few milliseconds."""

ORPHAN_SECONDS = 5.0
"""What a killed main process started must be gone after this time."""

MOMENTS = ("starting", "sealing", "half sealed", "removing", "between stages", "metrics")
"""Targets beside the stages. ``half sealed``: one of a stage's outputs is finished, another is not."""

RARE = frozenset({"removing", "metrics"})
"""Moments of about a millisecond: aimed at, not insisted on."""


@dataclass
class Kill:
    """One kill and what was found after it."""

    number: int
    target: str
    way: str
    seconds: float
    """Since the process began."""
    found: set[str]
    """Stages and moments of MOMENTS that it hit."""
    detail: str
    orphan_seconds: float | None = None
    """For ``main``: until the last process was gone."""


def engine_pid(pids: dict[int, str]) -> int | None:
    """Return the engine's process, known by the program that it runs."""
    return next((pid for pid, line in pids.items() if "stages.engines.worker" in line), None)


class Hunter:
    """Chooses targets, waits for them, kills, and keeps the book."""

    def __init__(self, command: Command, reference: dict[str, Manifest], seed: int, spared: int | None) -> None:
        self.command, self.reference, self.spared = command, reference, spared
        self.random = random.Random(seed)
        self.hits: Counter[str] = Counter()
        self.tries: Counter[str] = Counter()
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.seconds_to_work = 15.0
        """From the start of a process to its first open directory."""

    def targets(self) -> list[str]:
        """Return the stages in the order in which the reference made them, and the moments."""
        made = sorted(self.reference.values(), key=lambda m: m.started_at)
        return [*dict.fromkeys(m.stage for m in made), *MOMENTS]

    def missed(self) -> set[str]:
        """Return what has not been hit yet."""
        return {t for t in self.targets() if not self.hits[t]} - RARE

    def choose(self, directory: Path) -> str:
        """Return what to aim at: of what still lies ahead, the least hit and least tried."""
        ahead = {m.stage for path, m in self.reference.items() if not (directory / path / MANIFEST).is_file()}
        if _half_sealed(directory, self.reference) and not self.tries["removing"]:
            return "removing"
        choices = [t for t in self.targets() if t in ahead or (t in MOMENTS and t != "removing")]
        return min(choices, key=lambda t: (self.hits[t], self.tries[t]))

    def hunt(self, directory: Path, log: Path) -> bool:
        """Start the command and kill it once; return whether the run was finished instead."""
        number = len(self.kills) + 1
        target = self.choose(directory)
        self.tries[target] += 1
        before = look(directory)
        began = time.monotonic()
        process = self.command.start(directory, log)
        due = began + self.random.uniform(0, self.seconds_to_work) if target == "starting" else None
        seen: set[str] = set()
        while process.poll() is None:
            now = time.monotonic()
            state = look(directory)
            active = {p for p, mark in state.partial.items() if before.partial.get(p) != mark} - state.doomed
            if active and not seen:
                self.seconds_to_work = now - began
            if due is None and (delay := self._delay(target, directory, before, state, active, seen)) is not None:
                due = now + delay
            seen |= active
            if due is not None and now >= due:
                break
            if now - began > self.command.timeout:
                self.problems.append(f"kill {number}: no end after {self.command.timeout:.0f} s (see {log})")
                break
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            reap(self.spared)
            self._check_end(f"run before kill {number}", process.returncode, log)
            return True
        way = self._way(number, target)
        way, orphan_seconds = self._kill(process, way, number, log)
        found, detail = self._describe(directory, before, seen)
        kill = Kill(number, target, way, time.monotonic() - began, found, detail, orphan_seconds)
        self.kills.append(kill)
        self.hits.update(found)
        self.problems += [f"after kill {number}: {text}" for text in differences(self.reference, directory)]
        orphans = "" if orphan_seconds is None else f"  (last process gone after {orphan_seconds:.2f} s)"
        print(f"{number:4}  {target:14}  {kill.way:6}  {kill.seconds:6.1f} s  {detail}{orphans}", flush=True)
        return False

    def _delay(
        self, target: str, directory: Path, before: State, state: State, active: set[str], seen: set[str]
    ) -> float | None:
        """Return the seconds to wait before the kill when the target is there, None when it is not."""
        uniform = self.random.uniform
        if target == "sealing":
            return 0.0 if any(_is_sealing(directory, place) for place in active) else None
        if target == "half sealed":
            return uniform(0, 0.002) if _half_sealed(directory, self.reference, active) else None
        if target == "removing":
            return 0.0 if state.doomed - before.doomed else None
        if target == "metrics":
            return 0.0 if "metrics.parquet" in state.temporary else None
        if target == "between stages":
            return uniform(0, 0.03) if seen - state.partial.keys() and self.random.random() < 0.3 else None
        for place in active:
            if place in self.reference and self.reference[place].stage == target:
                # after a miss nearer to the beginning
                return uniform(0, self.reference[place].seconds) / 4 ** max(
                    self.tries[target] - self.hits[target] - 1, 0
                )
        return None

    def _way(self, number: int, target: str) -> str:
        if (target, self.hits[target] % 2) in (("evaluate", 0), ("generate", 1)):
            return "engine"
        return "main" if number % 3 == 0 else "tree"

    def _kill(self, process: "subprocess.Popen[bytes]", way: str, number: int, log: Path) -> tuple[str, float | None]:
        """Kill; return the way that was possible, and for ``main`` the seconds until the last process was gone."""
        if way == "engine" and (engine := engine_pid(started(self.spared))) is not None:
            os.kill(engine, signal.SIGKILL)
            try:
                code = process.wait(self.command.timeout)
            except subprocess.TimeoutExpired:
                self.problems.append(f"kill {number}: the run hangs without its engine (see {log})")
                code = 2
            if code not in (0, 2):
                self.problems.append(f"kill {number}: exit code {code} after the engine was killed (see {log})")
            self._check_log(f"kill {number}", log)
            survivors = started(self.spared)
            self.problems += [f"kill {number}: {line!r} outlives the run" for line in survivors.values()]
            end_all(self.spared)
            return "engine", None
        process.kill()
        died = time.monotonic()
        if way != "main":
            end_all(self.spared)
            process.wait()
            return "tree", None
        process.wait()
        while (alive := started(self.spared)) and time.monotonic() - died < ORPHAN_SECONDS:
            reap(self.spared)
            time.sleep(0.02)
        seconds = time.monotonic() - died
        self.problems += [
            f"kill {number}: {line[:120]!r} lives {seconds:.0f} s after the main process" for line in alive.values()
        ]
        end_all(self.spared)
        return "main", seconds

    def _describe(self, directory: Path, before: State, seen: set[str]) -> tuple[set[str], str]:
        """Return what the dead process left open: its stages and moments, and the same in words. Read-only."""
        state = look(directory)
        found: set[str] = set()
        words = []
        for place, mark in state.partial.items():
            if before.partial.get(place) == mark and place not in seen:
                words.append(f"{place} untouched since an earlier kill")
                continue
            stage = self.reference[place].stage if place in self.reference else "starter"
            found.add(stage)
            files = [p.name for p in (directory / place).parent.joinpath(f".{Path(place).name}.partial").rglob("*")]
            parts = sum(name.startswith("part-") for name in files)
            note = ", writing" if any(name.endswith(".tmp") for name in files) else ""
            if _is_sealing(directory, place):
                found.add("sealing")
                note = ", sealing"
            words.append(f"{stage}: {place} ({parts} parts of {len(files)} files{note})")
        if _half_sealed(directory, self.reference):
            found.add("half sealed")
        if state.doomed - before.doomed:
            found.add("removing")
        words += [f"{place} being removed" for place in state.doomed]
        if state.temporary:
            found |= {"metrics"} if "metrics.parquet" in state.temporary else set()
            words += [f"{name} being written" for name in state.temporary]
        if not found:
            found.add("between stages" if seen else "starting")
        return found, "; ".join(words) or ("between stages" if seen else "starting")

    def finish(self, directory: Path, log: Path) -> None:
        """Let the command run to its end."""
        process = self.command.start(directory, log)
        try:
            code = process.wait(self.command.timeout)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{directory.name}: no end after {self.command.timeout:.0f} s (see {log})")
            end_all(self.spared)
            return
        self._check_end(directory.name, code, log)

    def _check_end(self, what: str, code: int, log: Path) -> None:
        if code:
            self.problems.append(f"{what}: exit code {code} (see {log})")
        self._check_log(what, log)
        self.problems += [f"{what}: {line!r} outlives the run" for line in started(self.spared).values()]
        end_all(self.spared)

    def _check_log(self, what: str, log: Path) -> None:
        if "Traceback (most recent call last)" in log.read_text(encoding="utf-8", errors="replace"):
            self.problems.append(f"{what}: a traceback in {log}")


def _is_sealing(directory: Path, place: str) -> bool:
    hidden = directory / Path(place).parent / f".{Path(place).name}.partial"
    return any(hidden.glob(f".{MANIFEST}.*.tmp")) or (hidden / MANIFEST).exists()


def _half_sealed(directory: Path, reference: dict[str, Manifest], active: set[str] | None = None) -> bool:
    """Return whether one output of a stage is finished and another is not, but is being written."""
    for place, manifest in reference.items():
        folder = directory / Path(place).parent
        if active is not None and place not in active:
            continue
        if (folder / f".{Path(place).name}.partial").exists():
            siblings = [p for p, m in reference.items() if p != place and m.recipe == manifest.recipe]
            if any((directory / p / MANIFEST).is_file() for p in siblings):
                return True
    return False


def run_all(command: Command, root: Path, num_kills: int, seed: int, spared: int | None) -> int:
    """Run the reference and the killed runs; print the report; return the exit code."""
    reference, log = root / "reference", root / "logs" / "reference.log"
    began = time.monotonic()
    manifests = make_reference(command, reference, log)
    print(f"{'kill':>4}  {'aimed at':14}  {'way':6}  {'after':>8}  open at the moment of death", flush=True)
    hunter = Hunter(command, manifests, seed, spared)
    compared = rounds = 0
    while len(hunter.kills) < num_kills or (hunter.missed() and len(hunter.kills) < 2 * num_kills):
        directory = root / f"killed-{rounds}"
        rounds += 1
        is_done = False
        while not is_done and (len(hunter.kills) < num_kills or hunter.missed()):
            is_done = hunter.hunt(directory, root / "logs" / f"kill-{len(hunter.kills) + 1:03d}.log")
            if len(hunter.kills) >= 2 * num_kills:
                break
        if not is_done:
            hunter.finish(directory, root / "logs" / f"{directory.name}.log")
        hunter.problems += compare(manifests, reference, directory)
        compared += len(manifests)
    print(f"\n{'stage':14}  kills\n" + "\n".join(f"{t:14}  {hunter.hits[t]:5}" for t in hunter.targets()))
    ways = ", ".join(f"{n} {way}" for way, n in Counter(k.way for k in hunter.kills).items())
    problems = hunter.problems + [f"no kill hit {target!r}" for target in sorted(hunter.missed())]
    print("".join(f"\nproblem: {text}" for text in problems))
    print(
        f"{'FAIL' if problems else 'PASS'}: {len(hunter.kills)} kills ({ways}) in {rounds} runs, {compared} artifacts "
        f"compared with the reference, {len(problems)} problems, {time.monotonic() - began:.0f} s"
    )
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at least so many; default 20")
    return conduct(
        parser, lambda command, root, options, spared: run_all(command, root, options.kills, options.seed, spared)
    )


if __name__ == "__main__":
    sys.exit(main())
