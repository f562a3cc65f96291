"""Stops whole runs at random moments, as a laptop that is closed or a frozen container does, and compares the results.

    python benchmarks/pause.py benchmarks/kill.toml --runs scratch --stops 12 --seconds 60

First the config runs once without disturbance: the reference. Then the same command runs in another directory; SIGSTOP
goes to all its processes, and SIGCONT after so many seconds. A run is stopped a few times, then a fresh one begins. All
must end with the reference's digests and figures: a pause costs no reward, no retry, no artifact.

Prints one line per stop with what was open then, and a verdict; the exit code is 1 when anything differs. Linux only.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from disturbed_runs import Command, conduct, end_all, make_reference, reap, started
from remains import compare, look

STOPS_PER_RUN = 4


def stop_all(spared: int | None) -> list[int]:
    """Stop everything that this process started, what is just being started too; return the process ids."""
    stopped: list[int] = []
    while fresh := started(spared).keys() - set(stopped):
        signal_all(sorted(fresh), signal.SIGSTOP)
        stopped += sorted(fresh)
    return stopped


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Signal processes that may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def disturb(
    process: "subprocess.Popen[bytes]",
    directory: Path,
    waits: list[float],
    seconds: float,
    spared: int | None,
    count: int,
) -> int:
    """Stop a run after each wait, unless it ends before; return how often."""
    began, paused = time.monotonic(), 0.0
    for done, wait in enumerate(waits):
        try:
            process.wait(wait)
            return done
        except subprocess.TimeoutExpired:
            stopped = stop_all(spared)
        at = time.monotonic() - began - paused
        time.sleep(seconds)
        state = look(directory)
        signal_all(stopped, signal.SIGCONT)
        paused += seconds
        number = count + done + 1
        places = ", ".join(state.partial) or "nothing is being written"
        print(f"{number:4}  after {at:6.1f} s  {len(stopped):3} processes  {places}", flush=True)
    return len(waits)


def run_all(command: Command, root: Path, options: argparse.Namespace, spared: int | None) -> int:
    """Run the reference and the stopped runs; print the report; return the exit code."""
    reference = root / "reference"
    began = time.monotonic()
    manifests = make_reference(command, reference, root / "logs" / "reference.log")
    length = time.monotonic() - began
    chance = random.Random(options.seed)
    problems: list[str] = []
    stops = runs = 0
    while stops < options.stops:
        runs += 1
        directory, log = root / f"paused-{runs}", root / "logs" / f"paused-{runs}.log"
        planned = min(STOPS_PER_RUN, options.stops - stops)
        moments = sorted(chance.uniform(0, length) for _ in range(planned))
        waits = [moment - before for moment, before in zip(moments, [0.0, *moments], strict=False)]
        process = command.start(directory, log)
        stops += disturb(process, directory, waits, options.seconds, spared, stops)
        try:
            code = process.wait(command.timeout)
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            problems.append(f"{directory.name}: exit code {code} (see {log})")
        problems += [f"{directory.name}: {line!r} outlives the run" for line in started(spared).values()]
        end_all(spared)
        reap(spared)
        problems += compare(manifests, reference, directory)
    print("".join(f"\nproblem: {text}" for text in problems))
    print(
        f"{'FAIL' if problems else 'PASS'}: {stops} stops of {options.seconds:g} s in {runs} runs, "
        f"{runs * len(manifests)} artifacts compared with the reference, {len(problems)} problems, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=12, help="so many in all; default 12")
    parser.add_argument("--seconds", type=float, default=60, help="each; default 60")
    return conduct(parser, run_all)


if __name__ == "__main__":
    sys.exit(main())
