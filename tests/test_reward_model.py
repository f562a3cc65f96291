"""Training a reward model: the loss, the data it may use, a refresh with replay, the same bits twice."""

import json
import math
import random
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
from stages.reward_model.preferences import draw_replay, read_preferences, without_duplicates
from stages.reward_model.reward_model import (
    RewardModelConfig,
    encode_pairs,
    load_reward_model_config,
    order_batches,
    train_reward_model,
)
from stages.rewards.models.preference_model import preference_score
from tests.builders import completion_rows, prompt_rows, write_artifact
from tests.tiny_models import answer_rows, save_constant_classifier, save_last_word_reward_model, save_uniform_lm

WORDS = ("red", "green", "blue", "sky", "is", "the")
QUICK = {"batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 5, "num_threads": 1, "pairs_per_forward": 16}


def longer_is_better(path: Path, count: int, seed: int) -> str:
    """Write preferences of random words in which the longer answer is chosen; no question occurs twice."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        short, long = sorted(draw.sample(range(1, 11), 2))
        prompt, chosen, rejected = (" ".join(draw.choices(WORDS, k=k)) for k in (8, long, short))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return jsonl(path, *rows)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(*files: str, runs: tuple[str, ...] = (), held_out_share: float = 0.0) -> list[dict[str, Any]]:
    return read_preferences(files, runs, source="new", default_margin=0.5, held_out_share=held_out_share).rows


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


# what is trained on


def test_every_epoch_takes_every_pair_once_in_an_order_of_its_own() -> None:
    ids = [f"p{i}" for i in range(7)]
    batches = order_batches(ids, epochs=2, batch_size=3, seed=0)
    assert [len(b) for b in batches] == [3, 3, 1, 3, 3, 1]
    first, second = ([key for batch in half for key in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == ids
    assert first != second
    assert order_batches(ids[::-1], epochs=2, batch_size=3, seed=0) == batches
    assert order_batches(ids, epochs=2, batch_size=3, seed=1) != batches


def test_texts_of_several_shapes_are_the_same_preference(tmp_path: Path) -> None:
    question, yes, no = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "y"), ("assistant", "n")))
    shapes = [
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"prompt": [question], "chosen": [yes], "rejected": [no]},
        {"messages": [question], "chosen": "y", "rejected": "n"},
        {"chosen": [question, yes], "rejected": [question, no]},
    ]
    rows = [read(jsonl(tmp_path / f"{i}.jsonl", shape))[0] for i, shape in enumerate(shapes)]
    assert {row["preference_id"] for row in rows} == {rows[0]["preference_id"]}
    assert [row["messages"] for row in rows] == [[question]] * 4
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in rows] == [("y", "n", 0.5)] * 4


def test_ids_are_joined_to_stored_completions(tmp_path: Path) -> None:
    run = store_run(tmp_path / "run")
    rows = jsonl(tmp_path / "p.jsonl", {"chosen_id": "c1", "rejected_id": "c0", "margin": 2, "rater": "ann"})
    found = read_preferences([rows], [run], source="new", default_margin=0.0, held_out_share=0.0)
    [row] = found.rows
    assert (row["chosen"], row["rejected"], row["margin"], row["rater"]) == ("blue", "red", 2.0, "ann")
    assert row["messages"] == [{"role": "user", "content": "the sky"}]
    assert [name.partition(":")[0] for name in found.completions] == ["completions", "prompts"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen_id": "c1", "rejected_id": "zz"}, r"names the completions \['zz'\]"),
        ({"chosen_id": "c1", "rejected_id": "c2"}, "different questions"),
        ({"better": "c1"}, "expected chosen_id and rejected_id"),
        (
            {"prompt": "q", "chosen": [{"role": "a"}], "rejected": "n"},
            "in the column chosen: expected a list of objects with a role",
        ),
        ({"chosen": "y", "rejected": "n"}, "add a column prompt"),
        ({"prompt": "q", "chosen": "y", "rejected": "n", "margin": "big"}, "the margin 'big'"),
        ({"prompt": "q", "chosen": "y", "rejected": "n", "margin": [1]}, r"the margin \[1\]|the margin \[1.0\]"),
        ({"prompt": "q", "chosen": "y", "rejected": "n", "rater": ["ann"]}, r"has \['ann'\] in the column rater"),
        (
            {"prompt": [{"role": "user", "content": "q", "tool_calls": ["f"]}], "chosen": "y", "rejected": "n"},
            "a turn with tool_calls",
        ),
    ],
)
def test_a_row_that_says_nothing_clear_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said) as found:
        read(jsonl(tmp_path / "p.jsonl", row), runs=(store_run(tmp_path / "run"),))
    assert "row 1 of" in str(found.value)


def test_rows_without_use_say_why(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": "y", "rejected": "n", "is_tie": False},
        {"prompt": "q", "chosen": "y", "rejected": "y", "is_tie": False},
        {"prompt": "q", "chosen": "y", "rejected": "n", "is_tie": True},
        {"prompt": "q", "chosen": "y", "rejected": "n", "is_tie": False},
    )
    assert [row["drop_reason"] for row in without_duplicates(read(file))] == [None, "equal", "tie", "duplicate"]


def test_the_same_choice_of_two_raters_counts_twice(tmp_path: Path) -> None:
    rows = ({"prompt": "q", "chosen": "y", "rejected": "n", "rater": rater} for rater in ("ann", "bob"))
    assert [r["drop_reason"] for r in without_duplicates(read(jsonl(tmp_path / "p.jsonl", *rows)))] == [None, None]


def test_a_question_is_held_out_with_all_its_preferences(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 50}", "chosen": f"y{i}", "rejected": "n"} for i in range(200)]
    found = pl.DataFrame(read(jsonl(tmp_path / "p.jsonl", *rows), held_out_share=0.3))
    held = pl.col("drop_reason").eq_missing("held_out")
    shares = found.group_by("messages").agg(held.mean())["drop_reason"].to_list()
    assert set(shares) == {0.0, 1.0}
    assert 0.1 < sum(shares) / 50 < 0.5


def test_a_replay_draws_the_nearest_number_of_older_rows_whatever_their_order() -> None:
    older = [
        {"preference_id": f"p{i}", "source": "older", "drop_reason": "held_out" if i < 5 else None} for i in range(40)
    ]
    new = [{"preference_id": "n", "source": "new", "drop_reason": None}]
    rows = draw_replay([*new, *older], share=0.1, seed=0)
    drawn = {r["preference_id"] for r in rows if r["drop_reason"] is None}
    assert len(drawn) == 1 + 4  # 3.5 of 35, rounded up
    assert [r["drop_reason"] for r in rows].count("held_out") == 5
    assert {r["preference_id"] for r in draw_replay(older[::-1] + new, 0.1, 0) if r["drop_reason"] is None} == drawn
    assert {r["preference_id"] for r in draw_replay(older + new, 0.1, 1) if r["drop_reason"] is None} != drawn


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


def store_run(root: Path) -> str:
    """Store a run with the completions c0 red, c1 blue of one question, and c2 of another."""
    run = RunDir(root)
    run.record_config("", {})
    user = {"role": "user", "content": "the sky"}
    write_artifact(
        run.place(0, "prompts"),
        "prompts",
        prompt_rows(
            {"prompt_id": "p", "messages": [user]}, {"prompt_id": "q", "messages": [{**user, "content": "is"}]}
        ),
    )
    answers = [{"completion": "red"}, {"completion": "blue"}, {"completion": "green", "prompt_id": "q"}]
    write_artifact(run.place(0, "completions"), "completions", completion_rows(*answers))
    return str(root)


def test_a_margin_that_pandas_left_out_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    pl.DataFrame({"prompt": "q", "chosen": "y", "rejected": "n", "margin": [float("nan")]}).write_parquet(file)
    assert [row["margin"] for row in read(str(file))] == [0.5]
