"""Records what small runs leave, and compares two recordings: does a refactoring change a digest, a row, an answer?

    python benchmarks/digests.py record before.json --repository OLD        # on one machine, with one environment
    python benchmarks/digests.py record after.json --repository NEW
    python benchmarks/digests.py compare before.json after.json             # exit code 1 and the differences, if any
    python benchmarks/digests.py compare before.json after.json --content   # rows alone, where ids are meant to change

The tree under test is known from outside alone: its command line, manifests, Parquet files. So one copy of this
script records trees whose modules lie in other places. The runs stand in `benchmarks/digests/`:

    main             3 iterations of all stages, with evaluations
    library          rewards of the library (LIBRARY says where they may lie), other choices of every stage
    fork             of main: a stored iteration, then a generated one
    offline_*        a stored iteration of main, for each correction that no other run has
    rescore*         main's completions with other rewards and normalizations
    written          completions from a file

and then come the commands that only look. All is relative to a scratch folder, on one thread, with nothing downloaded.
A command is a fork of one process that has made the slow imports; one Prefect server serves all. Linux only.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
from prefect_server import free_port, wait_for_server
from recordings import ID, ORDER, TIME, compare, compare_content, count, parsed, without

INPUTS = Path(__file__).with_suffix("")
LIBRARY = {
    "exact_match": ("stages.rewards.matching", "stages.rewards.answers.matching"),
    "token_f1": ("stages.rewards.matching", "stages.rewards.answers.matching"),
    "numeric_match": ("stages.rewards.numeric", "stages.rewards.answers.numeric"),
    "regex_match": ("stages.rewards.format", "stages.rewards.answers.format"),
    "soft_overlong": ("stages.rewards.format", "stages.rewards.answers.format"),
}
"""Reward -> modules that may hold it, tried in order, and after them every module below stages/."""

MAIN = ["run main.toml {options}"]
FROM_MAIN = [
    "run library.toml {options} {truncated}",
    "fork runs/main fork.toml --at 1 --offline 1 --run runs/fork",
    *(
        f"run offline.toml {{options}} --run runs/offline_{kind} --set update.correction.kind={kind}"
        for kind in ("token_clip", "token_mask", "sequence_mask", "geometric_mask", "k3_mask")
    ),
    "import written.toml written.jsonl --tokenizer runs/main/initial_policy",
]
RESCORE = [
    "rescore runs/main rescore.toml -f jsonl",
    "rescore runs/main rescore_library.toml -f jsonl -i 0,2",
]
LOOKING = [
    *(f"verify runs/{run} -f jsonl" for run in ("main", "library", "fork", "offline_k3_mask", "main-rescore")),
    *(f"metrics runs/{run} -f jsonl" for run in ("main", "fork")),
    *(f"groups runs/{run} -i 0 -f jsonl" for run in ("main", "main-rescore", "written")),
    *(f"audit runs/{run} -f jsonl" for run in ("main", "library")),
    "verify runs/main",
    "groups runs/main -i 2 --sort mean",
    "lineage runs/main/iterations/000002/policy",
    "lineage runs/fork/iterations/000001/policy -f jsonl",
    "lineage runs/main --completion {completion} -f jsonl",
    "tokens runs/main --completion {completion} -f jsonl",
    "ls runs/main -f jsonl",
    "show runs/main -i 1 -f jsonl",
    "rows runs/main training_records -i 1 -n 5 -f csv",
    "diff runs/main runs/main-rescore --rewards --threshold 0.01 -f jsonl",
    "diff runs/main runs/fork -f jsonl",
    "whatif runs/main --set normalize.scale=none -f jsonl",
    "reward try digest_rewards:framed runs/main -i 0 --arg bonus=1 -f jsonl",
    "prune runs/main --keep-last 1 --dry-run -f jsonl",
    "replay runs/main -i 1 --stage update -f jsonl",
    "schema --markdown",
    "run main.toml --run runs/none --set update.lerning_rate=1",
    "verify runs/none",
]
DRIVER = """
import atexit, gc, json, os, sys, threading, traceback
import prefect, torch
from transformers import LlamaForCausalLM

def perform(arguments):
    sys.argv = ["grpo", *arguments]
    try:
        from flows.cli import main
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

gc.freeze()
for line in sys.stdin:
    running, ended = {}, {}
    for index, arguments in enumerate([*json.loads(line), None, None]):
        if arguments is not None:
            process = os.fork()
            if not process:
                for descriptor, name in ((0, os.devnull), (1, f"out/{index}.out"), (2, f"out/{index}.err")):
                    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
                code = perform(arguments)
                threading._shutdown()
                atexit._run_exitfuncs()
                sys.stdout.flush()
                os._exit(code)
            running[process] = index
        if running and (arguments is None or len(running) == 2):
            process, status = os.wait()
            ended[running.pop(process)] = os.waitstatus_to_exitcode(status)
    print(json.dumps([ended[index] for index in sorted(ended)]), flush=True)
