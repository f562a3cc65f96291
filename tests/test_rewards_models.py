"""Rewards by embedding, language, entailment and reward models, on tiny models whose outputs are known."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import RewardError
from stages.rewards.models.embedding import embedding, embedding_identity
from stages.rewards.models.entailment import entailment, entailment_identity, label_roles
from stages.rewards.models.frozen_models import batches_by_length
from stages.rewards.models.model_identity import model_identity
from stages.rewards.models.perplexity import perplexity, perplexity_identity
from stages.rewards.models.preference_model import preference_score, preference_score_identity
from tests.tiny_models import (
    answer_rows,
    save_constant_classifier,
    save_favourite_lm,
    save_last_word_classifier,
    save_last_word_reward_model,
    save_random_encoder,
    save_uniform_lm,
    save_word_encoder,
)

NLI = {0: "contradiction", 1: "entailment", 2: "neutral"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "encoder"
    save_word_encoder(path, {"red": [1, 0], "green": [0, 1], "blue": [3.0, 4.0], "minus": [-1, 0]})
    return str(path)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "uniform"
    save_uniform_lm(path, chat=True)
    return str(path)


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that says contradiction 1/4, entailment 1/2, neutral 1/4 of everything."""
    path = tmp_path_factory.mktemp("models") / "nli"
    save_constant_classifier(path, [0.0, math.log(2), 0.0], NLI)
    return str(path)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "reward"
    save_last_word_reward_model(path, chat=True, scores={"red": 1.5, "blue": -2.0})
    return str(path)


def detail(frame: pl.DataFrame, row: int = 0) -> Any:
    return json.loads(frame["detail"][row])


def with_context(*contexts: Any, completion: str = "the sky is blue.") -> pl.DataFrame:
    return answer_rows(*({"completion": completion, "metadata": json.dumps({"context": c})} for c in contexts))


# identity


def test_a_model_is_the_same_wherever_it_lies(nli: str, tmp_path: Path) -> None:
    shutil.copytree(nli, tmp_path / "elsewhere")
    assert model_identity(str(tmp_path / "elsewhere")) == model_identity(nli)


@pytest.mark.parametrize("name", ["manifest.json", "optimizer/state.safetensors", ".gitattributes", "README.md"])
def test_what_no_inference_reads_does_not_change_the_identity(nli: str, tmp_path: Path, name: str) -> None:
    place = tmp_path / "copy"
    shutil.copytree(nli, place)
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("x", encoding="utf-8")
    assert model_identity(str(place)) == model_identity(nli)


def test_another_byte_and_another_file_name_are_another_model(nli: str, tmp_path: Path) -> None:
    for name in ("changed", "renamed"):
        shutil.copytree(nli, tmp_path / name)
    config = tmp_path / "changed" / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    (tmp_path / "renamed" / "config.json").rename(tmp_path / "renamed" / "configs.json")
    digests = [model_identity(str(p))["model_sha256"] for p in (Path(nli), tmp_path / "changed", tmp_path / "renamed")]
    assert len(set(digests)) == 3


def test_a_hub_model_is_its_name_and_its_commit() -> None:
    assert model_identity("org/model", "abc123") == {"model": "org/model", "revision": "abc123"}


