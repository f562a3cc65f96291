"""Measures scoring and normalizing of stored completions, beside plain polars and beside Python list functions.

    python benchmarks/rescore.py
    python benchmarks/rescore.py --completions 1000000 --most 4000000 --tokens 200

Makes an artifact of completions (random words, token ids and log probabilities) in a temporary directory, and measures,
each in a process of its own, so that its peak memory is its own:

- ``score``: three expression rewards over all rows by the score stage, beside a polars scan of the same files that
  reads the same column, and beside the same rewards written as functions over Python lists, as other trainers have
  them; once more over ``--most`` rows, for the growth of time and memory;
- ``normalize``: the normalize stage over ``--most`` rows, beside a polars scan with two window aggregations;
- ``workers``: a per-completion Python reward in the pool's worker processes, beside the same function called in one
  process without any of it; and the cost per row of a function that does nothing.

Trust the ratios of one run; the machine's speed changes from run to run.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.artifact import Artifact, open_artifact
from pipeline.manifest import Recipe, recipe_hash
from pipeline.stage import StageCall, run_stage
from pipeline.writer import ArtifactWriter
from stages import normalize, score
from stages.normalize import NormalizeConfig
from stages.rewards.answers.matching import token_f1
from stages.rewards.base import Score
from stages.rewards.functions import RewardConfig, find_reward
from stages.rewards.scorer import open_scorer
from stages.score import ScoreConfig

NAME = "rescore"
ROWS_PER_PART = 50_000
GROUP = 8
WORDS = 2_000
REFERENCE = " ".join(chr(97 + i % 26) * 4 for i in range(40))


# rewards --------------------------------------------------------------------------------------------------------------


def brevity(most: int) -> pl.Expr:
    return (1 - pl.col("completion").str.len_chars() / most).clip(0, 1)


def has_word(word: str) -> pl.Expr:
    return pl.col("completion").str.contains(word, literal=True).cast(pl.Float64)


def share_of_vowels() -> pl.Expr:
    return pl.col("completion").str.count_matches("[aeiou]") / pl.col("completion").str.len_chars()


def list_brevity(completions: list[str], most: int) -> list[float]:
    return [min(max(1 - len(text) / most, 0.0), 1.0) for text in completions]


def list_has_word(completions: list[str], word: str) -> list[float]:
    return [float(word in text) for text in completions]


def list_share_of_vowels(completions: list[str]) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in completions]


def distinct_bigrams(completion: str) -> float:
    """A light reward: about 15 microseconds."""
    words = completion.split()
    pairs = list(itertools.pairwise(words))
    return len(set(pairs)) / max(len(pairs), 1)


def overlap(completion: str) -> Score:
    """A reward of the library, of middling cost."""
    return token_f1(completion, REFERENCE)


def nothing(completion: str) -> float:
    return 1.0


# data -----------------------------------------------------------------------------------------------------------------


def make_completions(place: Path, rows: int, tokens: int) -> Artifact:
    """Write completions in parts of 50,000 rows; texts and tokens repeat from part to part, ids do not."""
    generator = np.random.default_rng(0)
    vocabulary = ["".join(chr(97 + c) for c in generator.integers(0, 26, 4)) for _ in range(WORDS)]
    part = min(ROWS_PER_PART, rows)
    picks = generator.integers(0, WORDS, (part, max(tokens * 4 // 5, 1)))
    texts = [" ".join(vocabulary[i] for i in row) for row in picks]
    ids = pl.Series(list(generator.integers(0, 32_000, (part, tokens)).astype(np.int32)), dtype=pl.List(pl.Int32))
    logprobs = pl.Series(list(-generator.random((part, tokens)).astype(np.float32)), dtype=pl.List(pl.Float32))
    prompt = pl.Series([[1, 2, 3]] * part, dtype=pl.List(pl.Int32))
    config = {"rows": rows, "tokens": tokens}
    writer = ArtifactWriter(place, "completions", recipe_hash(Recipe("made", 1, config, {}, {})))
    writer.open()
    for index in range(-(-rows // part)):
        groups = [f"{index * part + i:016d}"[:16] for i in range(0, part, GROUP) for _ in range(GROUP)][:part]
        constant = {
            "policy_name": "current",
            "policy_digest": "d" * 64,
            "finish_reason": "stop",
            "logprobs_mode": "processed_logprobs",
            "engine": "made",
            "engine_version": "1",
        }
        frame = pl.DataFrame(
            {
                "completion_id": [f"{g}-{i % GROUP:03d}" for i, g in enumerate(groups)],
                "group_id": groups,
                "prompt_id": groups,
                "completion_index": pl.Series([i % GROUP for i in range(part)], dtype=pl.Int32),
                "policy_iteration": pl.Series([0] * part, dtype=pl.Int32),
                "prompt_token_ids": prompt,
                "completion_token_ids": ids,
                "sampling_logprobs": logprobs,
                "loss_mask": pl.Series([None] * part, dtype=pl.List(pl.Boolean)),
                "completion": texts,
                "stop_reason": pl.Series([None] * part, dtype=pl.String),
                "seed": pl.Series(range(part), dtype=pl.Int64),
                "temperature": pl.Series([1.0] * part, dtype=pl.Float32),
                "top_p": pl.Series([1.0] * part, dtype=pl.Float32),
                "top_k": pl.Series([0] * part, dtype=pl.Int32),
                "min_p": pl.Series([0.0] * part, dtype=pl.Float32),
                "kept_mass": pl.Series([None] * part, dtype=pl.List(pl.Float32)),
                **{name: pl.Series([value] * part) for name, value in constant.items()},
            }
        )
        writer.write_part(index, frame)
    return writer.seal(stage="made", stage_version=1, config=config, chosen=config, inputs={}, environment={})


# measurements, each in a process of its own ---------------------------------------------------------------------------


def score_stage(completions: Path, place: Path) -> None:
    rewards = [
        RewardConfig(name="brevity", function=f"{NAME}:brevity", arguments={"most": 2000}),
        RewardConfig(name="word", function=f"{NAME}:has_word", arguments={"word": "abcd"}),
        RewardConfig(name="vowels", function=f"{NAME}:share_of_vowels"),
    ]
    config = ScoreConfig(rewards=rewards)
    with open_scorer() as scorer:
        run_stage(
            StageCall(score.STAGE, config, {"completions": open_artifact(completions)}, {"rewards": place}), scorer
        )


def score_one(completions: Path, place: Path) -> None:
    config = ScoreConfig(rewards=[RewardConfig(name="brevity", function=f"{NAME}:brevity", arguments={"most": 2000})])
    with open_scorer() as scorer:
        run_stage(
            StageCall(score.STAGE, config, {"completions": open_artifact(completions)}, {"rewards": place}), scorer
        )


def score_with_lists(completions: Path, place: Path) -> None:
    texts = pl.read_parquet(list(open_artifact(completions).files()), columns=["completion"])["completion"].to_list()
    list_brevity(texts, 2000)
    list_has_word(texts, "abcd")
    list_share_of_vowels(texts)


def scan_texts(completions: Path, place: Path) -> None:
    pl.scan_parquet(open_artifact(completions).files()).select(pl.col("completion").str.len_chars().sum()).collect()


def hash_files(completions: Path, place: Path) -> None:
    """What every reading of an artifact costs: its bytes are compared with the manifest."""
    open_artifact(completions).verify()


def normalize_stage(rewards: Path, place: Path) -> None:
    config = NormalizeConfig(scale="group_std")
    run_stage(StageCall(normalize.STAGE, config, {"rewards": open_artifact(rewards)}, {"advantages": place}), None)


def normalize_rows(rewards: Path, place: Path) -> None:
    """The same without the artifact around it: neither hashing nor writing."""
    config = NormalizeConfig(scale="group_std")
    normalize.normalize_rows(pl.scan_parquet(open_artifact(rewards).files()), config)


def window_aggregations(rewards: Path, place: Path) -> None:
    reward = pl.col("reward")
    rows = pl.scan_parquet(open_artifact(rewards).files()).select("completion_id", "group_id", "reward")
    rows.with_columns(mean=reward.mean().over("group_id"), std=reward.std().over("group_id")).collect()


def light_in_one_process(completions: Path, place: Path) -> None:
    _in_one_process(completions, distinct_bigrams)


def light_in_workers(completions: Path, place: Path) -> None:
    _through_pool(completions, "distinct_bigrams")


def library_in_one_process(completions: Path, place: Path) -> None:
    _in_one_process(completions, overlap)


def library_in_workers(completions: Path, place: Path) -> None:
    _through_pool(completions, "overlap")


def library_in_two_plain_processes(completions: Path, place: Path) -> None:
    """What this machine's two cores give at best: two forked processes with half of the rows each."""
    texts = _some_texts(completions)["completion"].to_list()
    started = time.perf_counter()
    children = []
    for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
        child = os.fork()
        if child == 0:
            for text in half:
                overlap(text)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    print(json.dumps({"inner": time.perf_counter() - started}), flush=True)


