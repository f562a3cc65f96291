"""Offline iterations: one proximal policy over consecutive ones, so that the clip bounds what they do together."""

import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from flows.commands.fork import fork_tables
from flows.commands.verify import print_verification
from flows.printing import Format
from flows.replayer import Replayer
from flows.session import Session
from grpo.optimizer import make_optimizer
from grpo.policy_logprobs import frame_logprobs
from grpo.settings import UpdateConfig
from grpo.train_step import train_on_batches
from pipeline.artifact import open_artifact
from pipeline.config import load_toml, validate
from pipeline.errors import UsageError
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from stages.config import RunConfig
from stages.inspect.metrics import append_metrics, iteration_metrics, rising_kl
from tests.finished import forge
from tests.small_run import make_small_run
from tests.updates import batch_rows, frozen, gradients, sha256_of_weights, tiny_policy

STEPS = ("score", "logprobs", "normalize", "batch", "update", "optimizer")
ROWS_AGAIN = 3
SHARP = {"learning_rate": 0.05, "num_threads": 1}


def with_step(frame: pl.DataFrame, step: int) -> pl.DataFrame:
    return frame.with_columns(optimizer_step=pl.lit(step, pl.Int32))


@pytest.mark.parametrize("proximal", ["phase", "sampler"])
def test_two_calls_with_one_proximal_policy_are_two_steps_of_one_call(proximal: Any) -> None:
    """A second epoch as an iteration of its own has the ratios, the clip and the weights of one in the same."""
    rows, config = batch_rows(), UpdateConfig(learning_rate=0.01, proximal=proximal, offline_kl_coef=0)
    once, twice = tiny_policy(), tiny_policy()
    logprobs = frame_logprobs(once, rows, config).rename({"logprobs": "proximal_logprobs"})
    optimizer = make_optimizer(twice, config)
    expected, _ = train_on_batches(
        once, make_optimizer(once, config), pl.concat([with_step(rows, 0), with_step(rows, 1)]), config
    )
    train_on_batches(twice, optimizer, rows, config)
    found, _ = train_on_batches(
        twice, optimizer, rows.join(logprobs, on="completion_id", maintain_order="left"), config
    )
    assert sha256_of_weights(twice) == sha256_of_weights(once)
    assert found["importance_ratio_max"].to_list() == expected["importance_ratio_max"].to_list()[8:]
    assert found["clipped_high_tokens"].sum() + found["clipped_low_tokens"].sum() > 0


def stored_rows(ratio: float, advantage: float) -> pl.DataFrame:
    """Return rows of one proximal policy, under which each token is less probable than now by this ratio."""
    rows = batch_rows().with_columns(advantage=pl.lit(advantage))
    now = frame_logprobs(tiny_policy(), rows, UpdateConfig())
    proximal = pl.col("logprobs").list.eval(pl.element() - math.log(ratio))
    return rows.join(now.select("completion_id", proximal_logprobs=proximal), on="completion_id", maintain_order="left")


NO_CLIP = {"name": "ppo_clip", "clip_low": None, "clip_high": None, "dual_clip": None}


@pytest.mark.parametrize("ratio", [0.5, 3.0])
def test_the_kl_to_the_proximal_policy_pulls_back_what_stored_rows_have_moved(ratio: float) -> None:
    """Its gradient, coefficient x ratio x log ratio per token, is that of an advantage -coefficient x log ratio."""
    held = frozen(offline_kl_coef=0.3)
    free = frozen(offline_kl_coef=0, loss=NO_CLIP)
    loss, found = gradients(stored_rows(ratio, 0.0), held)
    _, expected = gradients(stored_rows(ratio, -0.3 * math.log(ratio)), free)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert loss > 0  # a divergence


@pytest.mark.parametrize("proximal", ["update", "sampler"])
def test_the_kl_to_the_proximal_policy_is_a_matter_of_phases(proximal: Any) -> None:
    held = frozen(offline_kl_coef=0.3, proximal=proximal)
    assert gradients(stored_rows(3.0, 0.0), held)[0] == 0
    assert gradients(batch_rows().with_columns(advantage=pl.lit(0.0)), frozen())[0] == 0


def test_the_sampler_as_the_proximal_policy_leaves_nothing_to_correct() -> None:
    config = UpdateConfig(learning_rate=1e-9, proximal="sampler", record_tokens=True)
    model = tiny_policy()
    records, _ = train_on_batches(model, make_optimizer(model, config), batch_rows(), config)
    row = records.filter(pl.col("num_tokens") > 1).to_dicts()[0]
    known = [i for i, logprob in enumerate(row["trainer_logprobs"]) if logprob is not None]
    ratios = [math.exp(row["trainer_logprobs"][i] - row["sampling_logprobs"][i]) for i in known]
    assert [row["importance_ratios"][i] for i in known] == pytest.approx(ratios, rel=1e-5)
    assert {row["correction_weights"][i] for i in known} == {1.0}


def test_logprobs_are_those_of_the_policy_with_null_where_a_token_does_not_train() -> None:
    rows = batch_rows()
    model = tiny_policy()
    found = dict(frame_logprobs(model, pl.concat([rows, with_step(rows, 1)]), UpdateConfig()).iter_rows())
    assert list(found) == rows["completion_id"].to_list()
    for row in rows.to_dicts():
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0] / row["temperature"]
        expected = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + completion) - 1), completion].tolist()
        mask = row["loss_mask"] or [True] * len(completion)
        wanted = [value if is_trained else None for value, is_trained in zip(expected, mask, strict=True)]
        assert found[row["completion_id"]] == [None if w is None else pytest.approx(w, abs=2e-6) for w in wanted]


