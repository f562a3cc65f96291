"""Training a reward model: the loss, what is trained on, a refresh with replay, the same bits twice."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from pipeline.artifact import Artifact
from pipeline.errors import ConfigError, PolicyError, RewardError, SourceError
from pipeline.run_dir import RunDir
from pipeline.stage import StageResult
from stages.reward_model.preference_loss import preference_accuracy, preference_loss
from stages.reward_model.reward_model import (
    RewardModelConfig,
    encode_pairs,
    load_reward_model_config,
    order_batches,
    train_reward_model,
)
from stages.rewards.models.preference_model import preference_score
from tests.preferences import jsonl, longer_is_better, store_run
from tests.tiny_models import answer_rows, save_constant_classifier, save_last_word_reward_model, save_uniform_lm

QUICK = {"batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 5, "num_threads": 1, "pairs_per_forward": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    save_uniform_lm(path)
    return path


@pytest.fixture(scope="module")
def config(base: Path) -> RewardModelConfig:
    file = longer_is_better(base.parent / "preferences.jsonl", 200, seed=0)
    return RewardModelConfig(base=str(base), preferences=[file], epochs=8, held_out_share=0.25, **QUICK)


@pytest.fixture(scope="module")
def trained(config: RewardModelConfig, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    return train_reward_model(config, tmp_path_factory.mktemp("reward_models"))


def report_of(result: StageResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.main.path / "training.json").read_text(encoding="utf-8"))
    return found


# the loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "centering", "loss"),
    [
        (0.0, 0.0, 0.0, 0.0, 0.6931472),  # log 2
        (1.0, 0.0, 0.0, 0.0, 0.3132617),  # log(1 + e^-1)
        (0.0, 1.0, 0.0, 0.0, 1.3132617),
        (1.0, 0.0, 1.0, 0.0, 0.6931472),
        (1.0, 1.0, 0.0, 0.25, 1.6931472),  # log 2 + 0.25 x 2^2
        (500.0, -500.0, 0.0, 0.0, 0.0),
        (-500.0, 500.0, 0.0, 0.0, 1000.0),
    ],
)
def test_the_loss_is_that_of_bradley_and_terry(
    chosen: float, rejected: float, margin: float, centering: float, loss: float
) -> None:
    found = preference_loss(torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([margin]), centering)
    assert found.tolist() == pytest.approx([loss])


def test_without_centering_a_constant_added_to_all_rewards_changes_nothing() -> None:
    chosen, rejected, margin = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 2.0]), torch.zeros(2)
    moved = preference_loss(chosen + 8, rejected + 8, margin, 0.0)
    assert moved.tolist() == pytest.approx(preference_loss(chosen, rejected, margin, 0.0).tolist())


def test_accuracy_counts_equal_rewards_as_half() -> None:
    assert preference_accuracy([1.0, 0.0, 2.0, 5.0], [0.0, 1.0, 2.0, 4.0]) == 0.625
    assert preference_accuracy([], []) is None


def test_every_epoch_takes_every_pair_once_in_an_order_of_its_own() -> None:
    ids = [f"p{i}" for i in range(7)]
    batches = order_batches(ids, epochs=2, batch_size=3, seed=0)
    assert [len(b) for b in batches] == [3, 3, 1, 3, 3, 1]
    first, second = ([key for batch in half for key in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == ids
    assert first != second
    assert order_batches(ids[::-1], epochs=2, batch_size=3, seed=0) == batches
    assert order_batches(ids, epochs=2, batch_size=3, seed=1) != batches


def test_pairs_over_the_limit_are_dropped_and_never_cut(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    row = {"preference_id": "p", "messages": [{"role": "user", "content": "sky"}], "drop_reason": None, "margin": 0.0}
    fits = {**row, "chosen": "red red", "rejected": "red"}
    rows, pairs = encode_pairs([{**fits, "preference_id": "q", "chosen": "red red red"}, fits], tokenizer, 4)
    assert [r["drop_reason"] for r in rows] == ["too_long", None]
    assert list(pairs["p"].chosen["input_ids"]) == [7, 1, 4, 4]  # sky <eos> red red


# training


def test_a_reward_model_learns_what_people_prefer(trained: StageResult) -> None:
    report = report_of(trained)
    rows = trained.outputs["preferences_used"].read()
    held_out = rows.filter(pl.col("drop_reason") == "held_out")
    assert report["held_out"]["pairs"] == len(held_out) > 30
    assert report["held_out"]["accuracy"] > 0.9
    assert (held_out["chosen_score"] > held_out["rejected_score"]).mean() == report["held_out"]["accuracy"]
    assert report["trained"]["pairs"] + report["held_out"]["pairs"] == 200
    assert len(report["losses"]) == 8 * math.ceil(report["trained"]["pairs"] / 16)


def test_the_artifact_loads_as_it_stands_and_scores_as_it_did(trained: StageResult) -> None:
    from transformers import AutoModelForSequenceClassification

    model, loading = AutoModelForSequenceClassification.from_pretrained(trained.main.path, output_loading_info=True)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 1
    assert not loading["missing_keys"]
    rows = trained.outputs["preferences_used"].read().head(20)
    frame = answer_rows(
        *({"completion": row["chosen"], "messages": row["messages"]} for row in rows.iter_rows(named=True))
    )
    found = preference_score(frame, str(trained.main.path))
    assert found["reward"].to_list() == pytest.approx(rows["chosen_score"].to_list(), abs=1e-4)


def test_training_twice_gives_the_same_digests(config: RewardModelConfig, trained: StageResult, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(config.base, moved)
    file = shutil.copyfile(config.preferences[0], tmp_path / "same.jsonl")
    again = train_reward_model(config.model_copy(update={"base": str(moved), "preferences": [str(file)]}), tmp_path)
    assert not again.reused
    assert again.main.digest == trained.main.digest
    assert again.outputs["preferences_used"].digest == trained.outputs["preferences_used"].digest


def test_a_finished_reward_model_is_found_again(config: RewardModelConfig, trained: StageResult) -> None:
    again = train_reward_model(config, trained.main.path.parent.parent)
    assert again.reused
    assert again.main.path == trained.main.path


def test_another_seed_gives_another_model(config: RewardModelConfig, trained: StageResult, tmp_path: Path) -> None:
    other = train_reward_model(config.model_copy(update={"seed": 1, "epochs": 1}), tmp_path)
    assert other.main.path.parent.name != trained.main.path.parent.name


def test_how_pairs_share_a_forward_changes_nothing_but_rounding(config: RewardModelConfig, tmp_path: Path) -> None:
    one = config.model_copy(update={"epochs": 1})
    losses = [
        report_of(train_reward_model(one.model_copy(update={"pairs_per_forward": n}), tmp_path))["losses"]
        for n in (16, 5)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_refresh_replays_a_tenth_of_the_older_pairs(
    config: RewardModelConfig, trained: StageResult, tmp_path: Path
) -> None:
    older = report_of(trained)["trained"]["pairs"]
    fresh = longer_is_better(tmp_path / "fresh.jsonl", 40, seed=7)
    settings = config.model_copy(update={"base": str(trained.main.path), "preferences": [fresh], "warmup_steps": 0})
    second = train_reward_model(settings, tmp_path)
    rows = second.outputs["preferences_used"].read()
    reasons = dict(rows.filter(pl.col("source") == "older")["drop_reason"].value_counts().iter_rows())
    expected = round(older * 0.1)
    assert reasons[None] == expected > 10
    assert reasons["not_replayed"] == older - expected
    assert reasons["held_out"] == report_of(trained)["held_out"]["pairs"]
    assert report_of(second)["replayed"]["pairs"] == expected
    assert report_of(second)["held_out_older"]["accuracy"] > 0.9
    assert set(second.main.manifest.inputs) == {"base", "older"}
    # nothing is forgotten: a third round draws from the pairs of both earlier ones
    newest = longer_is_better(tmp_path / "newest.jsonl", 10, seed=8)
    third = train_reward_model(
        settings.model_copy(update={"base": str(second.main.path), "preferences": [newest]}), tmp_path
    )
    known = third.outputs["preferences_used"].read().filter(pl.col("source") == "older")
    assert len(known) == 240


def test_an_older_pair_that_is_given_again_is_new(
    config: RewardModelConfig, trained: StageResult, tmp_path: Path
) -> None:
    settings = config.model_copy(update={"base": str(trained.main.path), "epochs": 1})
    rows = train_reward_model(settings, tmp_path).outputs["preferences_used"].read()
    assert rows.filter(pl.col("source") == "older")["drop_reason"].unique().to_list() == ["duplicate"]


def test_preferences_by_id_make_the_run_an_input(base: Path, tmp_path: Path) -> None:
    run = store_run(tmp_path / "run")
    file = jsonl(
        tmp_path / "p.jsonl", {"chosen_id": "c1", "rejected_id": "c0"}, {"chosen_id": None, "rejected_id": "c0"}
    )
    settings = RewardModelConfig(base=str(base), preferences=[file], runs=[run], held_out_share=0.0, num_threads=1)
    result = train_reward_model(settings, tmp_path / "models")
    digests = {entry["digest"] for entry in result.main.manifest.inputs.values()}
    place = RunDir(Path(run))
    assert digests == {place.open(0, "completions").digest, place.open(0, "prompts").digest}
    assert report_of(result)["undecided"] == 1
    assert result.outputs["preferences_used"].read()["chosen_id"].to_list() == ["c1"]


def test_a_policy_of_a_run_can_be_the_base_and_is_an_input(tiny_artifact: Artifact, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "yes", "rejected": "no"})
    settings = RewardModelConfig(base=str(tiny_artifact.path), preferences=[file], held_out_share=0.0, num_threads=1)
    result = train_reward_model(settings, tmp_path / "models")
    assert result.main.manifest.inputs["base"]["digest"] == tiny_artifact.digest
    assert json.loads((result.main.path / "config.json").read_text())["architectures"] == [
        "Qwen2ForSequenceClassification"
    ]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (result.main.path / name).read_bytes() == (tiny_artifact.path / name).read_bytes()


# what cannot be trained


def test_a_reward_model_without_its_preferences_is_refused(trained: StageResult, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(trained.main.path, alone)
    settings = RewardModelConfig(base=str(alone), preferences=["p.jsonl"])
    with pytest.raises(ConfigError, match="copy both together"):
        train_reward_model(settings, tmp_path)


def test_bases_without_one_logit_are_refused(tmp_path: Path) -> None:
    save_constant_classifier(tmp_path / "nli", [0.0, 1.0])
    file = longer_is_better(tmp_path / "p.jsonl", 3, seed=0)
    settings = RewardModelConfig(base=str(tmp_path / "nli"), preferences=[file], held_out_share=0.0)
    with pytest.raises(PolicyError, match="BertForSequenceClassification with 2 labels"):
        train_reward_model(settings, tmp_path / "models")


def test_a_reward_model_from_elsewhere_can_be_trained_on(tmp_path: Path) -> None:
    save_last_word_reward_model(tmp_path / "rm", chat=False, scores={"red": 1.0})
    file = longer_is_better(tmp_path / "p.jsonl", 3, seed=0)
    older = longer_is_better(tmp_path / "older.jsonl", 20, seed=1)
    settings = RewardModelConfig(
        base=str(tmp_path / "rm"), preferences=[file], older=[older], held_out_share=0.0, num_threads=1
    )
    report = report_of(train_reward_model(settings, tmp_path / "models"))
    assert (report["trained"]["pairs"], report["replayed"]["pairs"]) == (5, 2)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"base": "org/model"}, RewardError, "need revision"),
        ({"base": "./gone"}, RewardError, "does not exist"),
        ({"max_tokens": 3}, SourceError, r"none of 200 preferences is left .* \['too_long'\]"),
        ({"warmup_steps": 5000}, ConfigError, r"warmup_steps is 5000, and \d+ pairs make \d+ steps"),
        ({"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": None}, Exception, "expected finite ones"),
    ],
)
def test_what_cannot_be_trained_says_why(
    config: RewardModelConfig, tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        train_reward_model(config.model_copy(update=change), tmp_path)


def test_the_config_is_a_table_of_a_file(tmp_path: Path) -> None:
    text = '[reward_model]\nbase = "org/model"\nrevision = "abc"\npreferences = ["p.jsonl"]\n'
    (tmp_path / "rm.toml").write_text(text, encoding="utf-8")
    found = load_reward_model_config(tmp_path / "rm.toml", ["reward_model.seed=3"])
    assert (found.base, found.seed, found.replay_share) == ("org/model", 3, 0.1)
    with pytest.raises(ConfigError, match=r"reward_model\.epoch"):
        load_reward_model_config(tmp_path / "rm.toml", ["reward_model.epoch=3"])
