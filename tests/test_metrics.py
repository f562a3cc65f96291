"""metrics: one iteration's artifacts, and its row worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.run_dir import RunDir
from stages.inspect.metrics import append_metrics, iteration_metrics, training_measures
from tests.builders import advantage_rows, check_rows, completion_rows, fill, reward_rows, write_artifact

STEPS = [
    {"optimizer_step": 0, "learning_rate": 0.25, "grad_norm": 2.0, "loss": 0.5, "num_tokens": 12, "num_rows": 2},
    {"optimizer_step": 1, "learning_rate": 0.5, "grad_norm": 4.0, "loss": -0.25, "num_tokens": 12, "num_rows": 2},
]
RECORDS = [
    # of ten tokens one has a known sampler: the KL of 5 nats is that of one token, not of ten
    {"completion_id": "g-0", "num_tokens": 10, "known_tokens": 1, "kl_to_sampler": 5.0, "entropy_mean": 0.25},
    {"completion_id": "g-1", "num_tokens": 10, "known_tokens": 10, "kl_to_sampler": 0.0, "entropy_mean": 0.75},
    {"completion_id": "g-2", "num_tokens": 4, "known_tokens": 0, "kl_to_sampler": None, "entropy_mean": 2.0},
]


def test_a_mean_of_nothing_is_null() -> None:
    """A NaN would pass for a figure, and verify would find that it differs from itself."""
    unknown = [{**row, "known_tokens": 0, "kl_to_sampler": None} for row in RECORDS]
    zeros = {"optimizer_step": 0, "masked_tokens": 0, "loss": 0.0, "clipped_low_tokens": 0, "clipped_high_tokens": 0}
    zeros["bounded_tokens"] = 0
    measured = fill("training_records", unknown, **zeros).select(**training_measures()).row(0, named=True)
    assert (measured["kl_to_sampler"], measured["clip_low_share"]) == (None, 0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with one informative group and a flat one, whose tokens are surer."""
    run = RunDir(tmp_path / "run")

    def write(dataset: str, frame: Any) -> None:
        write_artifact(run.place(0, dataset), dataset, frame)

    surer = {"group_id": "h", "sampling_logprobs": [-0.25, None]}
    completions = [{}, {"finish_reason": "length"}, {"completion_token_ids": [7] * 4}, surer, surer]
    rewards = reward_rows(g=[1.0, 0.0, None], h=[0.0, 0.0])
    ids = rewards["completion_id"].to_list()
    write(
        "completions", completion_rows(*({**row, "completion_id": i} for row, i in zip(completions, ids, strict=True)))
    )
    write(
        "rewards", rewards.with_columns(error=rewards["reward"].is_null().replace_strict({True: "failed", False: None}))
    )
    scored = [{"completion_id": i, "group_id": i[0], "reward": r} for i, r in zip(ids, rewards["reward"], strict=True)]
    scored[3:] = [{**row, "drop_reason": "zero_variance"} for row in scored[3:]]
    write("advantages", advantage_rows(*scored))
    zeros = {"optimizer_step": 0, "masked_tokens": 0, "loss": 0.0}
    clipped = {"clipped_low_tokens": 1, "clipped_high_tokens": 2, "bounded_tokens": 4, "kl_to_reference": 0.5}
    write("training_records", fill("training_records", RECORDS, **clipped, **zeros))
    write("optimizer_steps", fill("optimizer_steps", STEPS))
    return run


def test_the_row_of_an_iteration_is_what_its_artifacts_say(run: RunDir) -> None:
    row = iteration_metrics(run, 0, pass_threshold=0.5)
    expected = {
        "iteration": 0,
        "reward_mean": 0.25,
        "reward_std": 0.5,
        "pass_rate": 0.25,
        "rewards": [{"name": "accuracy", "mean": 0.25, "null_count": 1, "timed_out_count": 0}],
        "completion_tokens_mean": 2.4,
        "truncated_share": 0.2,
        "zero_variance_share": 0.5,
        "num_completions": 5,
        "num_trained": 3,
        "num_tokens": 24,
        "entropy": (8 * 1.0 + 2 * 0.25) / 10,
        "entropy_trained": (10 * 0.25 + 10 * 0.75 + 4 * 2.0) / 24,
        "kl_to_sampler": 5 / 11,
        "clip_low_share": 3 / 24,
        "clip_high_share": 6 / 24,
        "bounded_share": 12 / 24,
        "kl_to_reference": 0.5,
        "loss": 0.125,
        "grad_norm": 3.0,
        "learning_rate": 0.5,
    }
    numbers = {name: row[name] for name in expected}
    assert numbers == {n: pytest.approx(v) if isinstance(v, float) else v for n, v in expected.items()}


def test_failed_checks_are_counted_and_so_are_the_completions_that_they_quarantine(run: RunDir) -> None:
    row = iteration_metrics(run, 0, pass_threshold=0.5)
    assert (row["num_failed_checks"], row["num_quarantined"]) == (None, None)
    rows = [
        {"name": "passed", "severity": "quarantine", "failed_ids": ["g-2"], "passed": True},
        {"name": "warned", "failed_ids": ["g-1"]},
        *({"name": name, "severity": "quarantine", "failed_ids": ["g-0", name]} for name in ("h-0", "h-1")),
    ]
    write_artifact(run.place(0, "checks"), "checks", check_rows(*rows))
    row = iteration_metrics(run, 0, pass_threshold=0.5)
    assert (row["num_failed_checks"], row["num_quarantined"]) == (3, 3)


def test_rows_of_an_earlier_version_that_knew_fewer_columns_stay(run: RunDir) -> None:
    append_metrics(run, iteration_metrics(run, 0, pass_threshold=0.5))
    run.read_metrics().drop("num_failed_checks", "num_quarantined").write_parquet(run.metrics)
    write_artifact(run.place(0, "checks"), "checks", check_rows())
    append_metrics(run, {**iteration_metrics(run, 0, pass_threshold=0.5), "iteration": 1})
    found = run.read_metrics()
    assert found["reward_mean"].to_list() == [0.25, 0.25]
    assert found["num_failed_checks"].to_list() == [None, 1]