@pytest.mark.parametrize(("model", "said"), [("org/model", "revision"), ("./not-there", "does not exist")])
def test_a_model_that_cannot_be_pinned_is_refused(model: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        model_identity(model)


def test_identities_hold_the_digest_instead_of_the_path_and_every_other_argument(nli: str) -> None:
    digest = model_identity(nli)
    assert preference_score_identity(model=nli, squash=True) == {
        **digest,
        "squash": True,
        "batch_size": 8,
        "device": "cpu",
        "num_threads": 2,
    }
    for identity in (embedding_identity(model=nli), perplexity_identity(model=nli), entailment_identity(model=nli)):
        assert nli not in json.dumps(identity)
        assert identity["model_sha256"] == digest["model_sha256"]


def test_importing_the_modules_imports_no_torch() -> None:
    names = ["embedding", "perplexity", "entailment", "preference_model", "model_identity"]
    code = "import sys\n" + "".join(f"import stages.rewards.models.{name}\n" for name in names)
    code += "import stages.rewards.answers.ratings\n"
    code += "import stages.reward_model.reward_model\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_batches_take_the_longest_first_and_keep_the_order_of_equal_ones() -> None:
    assert batches_by_length([3, 9, 3, 5, 3], 2) == [[1, 3], [0, 2], [4]]


# embedding


def test_embedding_is_the_cosine_of_the_mean_word_vectors(encoder: str) -> None:
    rows = answer_rows(
        {"completion": "red", "prompt": "blue"},  # (1, 0) . (3, 4) / 5
        {"completion": "red green", "prompt": "green"},  # (0.5, 0.5) . (0, 1) / sqrt(0.5)
        {"completion": "minus", "prompt": "red"},
        {"completion": "green", "prompt": "red"},
    )
    found = embedding(rows, encoder)
    assert found["reward"].to_list() == pytest.approx([0.6, 0.70710678, -1.0, 0.0])
    assert detail(found, 1) == {"against": "prompt", "tokens": 2}


def test_embedding_to_the_reference_is_null_without_one(encoder: str) -> None:
    rows = answer_rows({"completion": "green", "reference": "blue"}, {"completion": "green", "reference": None})
    found = embedding(rows, encoder, against="reference")
    assert found["reward"].to_list() == [pytest.approx(0.8), None]
    assert found["error"].to_list() == [None, "the row has no reference to compare the answer with"]


def test_embedding_of_an_empty_answer_is_the_documented_value(encoder: str) -> None:
    rows = answer_rows({"completion": " \n", "prompt": "red"})
    assert embedding(rows, encoder)["reward"].to_list() == [0.0]
    assert embedding(rows, encoder, empty=-0.5)["reward"].to_list() == [-0.5]


def test_embedding_never_cuts_a_text(encoder: str) -> None:
    found = embedding(answer_rows({"completion": "red " * 9, "prompt": "red"}), encoder)
    assert found["reward"].to_list() == [None]
    assert "9 tokens and the prompt 1, the model reads 8" in found["error"][0]


def test_embedding_never_cuts_for_a_transformer_either(tmp_path: Path) -> None:
    save_random_encoder(tmp_path / "encoder", context=16)
    rows = answer_rows({"completion": "red " * 16, "prompt": "red"}, {"completion": "red " * 17, "prompt": "red"})
    found = embedding(rows, str(tmp_path / "encoder"))
    assert found["reward"].is_null().to_list() == [False, True]
    assert "17 tokens and the prompt 1, the model reads 16" in found["error"][1]


def test_embedding_puts_the_prefixes_before_the_texts(encoder: str) -> None:
    rows = answer_rows({"completion": "green", "prompt": "red"})
    # (0.5, 0.5) . (1, 0) / sqrt(0.5); (0.5, 0.5) . (0.5, 0.5) / 0.5
    assert embedding(rows, encoder, answer_prefix="red ")["reward"][0] == pytest.approx(0.70710678)
    assert embedding(rows, encoder, answer_prefix="red ", against_prefix="green ")["reward"][0] == pytest.approx(1.0)


def test_embedding_does_not_depend_on_the_batch_size(encoder: str) -> None:
    rows = answer_rows(*({"completion": "red " * n + "green", "prompt": "red"} for n in (3, 1, 5, 2)))
    one = embedding(rows, encoder, batch_size=1)["reward"].to_list()
    assert embedding(rows, encoder, batch_size=3)["reward"].to_list() == pytest.approx(one, abs=1e-6)
    # (n, 1) . (1, 0) / sqrt(n^2 + 1)
    assert one == pytest.approx([0.9486833, 0.7071068, 0.9805807, 0.8944272])


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "modules.json").write_text("no json", encoding="utf-8")
    with pytest.raises(RewardError, match="cannot be loaded by sentence-transformers"):
        embedding(answer_rows({}), str(tmp_path / "empty"))
    with pytest.raises(RewardError, match="expected prompt or reference"):
        embedding_identity(model=str(tmp_path / "empty"), against="question")


# perplexity


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(uniform: str) -> None:
    found = perplexity(answer_rows({"completion": "the sky is blue"}), uniform, worst=196.0)
    assert detail(found)["perplexity"] == pytest.approx(14.0, rel=1e-6)
    assert detail(found)["tokens"] == 4
    assert found["reward"][0] == pytest.approx(0.5)  # log 14 is half of log 196


def test_perplexity_names_the_worst_token(tmp_path: Path) -> None:
    save_favourite_lm(tmp_path / "lm", "red")
    found = perplexity(answer_rows({"completion": "red blue red"}), str(tmp_path / "lm"), worst=104.0)
    # probabilities 1/2, 1/26, 1/2: perplexity 104^(1/3)
    assert found["reward"][0] == pytest.approx(2 / 3, abs=1e-5)
    assert detail(found)["perplexity"] == pytest.approx(4.7026694, rel=1e-4)
    assert detail(found)["worst_token"] == {"index": 1, "text": "blue", "logprob": pytest.approx(-3.2580965, abs=1e-4)}


@pytest.mark.parametrize(("worst", "best", "reward"), [(14.0 - 1e-3, 1.0, 0.0), (100.0, 14.0 + 1e-3, 1.0)])
def test_perplexity_ends_at_0_and_1(uniform: str, worst: float, best: float, reward: float) -> None:
    assert perplexity(answer_rows({}), uniform, worst=worst, best=best)["reward"].to_list() == [reward]


