"""Measures what Prefect costs a run: seconds per iteration, and seconds until the first stage begins.

    python benchmarks/prefect_overhead.py benchmarks/kill.toml --iterations 40 --set evaluate.every=0

The same config is trained in turns, again and again: without Prefect, with a server that is running already, and with
the temporary server that a command without PREFECT_API_URL starts. The times are those at which the files appear: an
iteration lasts from one policy's manifest to the next, so the stages themselves are in it, and Prefect's part is what
an iteration lasts longer than without. Small stages show it best. The first two iterations (imports, warm-up) are left
out. Starters are made before, and all runs share them.

Prints, per way, the median iteration over all rounds, the median of the differences to the same round without Prefect,
the processor time of the running server for an iteration, and the seconds from the command's start to the first
prompts, and from the last policy to its end. Linux only.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

from disturbed_runs import shared_server

from pipeline.manifest import MANIFEST
from pipeline.run_dir import RunDir

WAYS = ("without", "running server", "temporary server")
WARM_UP = 2


@dataclass(frozen=True)
class Timed:
    """What one run took, in seconds."""

    iteration: float
    """Median of those after the warm-up."""
    server: float
    """Processor time of the running server for an iteration."""
    start: float
    end: float


def written(artifact: Path) -> float:
    """Return when an artifact's manifest was written, in seconds since the epoch."""
    return (artifact / MANIFEST).stat().st_mtime_ns / 1e9


def processor_time(process: int) -> float:
    """Return the seconds of processor time that a process has used."""
    figures = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(figures[11]) + int(figures[12])) / os.sysconf("SC_CLK_TCK")


def train(arguments: argparse.Namespace, run: Path, way: str, environment: dict[str, str], server: int) -> Timed:
    """Train once, and read the times."""
    if way != "running server":
        environment = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    overrides = [*arguments.overrides, f"iterations={arguments.iterations}"]
    settings = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, "-m", "flows.cli", "run", str(arguments.config), "--run", str(run), *settings]
    if way == "without":
        command.append("--no-prefect")
    log = run.with_suffix(".log")
    began, used = time.time(), processor_time(server)
    with log.open("wb") as output:
        code = subprocess.call(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    ended, used = time.time(), processor_time(server) - used
    if code:
        raise SystemExit(f"exit code {code}: {log.read_text(errors='replace')}")
    made = RunDir(run)
    policies = [written(made.place(i, "policy")) for i in range(arguments.iterations)]
    iterations = [after - before for before, after in zip(policies[WARM_UP - 1 :], policies[WARM_UP:], strict=False)]
    first = written(made.place(0, "prompts"))
    return Timed(statistics.median(iterations), used / arguments.iterations, first - began, ended - policies[-1])


def print_figures(rounds: list[dict[str, Timed]]) -> None:
    print(f"{'':17} {'s/iteration':>12} {'longer by':>10} {'server':>7} {'until prompts':>14} {'after policy':>13}")
    for way in WAYS:
        iteration, server, start, end = (
            statistics.median(getattr(one[way], item.name) for one in rounds) for item in fields(Timed)
        )
        longer = statistics.median(one[way].iteration - one["without"].iteration for one in rounds)
        print(f"{way:17} {iteration:12.3f} {longer:10.3f} {server:7.3f} {start:14.1f} {end:13.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.iterations <= WARM_UP:
        parser.error(f"--iterations must be more than {WARM_UP}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what we started ends with us
    with tempfile.TemporaryDirectory(prefix="grpo-prefect-overhead-") as scratch:
        root = Path(scratch)
        home = root / "prefect"
        home.mkdir()
        environment = {**os.environ, "PREFECT_HOME": str(home)}
        environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        environment.pop("PREFECT_API_URL", None)
        with shared_server(home, environment) as server:
            train(
                arguments, root / "warm-up", "without", environment, server
            )  # makes the starter, fills the file cache
            rounds = []
            for count in range(arguments.rounds):
                order = WAYS[count % len(WAYS) :] + WAYS[: count % len(WAYS)]
                runs = {way: root / f"{count}-{way.split()[0]}" for way in order}
                rounds.append({way: train(arguments, run, way, environment, server) for way, run in runs.items()})
                print(f"round {count}: " + ", ".join(f"{w} {rounds[-1][w].iteration:.3f} s" for w in WAYS), flush=True)
    print_figures(rounds)


if __name__ == "__main__":
    main()
