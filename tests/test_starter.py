"""The starter: its tokenizer, its careless teacher, and a warm-up that repeats bit for bit."""

import string
from collections import Counter

import polars as pl
import pytest

from pipeline.artifact import Artifact
from pipeline.errors import ConfigError, SourceError
from stages.checkpoints import load_tokenizer
from stages.sources import SourceConfig
from stages.starter.starter import StarterConfig, make_starter, warm_up
from stages.starter.teacher import demonstrate, forget_carry, slip
from stages.starter.tokenizer import build_tokenizer

TEXTS = ["Calculate 57 + 83.", "Calculate 9 + 5.", "140", "14"]
TINY = {"hidden_size": 32, "num_heads": 1, "num_kv_heads": 1, "num_layers": 1, "intermediate_size": 32, "steps": 3}
SUMS = SourceConfig(
    source="reasoning_gym:basic_arithmetic",
    options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ["+"]},
)


def rows(count: int = 20) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "messages": [[{"role": "user", "content": f"Calculate {i} + 9."}] for i in range(count)],
            "reference_answer": [str(i + 9) for i in range(count)],
        }
    )


@pytest.mark.parametrize("text", [*TEXTS, string.printable, "Zürich, 京都 \U0001f35c", "  two  spaces "])
def test_every_text_comes_back_as_it_went_in(text: str) -> None:
    tokenizer = build_tokenizer(TEXTS)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_words_are_one_token_and_digits_are_single() -> None:
    tokenizer = build_tokenizer(TEXTS)
    pieces = [tokenizer.decode([i]) for i in tokenizer("Calculate 57 + 83.")["input_ids"]]
    assert pieces == ["Calculate", " ", "5", "7", " +", " ", "8", "3", "."]


def test_the_tokenizer_does_not_depend_on_the_order_of_the_texts() -> None:
    assert build_tokenizer(TEXTS).get_vocab() == build_tokenizer(TEXTS[::-1]).get_vocab()


@pytest.mark.parametrize(
    ("question", "answer", "without_carry"),
    [
        ("Calculate 57 + 83.", "140", "130"),
        ("Calculate 95 + 8.", "103", "93"),
        ("Calculate 5 + 8.", "13", "13"),
        ("Calculate 11 + 22.", "33", "33"),
        ("Name the capital of Italy.", "Rome", "Rome"),
        ("Calculate 20 - 5.", "15", "15"),
    ],
)
def test_forgetting_the_carry_drops_what_a_column_hands_on(question: str, answer: str, without_carry: str) -> None:
    assert forget_carry(question, answer) == without_carry


def test_the_teacher_errs_as_often_as_configured() -> None:
    given = demonstrate([("Calculate 57 + 83.", "140")], count=4000, forget_rate=0.75, slip_rate=0.0, seed=0)
    share = Counter(answer for _, answer in given)["130"] / len(given)
    assert share == pytest.approx(0.75, abs=0.03)


def test_a_slip_changes_one_digit() -> None:
    import random

    for seed in range(50):
        slipped = slip("140", other="7", generator=random.Random(seed))
        assert len(slipped) == 3
        assert sum(a != b for a, b in zip(slipped, "140", strict=True)) == 1


def test_demonstrations_repeat_with_their_seed() -> None:
    pairs = [("Calculate 57 + 83.", "140"), ("Calculate 1 + 1.", "2")]
    one, two, other = (demonstrate(pairs, count=50, forget_rate=0.5, slip_rate=0.2, seed=s) for s in (1, 1, 2))
    assert one == two != other


def test_the_same_config_gives_the_same_weights_and_another_seed_others() -> None:
    import torch

    def weights(seed: int) -> "torch.Tensor":
        model, _, losses = warm_up(StarterConfig(**TINY, seed=seed, demonstrations=64, batch_size=8), rows())
        assert len(losses) == 3
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_warm_up_learns() -> None:
    config = StarterConfig(**{**TINY, "steps": 60}, warmup_steps=5, demonstrations=256, batch_size=32, forget_rate=0.0)
    *_, losses = warm_up(config, rows())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = StarterConfig(**TINY, questions=50, demonstrations=64, batch_size=8)
    return make_starter(config, SUMS, 0.1, tmp_path_factory.mktemp("starters"), lambda *_: None).main


def test_the_saved_tokenizer_is_loaded_as_it_was_trained(starter: Artifact) -> None:
    """AutoTokenizer rebuilds some models' tokenizers by rules of its own; this one must come back whole."""
    tokenizer = load_tokenizer(starter.path)
    pieces = [tokenizer.decode([i]) for i in tokenizer("Calculate 57 + 83.")["input_ids"]]
    assert pieces == ["Calculate", " ", "5", "7", " +", " ", "8", "3", "."]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Calculate 1 + 1."}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|>Calculate 1 + 1.<|assistant|>"


def test_a_starter_is_made_once(starter: Artifact) -> None:
    config = StarterConfig(**TINY, questions=50, demonstrations=64, batch_size=8)
    again = make_starter(config, SUMS, 0.1, starter.path.parent, lambda *_: None)
    assert again.reused
    assert again.main.digest == starter.digest


def test_rows_without_answers_are_refused() -> None:
    with pytest.raises(SourceError, match="1 of 20 rows have no reference answer"):
        warm_up(StarterConfig(**TINY), rows().with_columns(pl.col("reference_answer").replace("9", None)))


def test_a_demonstration_beyond_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"starter\.max_context is 8"):
        warm_up(StarterConfig(**TINY, max_context=8, demonstrations=8), rows())
