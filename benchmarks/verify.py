"""Measures `grpo verify` on one iteration of a million completions, beside a plain SHA-256 of the same files.

    python benchmarks/verify.py --completions 1000000 --policy runs/demo/initial_policy

Makes the run with scripted answers of 1 to `--tokens` tokens (no inference engine, everything else as in a real run:
prompts, completions, rewards, advantages, batches), then verifies it in a process of its own. Trust the ratio; the
machine's speed changes from run to run. Making the run takes some minutes.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

CONFIG = """
iterations = 1
[policy]
model = "{policy}"
[prompts]
source = "{source}"
prompts_per_iteration = {prompts}
[generate]
group_size = 8
max_tokens = {tokens}
groups_per_part = 4096
[[score.rewards]]
name = "short"
function = "tests.rewards:has_seven"
[normalize]
scale = "group_std"
[evaluate]
every = 0
held_out_share = 0.0
"""


def make_run(folder: Path, policy: Path, completions: int, tokens: int) -> None:
    """Run every stage up to batch with scripted answers."""
    from flows.session import Session
    from pipeline.run_dir import RunDir
    from stages.checkpoints import stop_token_ids
    from stages.config import load_config
    from stages.engines.base import Request
    from stages.engines.scripted import ScriptedEngine

    source = folder / "sums.jsonl"
    with source.open("w") as file:
        for i in range(completions // 8):
            file.write(json.dumps({"question": f"Calculate {i} + {i}.", "answer": str(2 * i)}) + "\n")
    path = folder / "config.toml"
    text = CONFIG.format(policy=policy.resolve(), source=source, prompts=completions // 8, tokens=tokens)
    path.write_text(text)
    config = load_config(path)
    run = RunDir(folder / "run")
    run.record_config(path.read_text(), config.model_dump(mode="json"))
    end = stop_token_ids(policy)[0]

    def answer(request: Request) -> list[int]:
        length = 1 + request.seed % (tokens - 1)
        words = request.prompt_token_ids
        return [*(words[(request.seed >> i) % len(words)] for i in range(length)), end]

    with closing(Session(config, run, _engine=ScriptedEngine(answer))) as session:
        session.initial_policy()
        for stage in ("prompts", "generate", "score", "normalize", "batch"):
            started = time.perf_counter()
            session.perform(stage, 0)
            print(f"made {stage} in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the longest answer")
    parser.add_argument("--policy", type=Path, required=True, help="a checkpoint with a tokenizer")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory(prefix="grpo-verify-") as scratch:
        made = (Path(scratch), arguments.policy, arguments.completions, arguments.tokens)
        # in a process of its own: a child's peak memory begins with its parent's
        process = multiprocessing.get_context("spawn").Process(target=make_run, args=made)
        process.start()
        process.join()
        run = Path(scratch) / "run"
        files = [path for path in run.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        started = time.perf_counter()
        for path in files:
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        hashing = time.perf_counter() - started
        started = time.perf_counter()
        command = [sys.executable, "-m", "flows.cli", "verify", str(run), "-f", "jsonl"]
        verifying = subprocess.Popen(command)
        _, status, usage = os.wait4(verifying.pid, 0)
        seconds = time.perf_counter() - started
        verifying.returncode = os.waitstatus_to_exitcode(status)
    if verifying.returncode != 0:
        sys.exit("the run did not pass")
    figures = {
        "completions": arguments.completions,
        "bytes": size,
        "sha256_seconds": round(hashing, 2),
        "verify_seconds": round(seconds, 1),
        "ratio": round(seconds / hashing, 1),
        "gigabytes": round(usage.ru_maxrss / 1e6, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