def nothing_in_workers(completions: Path, place: Path) -> None:
    _through_pool(completions, "nothing")


def _in_one_process(completions: Path, function: Callable[[str], Any]) -> None:
    texts = _some_texts(completions)["completion"].to_list()
    started = time.perf_counter()
    for text in texts:
        function(text)
    print(json.dumps({"inner": time.perf_counter() - started}), flush=True)


def _through_pool(completions: Path, function: str) -> None:
    reward = find_reward(RewardConfig(name="r", function=f"{NAME}:{function}"))
    with open_scorer(num_workers=2) as scorer:
        rows = _some_texts(completions)
        scorer.score(rows.head(100), None, [reward])  # the processes are there and have imported the module
        started = time.perf_counter()
        scorer.score(rows, None, [reward])
        print(json.dumps({"inner": time.perf_counter() - started}), flush=True)


def _some_texts(completions: Path) -> pl.DataFrame:
    columns = ["completion_id", "group_id", "prompt_id", "completion"]
    return pl.scan_parquet(open_artifact(completions).files()).select(columns).head(100_000).collect()


def measure(function: Callable[..., None], *arguments: Path) -> dict[str, float]:
    """Return seconds and peak memory of a function in a new process, its imports left out."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, function.__name__, *arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, float] = receiver.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__} failed") from None
    process.join()
    return result


def _measured(sender: Any, name: str, *arguments: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # worker processes import the rewards from here
    import contextlib
    import io

    output = io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(output):
        globals()[name](*arguments)
    seconds = time.perf_counter() - started
    inner = [json.loads(line)["inner"] for line in output.getvalue().splitlines()]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sender.send({"seconds": inner[0] if inner else seconds, "gigabytes": gigabytes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--most", type=int, default=4_000_000, help="rows of the larger measurement")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; the fastest counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grpo-rescore-") as scratch:
        run(arguments, Path(scratch))


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    """Print all measurements."""

    def best(function: Callable[..., None], source: Path) -> dict[str, float]:
        found = []
        for index in range(arguments.repeats):
            place = scratch / f"{function.__name__}-{index}"
            found.append(measure(function, source, place))
            shutil.rmtree(place, ignore_errors=True)
        return min(found, key=lambda result: result["seconds"])

    def show(label: str, result: dict[str, float], rows: int, beside: float | None = None) -> None:
        ratio = "" if beside is None else f"{result['seconds'] / beside:8.2f}x"
        print(
            f"{label:46} {result['seconds']:8.2f} s {rows / result['seconds']:12,.0f} rows/s "
            f"{result['gigabytes']:6.2f} GB {ratio}",
            flush=True,
        )

    completions = make_completions(scratch / "completions", arguments.completions, arguments.tokens).path
    rows = arguments.completions
    print(f"{rows:,} completions of {arguments.tokens} tokens, three expression rewards")
    scan = best(scan_texts, completions)
    show("polars scan of the texts", scan, rows)
    show("SHA-256 of the files", best(hash_files, completions), rows, scan["seconds"])
    show("Python list functions (no files written)", best(score_with_lists, completions), rows, scan["seconds"])
    small = best(score_stage, completions)
    show("score stage", small, rows, scan["seconds"])

    print("\n100,000 completions, a Python function over one completion, in one process and in two workers")
    for label, alone, pooled in (
        ("distinct bigrams", light_in_one_process, light_in_workers),
        ("the library's token F1", library_in_one_process, library_in_workers),
    ):
        one, two = best(alone, completions), best(pooled, completions)
        show(f"{label}, function alone", one, 100_000)
        show(f"{label}, two workers", two, 100_000, one["seconds"])
        print(f"speed-up {one['seconds'] / two['seconds']:.2f}")
    plain = best(library_in_two_plain_processes, completions)
    show("the library's token F1, two plain processes", plain, 100_000, one["seconds"])
    empty = best(nothing_in_workers, completions)
    show("a function of nothing, two workers", empty, 100_000)
    print(f"{1e6 * empty['seconds'] / 100_000:.1f} microseconds a row")

    if arguments.most > arguments.completions:
        shutil.rmtree(completions)
        large_source = make_completions(scratch / "many", arguments.most, arguments.tokens).path
        print(f"\n{arguments.most:,} completions")
        place = scratch / "rewards"
        large = measure(score_stage, large_source, place)
        show("score stage", large, arguments.most)
        growth = large["seconds"] / small["seconds"] * rows / arguments.most
        print(f"time per row {growth:.2f}x, memory {large['gigabytes'] / small['gigabytes']:.2f}x of the smaller one")
        place = scratch / "one reward"
        measure(score_one, large_source, place)
        shutil.rmtree(large_source)
        window = best(window_aggregations, place)
        show("polars scan, two window aggregations", window, arguments.most)
        show("normalize, computation", best(normalize_rows, place), arguments.most, window["seconds"])
        show("normalize stage, hashed and written", best(normalize_stage, place), arguments.most, window["seconds"])


if __name__ == "__main__":
    main()