"""
"""Runs each line's commands, two at a time, in forks of itself; none of its imports starts a thread that works.

A fork ends without taking its modules down, which would cost more than most commands.
"""


class Commands:
    """Runs commands of the tree under test in the scratch folder, and keeps how they ended and what they said."""

    def __init__(self, repository: Path, scratch: Path, fillings: dict[str, str]) -> None:
        self.repository, self.scratch, self.fillings = repository, scratch, fillings
        self.said: dict[str, Any] = {}
        self.port = free_port()
        self.environment = os.environ | {
            "PYTHONPATH": str(repository),
            "PREFECT_HOME": str(scratch / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "160",
        }

    def __enter__(self) -> Self:
        server = f"-m prefect server start --host 127.0.0.1 --port {self.port} --no-ui --no-services".split()
        with (self.scratch / "server.log").open("w") as log:
            self.server = self._start(server, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.driver = self._start(("-c", DRIVER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def _start(self, arguments: Sequence[str], **streams: Any) -> Any:
        program = [sys.executable, *arguments]
        return subprocess.Popen(program, cwd=self.scratch, env=self.environment, start_new_session=True, **streams)

    def __exit__(self, *_: object) -> None:
        for process in (self.driver, self.server):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate()

    def wait_for_server(self) -> None:
        wait_for_server(self.server, self.port, self.scratch / "server.log")

    def run(self, wave: Sequence[str], *, must_succeed: bool = False) -> None:
        """Run commands side by side. What is said by those that must succeed is not kept: it holds times."""
        started = time.monotonic()
        self.driver.stdin.write(json.dumps([line.format(**self.fillings).split() for line in wave]) + "\n")
        self.driver.stdin.flush()
        answer = self.driver.stdout.readline()
        if not answer:
            raise SystemExit("the commands cannot be run: see above")
        for index, (line, code) in enumerate(zip(wave, json.loads(answer), strict=True)):
            text = "".join((self.scratch / "out" / f"{index}.{name}").read_text() for name in ("out", "err"))
            if code and must_succeed:
                raise SystemExit(f"grpo {line} ended with {code}:\n{text}")
            self.said[f"grpo {line}"] = {"exit": code, "text": "" if must_succeed else self.plain(text)}
        print(f"{len(wave)} commands in {time.monotonic() - started:.1f} s", file=sys.stderr)

    def plain(self, text: str) -> str:
        """Return the text without places and times."""
        text = text.replace(str(self.scratch), "<scratch>").replace(str(self.repository), "<repository>")
        return "\n".join(line if row is None else json.dumps(without(row, TIME)) for line, row in parsed(text))


def record(out: Path, repository: Path, scratch: Path, engine: str, seed: int) -> None:
    """Make the runs in the scratch folder, and write down what they left."""
    if not (repository / "flows" / "cli.py").is_file():
        raise SystemExit(f"{repository} has no flows/cli.py: give the root of a checkout")
    if (scratch / "runs").exists():
        raise SystemExit(f"{scratch} holds runs already: give a new folder")
    (scratch / "out").mkdir(parents=True, exist_ok=True)
    write_inputs(repository, scratch)
    fillings = {
        "options": f"--set seed={seed} --set generate.engine={engine}",
        # vLLM does not say how much it cuts off
        "truncated": "--set generate.top_k=9 --set generate.min_p=0.01" if engine == "transformers" else "",
    }
    with Commands(repository, scratch, fillings) as commands:
        commands.run(["starter main.toml {options}"], must_succeed=True)
        commands.wait_for_server()
        commands.run(MAIN, must_succeed=True)
        commands.run(FROM_MAIN, must_succeed=True)
        trained = pq.read_table(next((scratch / "runs/main/iterations/000000/training_records").glob("*.parquet")))
        fillings["completion"] = trained["completion_id"][0].as_py()
        commands.run(RESCORE)
        commands.run(LOOKING)
    for path in sorted((scratch / "runs").rglob("*")):
        if path.name in ("config.toml", "config.resolved.json", "fork.toml") or path.name.endswith(".reference.json"):
            text = commands.plain(path.read_text())
            if "reference" in path.name:
                text = json.dumps(without(json.loads(text), ID))
            commands.said[path.relative_to(scratch).as_posix()] = {"exit": None, "text": text}
    found = {"artifacts": artifacts(scratch / "runs"), "texts": commands.said}
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{out}: {count(found)}")


def write_inputs(repository: Path, scratch: Path) -> None:
    """Write configs, our rewards, questions and written answers into the scratch folder."""
    shutil.copy(INPUTS / "digest_rewards.py", scratch)
    for path in INPUTS.glob("*.toml"):
        text = re.sub(r'"library:(\w+)"', lambda found: f'"{find_reward(repository, found[1])}"', path.read_text())
        (scratch / path.name).write_text(text)
    sums = [(a, b) for a in range(10) for b in range(10)]
    questions = [{"question": f"{a} + {b} =", "answer": str(a + b), "tens": (a + b) // 10} for a, b in sums]
    answers = [{"question": f"{a} + 9 =", "completion": str(a + b)} for a in range(4) for b in (8, 9, 10)]
    for name, rows in (("sums", questions), ("written", answers)):
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def find_reward(repository: Path, name: str) -> str:
    """Return ``module:function`` of a reward of the library."""
    known = [repository / f"{module.replace('.', '/')}.py" for module in LIBRARY[name]]
    for path in (*known, *sorted((repository / "stages").rglob("*.py"))):
        if path.is_file() and re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE):
            return f"{'.'.join(path.relative_to(repository).with_suffix('').parts)}:{name}"
    raise SystemExit(f"no module below {repository / 'stages'} defines the reward {name}: correct LIBRARY")


def artifacts(runs: Path) -> dict[str, Any]:
    """Return what each artifact says and holds; and each run's table of metrics, with all of the run as its inputs."""
    found: dict[str, Any] = {}
    for path in sorted(runs.rglob("manifest.json")):
        folder, said = path.parent, json.loads(path.read_text())
        keys = ("stage", "stage_version", "dataset", "config", "rows", "drops", "recipe", "content", "digest")
        # a starter is named after its recipe; there is one
        found["starter" if folder.parent.name == "starters" else folder.relative_to(runs).as_posix()] = {
            **{key: said[key] for key in keys},
            "inputs": {name: facts["digest"] for name, facts in said["inputs"].items()},
            "files": {name: facts["sha256"] for name, facts in said["files"].items()},
            "table": table(sorted(folder.glob("*.parquet"))),
        }
    for path in sorted(runs.glob("*/metrics.parquet")):
        names = [name for name in found if name.startswith(f"{path.parent.name}/")]
        inputs = {name: found[name]["digest"] for name in names}
        found[path.relative_to(runs).as_posix()] = {"dataset": "metrics", "inputs": inputs, "table": table([path])}
    return found


