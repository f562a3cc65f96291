"""Looks at hostile runs and checkpoints, and counts what must not be: tracebacks, hangs, memory, bytes outside.

    python benchmarks/hostile_runs.py --runs 500 --checkpoints 200 --seed 0

Makes one tiny finished run, changes a copy of it for each case as `tests/hostile*.py` say, and gives every looking
command to it, in workers with a limit of memory; a checkpoint becomes the initial policy of a run, and is copied,
loaded and read. Prints a table and every offence, and exits with 1 when there is one. The same seed gives the same
cases. Nothing here does harm: what the cases aim at lies in a folder of their own, next to the run.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 2 << 30
SECONDS = 10.0
COMMANDS = (
    "ls run", "ls .", "show run", "rows run completions", "groups run", "metrics run", "verify run", "audit run",
    "report run -o page.html", "diff run other", "whatif run --set normalize.scale=none", "lineage run -c {id}",
    "tokens run -i 0 -c {id}", "lineage run/iterations/000001/policy", "prune run --keep-last 1 --dry-run",
    "replay run -i 0 --stage batch", "reward try stages.rewards.answers.matching:exact_match run",
)  # fmt: skip
CHECKPOINT_COMMANDS = ("copy checkpoint", "verify run", "show run", "tokens run -i 0 -c {id}", "audit run")
WRITTEN = ("page.html", "copied", ".copied.partial")
"""What the commands may leave."""


@dataclass
class Answer:
    """What became of one command."""

    command: str
    code: int | None
    """None when the worker had to be killed, or ended by itself."""
    seconds: float
    peak_bytes: int
    said: str
    """The end of a traceback, or of what the worker said last."""


@dataclass
class Case:
    """A hostile run, or a checkpoint, and what the commands made of it."""

    name: str
    what: str
    answers: list[Answer] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Files outside of the run that are new, gone or different."""


def main() -> int:
    """Run the cases, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="workers at once")
    parser.add_argument("--only", help="run this case alone, for example run-17, and keep its folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(SOURCE))
    if options.worker:
        return work()
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY_BYTES, 4 * MEMORY_BYTES))
    folder = Path(tempfile.mkdtemp(prefix="grpo-hostile-"))
    base = make_base(folder / "base")
    names = [f"run-{i}" for i in range(options.runs)] + [f"checkpoint-{i}" for i in range(options.checkpoints)]
    if options.only:
        names = [options.only]
    begun = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as threads:
        shares = [names[k :: options.jobs] for k in range(options.jobs)]
        cases = [
            case
            for share in threads.map(lambda share: run_share(share, base, folder, options), shares)
            for case in share
        ]
    offences = print_table(cases)
    num_commands = sum(len(case.answers) for case in cases)
    print(f"{len(cases)} cases, {num_commands} commands, {time.monotonic() - begun:.0f} seconds")
    if options.only:
        print(f"kept: {folder / options.only}")
    else:
        shutil.rmtree(folder)
    return 1 if offences else 0


def make_base(folder: Path) -> Path:
    """Make the run that the cases change."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.policies import save_tiny_policy
    from tests.small_run import make_small_run

    folder.mkdir(parents=True)
    save_tiny_policy(folder / "policy")
    make_small_run(folder, folder / "policy", iterations=2)
    return folder


def run_share(names: list[str], base: Path, folder: Path, options: argparse.Namespace) -> list[Case]:
    """Run some cases, one after the other, in a worker that is replaced when it dies."""
    worker, cases = Worker(), []
    for name in names:
        place = folder / name
        case = prepare(name, place, base, options.seed)
        before = snapshot(place)
        for command in CHECKPOINT_COMMANDS if name.startswith("checkpoint") else COMMANDS:
            case.answers.append(worker.ask(command.format(id=completion_id(base)), place))
        after = snapshot(place)
        case.changed = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
        cases.append(case)
        if not options.only:
            shutil.rmtree(place)
    worker.end()
    return cases


def completion_id(base: Path) -> str:
    """Return the id of a completion of the base run."""
    import polars as pl

    part = base / "runs/small/iterations/000000/completions/part-00000.parquet"
    return str(pl.read_parquet(part, columns=["completion_id"]).item(0, 0))


def prepare(name: str, place: Path, base: Path, seed: int) -> Case:
    """Make the folder of a case: a changed run, an unchanged other one, and what nobody may touch."""
    from tests import hostile
    from tests.hostile_checkpoints import spoil_checkpoint

    rng = random.Random(f"{seed} {name}")
    outside = place / hostile.OUTSIDE
    outside.mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    (place / "home").mkdir()
    shutil.copytree(base / "runs" / "small", place / "run")
    shutil.copytree(base / "runs" / "small", place / "other")
    if name.startswith("checkpoint"):
        policy = place / "run" / "initial_policy"
        what = spoil_checkpoint(policy, rng)
        shutil.copytree(policy, place / "checkpoint", symlinks=True, copy_function=_copy_any)
        (place / "checkpoint" / "manifest.json").unlink()
    else:
        what = "; ".join(change(rng, place / "run") for _ in range(rng.choice((1, 1, 1, 2))))
    return Case(name, what)


def change(rng: random.Random, run: Path) -> str:
    """Change a run in some way; another change may have left nothing that this one could change."""
    from tests import hostile

    with suppress(Exception):
        return rng.choice(hostile.KINDS)(run, rng)
    return "nothing"


