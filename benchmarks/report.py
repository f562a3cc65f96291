"""Measures what a report of a large run takes: makes the run, writes its report, and says how large and how slow.

    python benchmarks/report.py
    python benchmarks/report.py --completions 200000 --tokens 200 --keep /tmp/large

The run is synthetic: groups of eight, two reward functions of which one fails now and then, every fourth answer one
update old, numbers recorded for every token, and answers of which some try to be markup, script, or a different text
than they look. Rows go through the same writer as a real run's. Opening the page in a browser is timed by
`benchmarks/report_browser.mjs`, which `--keep` leaves the report for, together with an audit's findings.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from tokenizers import Tokenizer, models, pre_tokenizers

from flows.report.render import write_report
from pipeline.artifact import Artifact
from pipeline.manifest import Recipe, recipe_hash
from pipeline.run_dir import RunDir
from pipeline.schema import SCHEMAS
from pipeline.writer import ArtifactWriter

GROUP = 8
PER_ITERATION = 2_000
HOSTILE = (
    "<img src=x onerror=\"window.pwned=1\"><svg onload='window.pwned=1'>",
    '</script><script>window.pwned=1</script><style>*{display:none}</style><a href="javascript:window.pwned=1">x</a>',
    "\u202egnirts desrever\u202c zero\u200bwidth \x07bell",
)

SAMPLING = {
    "policy_name": "current", "policy_digest": "d" * 64, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "logprobs_mode": "processed", "engine": "none", "engine_version": "0",
}  # fmt: skip


def write(run: RunDir, iteration: int, dataset: str, columns: dict[str, object]) -> Artifact:
    schema = pl.DataFrame(SCHEMAS[dataset].empty_table()).schema
    frame = pl.DataFrame(columns)
    frame = frame.with_columns(pl.lit(None).alias(name) for name in schema if name not in frame.columns)
    stage = {"completions": "generate", "rewards": "score", "advantages": "normalize"}.get(dataset, dataset)
    recipe = recipe_hash(Recipe(stage, 1, {"iteration": iteration}, {}, {}))
    writer = ArtifactWriter(run.place(iteration, dataset), dataset, recipe)
    writer.open()
    writer.write_part(0, frame.select(pl.col(name).cast(type_) for name, type_ in schema.items()))
    config = {"iteration": iteration}
    return writer.seal(stage=stage, stage_version=1, config=config, chosen=config, inputs={}, environment={})


def lists(rng: np.random.Generator, lengths: np.ndarray, low: float, high: float) -> pl.Series:
    """Return one list of random numbers for each length."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    flat = pl.DataFrame({"row": rows, "x": rng.uniform(low, high, len(rows))})
    return flat.group_by("row", maintain_order=True).agg(pl.col("x").cast(pl.Float32))["x"]