@pytest.mark.parametrize(("given", "before"), [("nothing", 1), ("prompt", 3), ("messages", 6)])
def test_perplexity_reads_what_it_is_given_before_the_answer(uniform: str, given: Any, before: int) -> None:
    # <bos> / <bos> the sky / user : the sky assistant :
    found = perplexity(answer_rows({"completion": "blue " * 40, "prompt": "the sky"}), uniform, given=given)
    assert found["reward"].to_list() == [None]
    assert f"40 tokens after {before} of its context, the model reads 32" in found["error"][0]


def test_without_anything_before_it_the_first_token_is_not_scored(tmp_path: Path) -> None:
    save_uniform_lm(tmp_path / "lm", bos=False)
    found = perplexity(answer_rows({"completion": "blue sky"}, {}), str(tmp_path / "lm"), given="nothing", worst=196.0)
    assert found["reward"].to_list() == [pytest.approx(0.5), None]
    assert detail(found)["tokens"] == 1
    assert detail(found)["worst_token"]["index"] == 1
    assert "nothing before it" in found["error"][1]


def test_perplexity_of_an_empty_answer_is_the_documented_value(uniform: str) -> None:
    found = perplexity(answer_rows({"completion": ""}), uniform)
    assert (found["reward"][0], detail(found)) == (0.0, {"tokens": 0})


def test_perplexity_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    save_favourite_lm(tmp_path / "lm", "red")
    rows = answer_rows({"completion": "red"}, {"completion": "blue sky is the"}, {"completion": "red blue"})
    one = perplexity(rows, str(tmp_path / "lm"), batch_size=1)["reward"].to_list()
    assert perplexity(rows, str(tmp_path / "lm"), batch_size=3)["reward"].to_list() == pytest.approx(one, abs=1e-6)
    # perplexities 2, 26 and sqrt(52) of at most 100
    assert one == pytest.approx([0.8494850, 0.2925133, 0.5709992], abs=1e-5)


def test_perplexity_refuses_what_is_no_language_model_and_senseless_arguments(nli: str, uniform: str) -> None:
    with pytest.raises(RewardError, match="causal language model"):
        perplexity(answer_rows({}), nli)
    with pytest.raises(RewardError, match="1 <= best < worst"):
        perplexity_identity(model=uniform, best=5.0, worst=5.0)
    with pytest.raises(RewardError, match="expected one of messages, prompt, nothing"):
        perplexity_identity(model=uniform, given="all")


# entailment


def test_entailment_is_the_probability_of_entailment(nli: str) -> None:
    found = entailment(with_context("the sky is blue"), nli)
    assert found["reward"].to_list() == pytest.approx([0.5])
    assert detail(found)["sentences"] == [
        {
            "sentence": "the sky is blue.",
            "passage": 0,
            "entailment": pytest.approx(0.5),
            "contradiction": pytest.approx(0.25),
            "neutral": pytest.approx(0.25),
        }
    ]


def test_contradiction_takes_away_its_weight(nli: str) -> None:
    found = entailment(with_context("the sky is blue"), nli, contradiction_weight=2.0)
    assert found["reward"].to_list() == pytest.approx([0.0], abs=1e-6)  # 1/2 - 2 x 1/4


def test_entailment_combines_sentences_by_mean_or_minimum(tmp_path: Path) -> None:
    save_last_word_classifier(tmp_path / "nli", [{"red": math.log(3)}, {}], {0: "entailment", 1: "not_entailment"})
    rows = with_context("the sky", completion="the sky is red\nthe sky is blue")
    assert entailment(rows, str(tmp_path / "nli"))["reward"][0] == pytest.approx(0.625, abs=1e-5)  # 3/4 and 1/2
    assert entailment(rows, str(tmp_path / "nli"), combine="min")["reward"][0] == pytest.approx(0.5)