def table(parts: Sequence[Path]) -> dict[str, Any] | None:
    """Return hashes of Parquet rows, None without: of each column's values in row order, and, in any order, of each
    column's values and of the rows without ids."""
    tables = [pq.read_table(path) for path in parts]
    if not tables:
        return None
    columns: dict[str, list[str]] = {}
    for field in tables[0].schema:
        if not TIME.search(field.name):
            values = (value for part in tables for value in part[field.name].to_pylist())
            columns[field.name] = [f"{field.type} {json.dumps(value)}" for value in values]

    def rows(*left_out: str) -> str:
        kept = [values for name, values in columns.items() if not ID.search(name) and name not in left_out]
        return sha(sorted("\0".join(row) for row in zip(*kept, strict=True)))

    hashes = {name: {"values": sha(values), "sorted": sha(sorted(values))} for name, values in columns.items()}
    return {"columns": hashes, "rows": rows(), "rows_without_order": rows(*ORDER)}


def sha(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    recording = modes.add_parser("record", help="make the runs, write down what they leave")
    recording.add_argument("out", type=Path, metavar="OUT.json")
    recording.add_argument("--repository", type=Path, required=True, help="the tree under test")
    recording.add_argument("--scratch", type=Path, help="a new folder that keeps the runs; default: a temporary one")
    recording.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    recording.add_argument("--seed", type=int, default=3, help="of the runs")
    comparing = modes.add_parser("compare", help="exit code 1 when two recordings differ")
    comparing.add_argument("a", type=Path, metavar="A.json")
    comparing.add_argument("b", type=Path, metavar="B.json")
    comparing.add_argument("--content", action="store_true", help="rows in any order, without ids; weights; answers")
    comparing.add_argument(
        "--may-reorder",
        action="store_true",
        help="with --content: excuse batches that differ in the training order alone, and all that was made of them",
    )
    arguments = parser.parse_args()
    if arguments.mode == "record":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with ExitStack() as stack:
            scratch = arguments.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="digests-")))
            record(arguments.out, arguments.repository.resolve(), scratch.resolve(), arguments.engine, arguments.seed)
        return
    a, b = (json.loads(path.read_text()) for path in (arguments.a, arguments.b))
    excused: list[str] = []
    if arguments.content:
        names = {name for found in a["artifacts"].values() for name in (found["table"] or {"columns": ()})["columns"]}
        print(f"left out: recipes, digests, configs, the columns {', '.join(sorted(filter(ID.search, names)))}")
        errors, excused = compare_content(a, b, may_reorder=arguments.may_reorder)
    else:
        errors = compare(a, b)
    print("\n".join([*errors, *(f"excused: {line}" for line in excused)]) or f"equal: {count(a)}")
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