def make_iteration(run: RunDir, iteration: int, num: int, tokens: int, words: list[str]) -> None:
    rng = np.random.default_rng(iteration)
    groups = num // GROUP
    group_id = np.repeat([f"g{iteration:04d}{g:011d}" for g in range(groups)], GROUP)
    completion_id = [f"{g}-{i % GROUP:03d}" for i, g in enumerate(group_id)]
    prompt_id = np.repeat([f"p{g:015d}" for g in range(groups)], GROUP)
    lengths = rng.integers(max(1, tokens // 2), tokens + 1, num)
    ids = lists(rng, lengths, 0, len(words)).cast(pl.List(pl.Int32))
    texts = [HOSTILE[i % 3] if i % 97 < 3 else " ".join(words[t] for t in row) for i, row in enumerate(ids.to_list())]
    right = rng.random(num) < 0.3 + 0.6 * iteration / (iteration + 30)
    failed = rng.random(num) < 0.01
    reward = np.where(right, 1.0, 0.0) + rng.normal(0, 0.05, num)
    statistics = pl.DataFrame({"g": group_id, "r": reward}).select(
        mean=pl.col("r").mean().over("g"), std=pl.col("r").std().over("g")
    )
    advantage = (reward - statistics["mean"].to_numpy()) / (statistics["std"].to_numpy() + 1e-4)
    logprobs = lists(rng, lengths, -3, 0)
    questions = [[{"role": "user", "content": f"<b>Question</b> {g}"}] for g in range(groups)]
    write(run, iteration, "prompts", {
        "prompt_id": prompt_id[::GROUP], "messages": questions,
        "prompt_token_ids": [[1, 2]] * groups, "task": ["synthetic"] * groups, "metadata": ["{}"] * groups,
    })  # fmt: skip
    write(run, iteration, "completions", {
        "completion_id": completion_id, "group_id": group_id, "prompt_id": prompt_id,
        "completion_index": np.arange(num) % GROUP, "policy_iteration": iteration - (np.arange(num) % 4 == 3),
        "prompt_token_ids": [[1, 2]] * num, "completion_token_ids": ids, "sampling_logprobs": logprobs,
        "completion": texts, "finish_reason": np.where(lengths == tokens, "length", "stop"), "seed": np.arange(num),
        **{name: [value] * num for name, value in SAMPLING.items()},
    })  # fmt: skip
    detail = [json.dumps({"extracted": t[:20]}) for t in texts]
    write(run, iteration, "rewards", {
        "completion_id": completion_id * 2, "group_id": [*group_id, *group_id],
        "reward_name": ["verifier"] * num + ["<i>style</i>"] * num, "reward_recipe": ["r"] * 2 * num,
        "reward": [*np.where(right, 1.0, 0.0), *(None if f else 0.5 for f in failed)], "detail": detail + [None] * num,
        "error": [None] * num + ["ValueError: <script>window.pwned=1</script>" if f else None for f in failed],
    })  # fmt: skip
    write(run, iteration, "advantages", {
        "completion_id": completion_id, "group_id": group_id, "reward": reward, "advantage": advantage,
        "group_reward_mean": statistics["mean"], "group_reward_std": statistics["std"], "group_size": [GROUP] * num,
    })  # fmt: skip
    ratios = rng.lognormal(0, 0.1, num)
    write(run, iteration, "training_records", {
        "completion_id": completion_id, "optimizer_step": np.arange(num) % 4, "num_tokens": lengths,
        "importance_ratio_mean": ratios, "importance_ratio_max": ratios * 1.5, "correction_weight_mean": ratios,
        "clipped_low_tokens": rng.integers(0, 3, num), "clipped_high_tokens": rng.integers(0, 3, num),
        "masked_tokens": np.zeros(num, int), "known_tokens": lengths,
        "entropy_mean": rng.uniform(0.2, 2 - iteration / 100, num),
        "kl_to_sampler": rng.uniform(0, 1e-3, num), "logprob_difference_max": rng.uniform(0, 0.3, num),
        "loss": rng.normal(0, 1e-3, num), "trainer_logprobs": logprobs, "sampling_logprobs": logprobs,
        "importance_ratios": lists(rng, lengths, 0.7, 1.4), "correction_weights": lists(rng, lengths, 0.5, 2),
        "entropies": lists(rng, lengths, 0, 3),
    })  # fmt: skip
    write(run, iteration, "optimizer_steps", {
        "optimizer_step": range(4), "learning_rate": [1e-6] * 4, "grad_norm": rng.uniform(0.3, 2, 4), "loss": [0.0] * 4,
        "num_tokens": [int(lengths.sum()) // 4] * 4, "num_rows": [num // 4] * 4,
    })  # fmt: skip


def make_run(root: Path, completions: int, tokens: int) -> RunDir:
    run = RunDir(root)
    generate = {"max_tokens": tokens}
    run.record_config("", {"seed": 0, "generate": generate, "evaluate": {"pass_threshold": 0.5}})
    words = [f"word{i}" for i in range(500)] + list(HOSTILE)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    run.initial_policy.mkdir(parents=True)
    tokenizer.save(str(run.initial_policy / "tokenizer.json"))
    for iteration in range(-(-completions // PER_ITERATION)):
        make_iteration(run, iteration, PER_ITERATION, tokens, words)
    return run


def findings() -> list[dict[str, object]]:
    rows = [{"iteration": 0, "group_id": f"g0000{g:011d}", "completion_id": f"g0000{g:011d}-000"} for g in range(40)]
    return [
        {"check": "same answers", "severity": "warning", "message": "<img src=x onerror=window.pwned=1>", "rows": rows},
        {"check": "rewards can be joined", "severity": "error", "message": "Row\nwithout a reward", "rows": rows[:1]},
        {"check": "learning rate", "severity": "info", "message": "It never changes.", "rows": []},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=60, help="of the longest answers")
    parser.add_argument("--groups", type=int, default=12, help="of an iteration, at most")
    parser.add_argument("--keep", type=Path, help="new folder for the run, its report and the findings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary) / "large"
        started = time.perf_counter()
        run = make_run(root, arguments.completions, arguments.tokens)
        made = time.perf_counter()
        (root / "findings.json").write_text(json.dumps(findings()), encoding="utf-8")
        page, report = write_report(root, findings=root / "findings.json", groups=arguments.groups)
        written = time.perf_counter()
        made_what = f"{report.counts['completions']:,} answers in {len(run.iterations())} iterations"
        print(f"made {made_what} in {made - started:.1f} s")
        print(
            f"wrote the report in {written - made:.1f} s: {page.stat().st_size / 1e6:.1f} MB, "
            f"{report.counts['shown_groups']:,} of {report.counts['groups']:,} groups"
        )


if __name__ == "__main__":
    main()