def test_a_sentence_is_held_against_the_passage_that_entails_it_most(tmp_path: Path) -> None:
    path = str(tmp_path / "nli")
    save_last_word_classifier(
        tmp_path / "nli", [{"blue": 4.0}, {}, {}], {0: "ENTAILMENT", 1: "x", 2: "y"}, looks_around=True
    )
    found = entailment(with_context(["red red", "blue blue", "green"], "red red", completion="the sky"), path)
    assert detail(found)["sentences"][0]["passage"] == 1
    assert found["reward"][0] > found["reward"][1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("context", [None, 7, [], ["", " "], [1]])
def test_entailment_is_null_without_a_context(nli: str, context: Any) -> None:
    found = entailment(with_context(context), nli)
    assert found["reward"].to_list() == [None]
    assert found["error"][0] == "the metadata has no context with a text or a list of texts"


def test_entailment_of_an_empty_answer_is_the_documented_value(nli: str) -> None:
    found = entailment(with_context("the sky", completion=" "), nli)
    assert (found["reward"][0], detail(found)) == (0.0, {"sentences": []})


def test_entailment_never_cuts_a_passage(nli: str) -> None:
    found = entailment(with_context("the sky " * 40, "the sky"), nli)
    assert found["reward"].to_list() == [None, pytest.approx(0.5)]
    assert "86 tokens together, the model reads 64" in found["error"][0]  # 80, <eos>, 5 of the sentence


def test_entailment_finds_the_context_under_another_key(nli: str) -> None:
    rows = answer_rows({"metadata": json.dumps({"source": "the sky"})})
    assert entailment(rows, nli, context_key="source")["reward"].to_list() == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("names", "labels", "roles"),
    [
        (NLI, None, {"entailment": 1, "contradiction": 0, "neutral": 2}),
        ({0: "ENTAILMENT", 1: "NOT_ENTAILMENT"}, None, {"entailment": 0}),
        ({0: "LABEL_0", 1: "LABEL_1"}, {"entailment": 1}, {"entailment": 1}),
    ],
)
def test_labels_are_read_by_name_or_given(names: Any, labels: Any, roles: Any) -> None:
    assert label_roles(names, labels, 0.0) == roles


@pytest.mark.parametrize(
    ("names", "labels", "weight"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, None, 0.0),
        ({0: "entailment", 1: "not_entailment"}, None, 1.0),
        ({0: "a", 1: "b"}, {"entailment": 2}, 0.0),
        ({0: "a", 1: "b"}, {"entailment": 0, "contradiction": 0}, 1.0),
        ({0: "a", 1: "b"}, {"entailed": 0}, 0.0),
    ],
)
def test_unclear_labels_are_refused(names: Any, labels: Any, weight: float) -> None:
    with pytest.raises(RewardError, match="give the argument labels"):
        label_roles(names, labels, weight)


# reward model


def test_the_reward_is_the_logit_of_the_conversation(reward_model: str) -> None:
    rows = answer_rows({"completion": "is red"}, {"completion": "the sky is blue"}, {"completion": "green"})
    found = preference_score(rows, reward_model)
    assert found["reward"].to_list() == pytest.approx([1.5, -2.0, 0.0], abs=1e-4)
    assert detail(found)["tokens"] == 8  # user : the sky assistant : is red


def test_the_logit_can_be_squashed(reward_model: str) -> None:
    found = preference_score(answer_rows({"completion": "blue"}, {"completion": "green"}), reward_model, squash=True)
    assert found["reward"].to_list() == pytest.approx([0.1192029, 0.5], abs=1e-4)


def test_without_chat_template_prompt_and_answer_are_a_pair(tmp_path: Path) -> None:
    save_last_word_reward_model(tmp_path / "rm", chat=False, scores={"red": 1.5})
    found = preference_score(answer_rows({"completion": "is red", "prompt": "the sky"}), str(tmp_path / "rm"))
    assert found["reward"].to_list() == pytest.approx([1.5], abs=1e-4)
    assert detail(found)["tokens"] == 5  # the sky <eos> is red


def test_an_empty_answer_is_scored_like_any_other(tmp_path: Path) -> None:
    save_constant_classifier(tmp_path / "rm", [0.75])
    assert preference_score(answer_rows({"completion": ""}), str(tmp_path / "rm"))["reward"].to_list() == [0.75]


def test_a_reward_model_without_padding_token_gets_the_tokenizers(tmp_path: Path) -> None:
    save_last_word_reward_model(tmp_path / "rm", chat=True, scores={"red": 1.5}, pad=None)
    rows = answer_rows({"completion": "red"}, {"completion": "the sky is red"})
    assert preference_score(rows, str(tmp_path / "rm"))["reward"].to_list() == pytest.approx([1.5, 1.5], abs=1e-4)


def test_a_conversation_over_the_context_is_null(reward_model: str) -> None:
    found = preference_score(answer_rows({"completion": "red " * 27}, {"completion": "red " * 26}), reward_model)
    assert found["reward"].to_list() == [None, pytest.approx(1.5, abs=1e-4)]
    assert "33 tokens, the model reads 1 to 32" in found["error"][0]


def test_classifiers_that_are_no_reward_models_are_refused(nli: str, uniform: str) -> None:
    with pytest.raises(RewardError, match="3 labels"):
        preference_score(answer_rows({}), nli)
    with pytest.raises(RewardError, match=r"lacks 1 weights of LlamaForSequenceClassification, such as score\.weight"):
        preference_score(answer_rows({}), uniform)


def test_no_rows_give_no_rewards(encoder: str, uniform: str, nli: str, reward_model: str) -> None:
    none = answer_rows({}).clear()
    for found in (
        embedding(none, encoder),
        perplexity(none, uniform),
        entailment(none, nli),
        preference_score(none, reward_model),
    ):
        assert found.shape == (0, 3)