def test_a_logprob_that_is_not_finite_is_an_error() -> None:
    """A null would let the update take the policy that it begins with for the proximal one."""
    model = tiny_policy()
    torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)
    with pytest.raises(ArithmeticError, match="completion c0 has a logprob that is not finite"):
        frame_logprobs(model, batch_rows(), UpdateConfig())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run whose rows are used again; not to be changed."""
    return make_small_run(tmp_path_factory.mktemp("offline"), tiny_policy)


def reuse(source: Path, folder: Path, **update: Any) -> tuple[RunConfig, RunDir]:
    """Return config and run of iterations that all train on the source's first rows."""
    file = folder / "offline.toml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(f'iterations = 3\n[[offline]]\nrun = "{source}"\niterations = [0, 0, 0]\n')
    tables = fork_tables(open_run(source), 0, load_toml(file), None, [])
    tables["update"] = {**tables["update"], **SHARP, **update}
    config = validate(RunConfig, tables, "offline")
    run = RunDir(folder / "run")
    run.record_config("", config.model_dump(mode="json"))
    with closing(Session(config, run)) as session:
        session.initial_policy()
        for iteration in range(ROWS_AGAIN):
            session.perform("generate", iteration)
            for step in STEPS:
                if config.executes(step, iteration):
                    session.perform(step, iteration)
            append_metrics(run, iteration_metrics(run, iteration, 1.0))
    return config, run


@pytest.fixture(scope="module")
def phase(source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return reuse(source, tmp_path_factory.mktemp("phase"))[1]


def ratios(run: RunDir, iteration: int) -> list[float]:
    return run.open(iteration, "training_records").read()["importance_ratio_max"].to_list()


def test_consecutive_offline_iterations_have_one_proximal_policy(phase: RunDir) -> None:
    assert not phase.has(0, "logprobs")
    assert ratios(phase, 0) == [1.0, 1.0]
    for iteration in (1, 2):
        logprobs = phase.open(iteration, "logprobs")
        assert logprobs.read()["policy_digest"].unique().to_list() == [open_artifact(phase.initial_policy).digest]
        assert max(abs(math.log(ratio)) for ratio in ratios(phase, iteration)) > math.log(1.2)
        assert phase.open(iteration, "policy").manifest.inputs["logprobs"]["digest"] == logprobs.digest
    clipped = (
        phase.open(2, "training_records").read().select(pl.sum("clipped_low_tokens", "clipped_high_tokens")).row(0)
    )
    assert sum(clipped) > 0
    assert print_verification(phase.root, 20, Format.table)


@pytest.mark.parametrize("proximal", ["update", "sampler"])
def test_another_proximal_policy_needs_no_logprobs(source: Path, tmp_path: Path, proximal: str) -> None:
    _, run = reuse(source, tmp_path, proximal=proximal)
    assert not run.has(1, "logprobs")
    assert (ratios(run, 1) == [1.0, 1.0]) is (proximal == "update")
    assert print_verification(run.root, 20, Format.table)


def test_a_lost_optimizer_state_is_made_again_with_the_same_proximal_policy(phase: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(phase.root, tmp_path / "copy"))
    state = run.open(2, "optimizer").digest
    for iteration in range(ROWS_AGAIN):
        shutil.rmtree(run.place(iteration, "optimizer"))
    with closing(Session(validate(RunConfig, run.settings(), "copy"), run)) as session:
        session.perform("optimizer", 2)
    assert run.open(2, "optimizer").digest == state


def test_replay_computes_the_logprobs_again(phase: RunDir, tmp_path: Path) -> None:
    with closing(Replayer(phase, tmp_path)) as replayer:
        found = [row for stage in ("logprobs", "update") for row in replayer.replay(stage, 2)]
    assert {(row.dataset, row.result) for row in found} >= {("logprobs", "equal"), ("policy", "equal")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[1:], "missing"),
        (lambda f: f.with_columns(logprobs=pl.col("logprobs").list.tail(1)), "tokens"),
        (lambda f: f.with_columns(logprobs=pl.col("logprobs") * -1), "above 0"),
        (lambda f: f.with_columns(policy_digest=pl.lit("x")), "policy_digest"),
    ],
)
def test_verify_finds_forged_logprobs(
    phase: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    run = RunDir(shutil.copytree(phase.root, tmp_path / "copy"))
    forge(run, run.place(1, "logprobs"), change)
    assert not print_verification(run.root, 20, Format.jsonl)
    assert message in capsys.readouterr().out


def test_a_step_that_an_iteration_does_not_have_is_refused(phase: RunDir) -> None:
    session = Session(validate(RunConfig, phase.settings(), "phase"), phase)
    with closing(session), pytest.raises(UsageError, match=r"iteration 0 of .* has no step logprobs"):
        session.perform("logprobs", 0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ([0.01, 0.02, 0.03, 0.05, 0.08], True),
        ([0.01, 0.02, 0.03, 0.05], False),
        ([0.01, 0.02, 0.03, 0.05, 0.05], False),
        ([0.005, 0.01, 0.02, 0.03, 0.05, 0.08], False),
        ([0.02, 0.01, 0.02, 0.03, 0.05, 0.08], True),
        ([1e-14, 2e-14, 3e-14, 4e-14, 5e-14], False),
        ([None, 0.02, 0.03, 0.05, 0.08], True),
    ],
)
def test_a_kl_that_rises_four_times_in_a_row_is_told_once(kl: list[float | None], expected: bool) -> None:
    table = pl.DataFrame({"iteration": range(len(kl)), "kl_to_sampler": kl})
    assert (rising_kl(table, len(kl) - 1) is not None) is expected