def _copy_any(source: str, target: str) -> None:
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copyfile(source, target)


def snapshot(place: Path) -> dict[str, str]:
    """Return what lies in a case's folder, but for what the commands may write; nothing is opened that may wait."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if name.split("/")[0] in WRITTEN or name.startswith(("home/.cache", "home/.config")):
            continue
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


class Worker:
    """A process that gives commands in itself, and is replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, command: str, place: Path) -> Answer:
        """Give one command in a folder and return its answer."""
        process = self.process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        begun = time.monotonic()
        process.stdin.write(json.dumps({"command": command, "place": str(place)}).encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if ready.select(SECONDS * 3) else b""
        seconds = time.monotonic() - begun
        if line:
            return Answer(command, seconds=seconds, **json.loads(line))
        process.kill()
        status = process.wait()
        self.process = None
        said = "it hung" if seconds >= SECONDS * 3 else f"the process ended with status {status}"
        return Answer(command, None, seconds, 0, said)

    def _start(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=SOURCE,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": "warm up", "place": str(SOURCE)}).encode() + b"\n")
        self.process.stdin.flush()
        self.process.stdout.readline()
        return self.process

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def work() -> int:
    """Give the commands that come as lines, and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    import grpo.policy  # noqa: F401
    import stages.inspect.verify.verify  # noqa: F401
    from pipeline import artifact

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES * 2, MEMORY_BYTES * 2))
    for line in sys.stdin:
        asked = json.loads(line)
        os.chdir(asked["place"])
        os.environ |= {"HOME": f"{asked['place']}/home", "GRPO_WORK": f"{asked['place']}/home/work"}
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        artifact._verify.cache_clear()  # by relative paths, which are the same in every case
        artifact._check_parts.cache_clear()
        code, said = give(asked["command"])
        print(json.dumps({"code": code, "said": said, "peak_bytes": peak_bytes()}), file=answers, flush=True)
    return 0


def peak_bytes() -> int:
    """Return the largest resident size since it was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def give(command: str) -> tuple[int | None, str]:
    """Give a command in this process; return its exit code, and the end of the traceback that it would have shown."""
    import io
    import traceback
    from contextlib import redirect_stderr, redirect_stdout

    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            if command == "warm up":
                return 0, ""
            if command == "copy checkpoint":
                return copy_checkpoint(), ""
            from flows import cli

            sys.argv = ["grpo", *command.split()]
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            text = printed.getvalue()
            return code, text[-300:] if "Traceback" in text or "fault of grpo-pipeline" in text else ""
        except BaseException:
            return 99, "".join(traceback.format_exc().splitlines(keepends=True)[-4:])
    return 0, ""


def copy_checkpoint() -> int:
    """Read a checkpoint as the beginning of a run: 0 = it is one, 2 = it is refused with an error of ours."""
    from pipeline.errors import GrpoError
    from pipeline.stage import StageCall, run_stage
    from stages import policy
    from stages.checkpoints import check_policy, read_layout

    try:
        check_policy("checkpoint")
        read_layout(Path("checkpoint"))
        call = StageCall(policy.STAGE, policy.PolicyConfig(model="checkpoint"), {}, {"policy": Path("copied")})
        run_stage(call, Path("checkpoint"))
    except GrpoError:
        return 2
    return 0


def print_table(cases: list[Case]) -> int:
    """Print how often each command ended how, then each offence; return the number of offences."""
    offences = []
    columns = ("0", "1", "2", "other", "traceback", "hang", "died", "over 2 GB", "seconds", "MB")
    print(f"{'command':55}" + "".join(f"{name:>11}" for name in columns))
    for command in dict.fromkeys(answer.command for case in cases for answer in case.answers):
        tally: Counter[str] = Counter()
        seconds = peak = 0.0
        for case in cases:
            for answer in (answer for answer in case.answers if answer.command == command):
                seconds, peak = max(seconds, answer.seconds), max(peak, answer.peak_bytes)
                kinds = kinds_of(answer)
                tally.update(kinds)
                if bad := [kind for kind in kinds if kind not in ("0", "1", "2")]:
                    offences.append(f"{case.name}: {case.what}: grpo {command}: {', '.join(bad)}\n{answer.said}")
        counts = "".join(f"{tally[name]:>11}" for name in columns[:-2])
        print(f"{command[:54]:55}{counts}{seconds:>11.1f}{peak / 1e6:>11.0f}")
    for case in cases:
        if case.changed:
            offences.append(f"{case.name}: {case.what}: written or removed: {', '.join(case.changed)}")
    print("\n".join(["", *offences]))
    print(f"{len(offences)} offences")
    return len(offences)


def kinds_of(answer: Answer) -> list[str]:
    """Return the columns that a command counts in."""
    kinds = []
    if answer.code is None:
        kinds.append("hang" if answer.said == "it hung" else "died")
    elif answer.said:
        kinds.append("traceback")
    else:
        kinds.append(str(answer.code) if answer.code in (0, 1, 2) else "other")
    if answer.seconds > SECONDS and "hang" not in kinds:
        kinds.append("hang")
    if answer.peak_bytes > MEMORY_BYTES:
        kinds.append("over 2 GB")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
