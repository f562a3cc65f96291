"""Measures what training again and again on stored rows does to a policy, under each `update.proximal`.

    python benchmarks/reuse.py configs/demo.toml --seeds 0 1 2

For each seed the config's own run is made, as far as it is needed. From the policy that wrote the rows of iteration 5,
10, 20 and 30, forks train 40 times on those rows (``reuse``); from the policy after 30 updates, once on each of the
iterations 10 to 29 (``distinct``). Printed is the accuracy on the held-out questions, exact: the mean probability that
the policy samples the reference answer and ends, at temperature 1. No engine runs in a fork; the other settings are the
config's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from transformers import AutoTokenizer

from grpo.policy import load_policy
from grpo.policy_logprobs import frame_logprobs
from grpo.settings import ForwardConfig
from pipeline.run_dir import RunDir
from stages.checkpoints import stop_token_ids

EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--proximal", nargs="+", default=["phase", "sampler", "update"])
    parser.add_argument("--starts", type=int, nargs="*", default=[5, 10, 20, 30])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--runs", type=Path, default=Path("runs/reuse"))
    arguments = parser.parse_args()
    cases = [("reuse", start, [start] * arguments.updates) for start in arguments.starts]
    cases.append(("distinct", 30, list(range(10, 30))))
    print(
        f"{'seed':>4} {'case':>8} {'from':>4} {'proximal':>8}  {'best':>5} {'last':>5}  after 0, {EVERY}, ... updates"
    )
    for seed in arguments.seeds:
        source = arguments.runs / f"seed{seed}"
        settings = ("--set", f"seed={seed}", "--set", f"iterations={max(30, *arguments.starts) + 1}")
        grpo("run", str(arguments.config), "--run", str(source), *settings)
        for proximal in arguments.proximal:
            for case, start, iterations in cases:
                fork = arguments.runs / f"seed{seed}-{case}-{start}-{proximal}"
                train_again(source, fork, start, iterations, proximal)
                found = [accuracy(RunDir(fork), n) for n in range(0, len(iterations) + 1, EVERY)]
                shown = " ".join(f"{value:.3f}" for value in found)
                row = f"{seed:>4} {case:>8} {start:>4} {proximal:>8}  {max(found):.3f} {found[-1]:.3f}  {shown}"
                print(row, flush=True)


def train_again(source: Path, fork: Path, start: int, iterations: Sequence[int], proximal: str) -> None:
    """Train a fork of the source, from the policy after ``start`` updates, on stored iterations alone."""
    tables = fork.with_suffix(".toml")
    offline = f"[[offline]]\nrun = {json.dumps(str(source.resolve()))}\niterations = {list(iterations)}\n"
    tables.write_text(f"iterations = {len(iterations)}\n{offline}", encoding="utf-8")
    settings = ("--set", "evaluate.every=0", "--set", f"update.proximal={proximal}")
    grpo("fork", str(source), str(tables), "--at", str(start), "--run", str(fork), *settings)


def grpo(*arguments: str) -> None:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")


def accuracy(run: RunDir, num_updates: int) -> float:
    """Return the probability that the policy answers a held-out question with its reference, and ends."""
    policy = run.policy_before(num_updates)
    tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True, trust_remote_code=False)
    end = min(stop_token_ids(policy))
    prompts = run_prompts(run)
    answers = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in prompts["reference_answer"]]
    rows = prompts.select("prompt_token_ids", completion_id="prompt_id").with_columns(
        pl.Series("completion_token_ids", answers, dtype=pl.List(pl.Int32)),
        optimizer_step=pl.lit(0),
        microbatch=pl.int_range(pl.len()) // 128,
        loss_mask=pl.lit(None, pl.List(pl.Boolean)),
        sampling_logprobs=pl.lit(None, pl.List(pl.Float32)),
        temperature=pl.lit(1.0),
        advantage=pl.lit(0.0),
        loss_denominator=pl.lit(1.0),
    )
    found = frame_logprobs(load_policy(policy), rows, ForwardConfig())
    return float(found.select(pl.col("logprobs").cast(pl.List(pl.Float64)).list.sum().exp().mean()).item())


def run_prompts(run: RunDir) -> pl.DataFrame:
    """Return the held-out prompts of the run that this one was forked from."""
    source = json.loads(run.resolved_config.read_text(encoding="utf-8"))["offline"][0]["run"]
    prompts = pl.read_parquet(RunDir(Path(source)).held_out_prompts / "*.parquet")
    return prompts.filter(pl.col("drop_reason").is_null()).unique("prompt_id", keep="first", maintain_order=True)


if __name__ == "__main__":
    main()
