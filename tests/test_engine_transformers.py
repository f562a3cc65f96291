"""TransformersEngine on a tiny random model: its sampling by hand, its log probabilities against one plain forward."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import EngineError, PolicyError
from stages.engines.base import EngineSettings, Generated, Request, Sampling
from stages.engines.transformers_engine import TransformersEngine, apply_filters, draw
from tests.policies import EOS, save_random_qwen2

VOCAB_SIZE = 83
SAMPLING = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(EOS,))


def make_policy(path: Path, *, seed: int, hidden_size: int = 32) -> Path:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": hidden_size, "intermediate_size": 64, "num_attention_heads": 4}
    return save_random_qwen2(
        path, seed=seed, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3, **sizes
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_engine(policy: Path, *, max_num_seqs: int = 8, max_model_len: int = 64) -> TransformersEngine:
    settings = EngineSettings(
        engine="transformers",
        dtype="float32",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_threads=1,
    )
    engine = TransformersEngine(settings)
    engine.load(policy)
    return engine


def make_requests(count: int = 20) -> list[Request]:
    """Prompts of 3 to 9 tokens, two requests each."""
    return [Request([3 + i // 2, *range(5, 7 + i % 7)], seed=1000 + i) for i in range(count)]


def forward_logprobs(policy: Path, request: Request, row: Generated, temperature: float) -> list[float]:
    """Return the log probabilities of the row's tokens from one forward of the whole sequence, no cache, no padding."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.tensor([request.prompt_token_ids + row.token_ids])).logits[0]
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)[len(request.prompt_token_ids) - 1 : -1]
    values: list[float] = logprobs_TV.gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0].tolist()
    return values


# one draw, by hand: probabilities 0.5, 0.3, 0.2


LOGITS_BV = torch.tensor([[0.5, 0.3, 0.2]]).log()


def draw_one(uniform: float, **options: float) -> tuple[int, float, float]:
    """Return token, probability and kept mass."""
    sampling = Sampling(**({"temperature": 1.0, "max_tokens": 1, "stop_token_ids": ()} | options))  # type: ignore[arg-type]
    token_B, logprob_B, kept_mass_B = draw(LOGITS_BV, torch.tensor([uniform], dtype=torch.float64), sampling)
    return int(token_B), math.exp(float(logprob_B)), float(kept_mass_B)


@pytest.mark.parametrize(
    ("uniform", "token", "probability"), [(0.0, 0, 0.5), (0.49, 0, 0.5), (0.51, 1, 0.3), (0.79, 1, 0.3), (0.81, 2, 0.2)]
)
def test_draw_inverts_the_cumulative_distribution(uniform: float, token: int, probability: float) -> None:
    assert draw_one(uniform) == pytest.approx((token, probability, 1.0))


def test_draw_divides_logits_by_the_temperature() -> None:
    # squares 0.25, 0.09, 0.04 of sum 0.38
    assert draw_one(0.7, temperature=0.5) == pytest.approx((1, 0.09 / 0.38, 1.0))


def test_greedy_takes_the_likeliest_and_its_probability_at_temperature_one() -> None:
    assert draw_one(0.99, temperature=0.0) == pytest.approx((0, 0.5, 1.0))


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.75}, {"min_p": 0.5}])
def test_truncation_renormalizes_what_is_left_and_reports_its_mass(options: dict[str, float]) -> None:
    # every one of the three cuts the last token: 0.8 is left, of which 0.3 is 3/8
    assert draw_one(0.99, **options) == pytest.approx((1, 0.375, 0.8))


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    # top-k leaves 0.625 and 0.375; top-p 0.6 is reached by the first alone, though it has only 0.5 of everything
    assert draw_one(0.99, top_k=2, top_p=0.6) == pytest.approx((0, 1.0, 0.5))


def test_filters_never_cut_the_likeliest_token() -> None:
    sampling = Sampling(1.0, max_tokens=1, stop_token_ids=(), top_p=1e-9, top_k=1, min_p=0.999)
    assert apply_filters(LOGITS_BV, sampling).isfinite().tolist() == [[True, False, False]]


def test_token_of_probability_zero_is_never_drawn() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    uniforms_B = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits_BV, uniforms_B, SAMPLING)[0].tolist() == [1, 3, 3]


# rows


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_one_plain_forward(policy: Path, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=24, stop_token_ids=(EOS,))
    requests = make_requests()
    rows = make_engine(policy).generate(requests, sampling, None)
    for request, row in zip(requests, rows, strict=True):
        assert row.logprobs == pytest.approx(forward_logprobs(policy, request, row, temperature), abs=1e-4)
        assert row.kept_mass is None


def test_kept_mass_turns_truncated_logprobs_into_full_ones(policy: Path) -> None:
    sampling = Sampling(temperature=0.8, max_tokens=24, stop_token_ids=(EOS,), top_p=0.7, top_k=20, min_p=0.01)
    requests = make_requests()
    rows = make_engine(policy).generate(requests, sampling, None)
    for request, row in zip(requests, rows, strict=True):
        assert row.kept_mass is not None
        full = [
            logprob + math.log(kept)
            for logprob, kept in zip(row.logprobs, row.kept_mass, strict=True)
            if logprob is not None
        ]
        assert full == pytest.approx(forward_logprobs(policy, request, row, 0.8), abs=1e-4)


def test_same_call_gives_the_same_bits_in_another_engine_and_after_other_calls(policy: Path) -> None:
    engine = make_engine(policy)
    first = engine.generate(make_requests(), SAMPLING, None)
    engine.generate(make_requests(5), Sampling(0.5, max_tokens=3, stop_token_ids=()), None)
    assert engine.generate(make_requests(), SAMPLING, None) == first
    assert make_engine(policy).generate(make_requests(), SAMPLING, None) == first


def test_row_depends_on_its_seed_and_not_on_its_batch(policy: Path) -> None:
    requests = make_requests()
    together = make_engine(policy, max_num_seqs=20).generate(requests, SAMPLING, None)
    apart = make_engine(policy, max_num_seqs=3).generate(requests[::-1], SAMPLING, None)[::-1]
    assert [row.token_ids for row in together] == [row.token_ids for row in apart]
    for one, other in zip(together, apart, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    # the two requests of a pair share the prompt and differ in the seed
    pairs = zip(make_requests(1) * 2, (1, 2), strict=True)
    one, other = make_engine(policy).generate([Request(r.prompt_token_ids, s) for r, s in pairs], SAMPLING, None)
    assert one.token_ids != other.token_ids


def test_rows_end_at_a_stop_token_at_max_tokens_or_at_the_context(policy: Path) -> None:
    stops = (EOS, 7, 8, 9)
    engine = make_engine(policy, max_model_len=20)
    requests = make_requests(40)
    rows = engine.generate(requests, Sampling(1.0, max_tokens=15, stop_token_ids=stops), None)
    seen = set()
    for request, row in zip(requests, rows, strict=True):
        room = min(15, 20 - len(request.prompt_token_ids))
        assert not set(row.token_ids[:-1]) & set(stops)
        is_stopped = row.token_ids[-1] in stops
        assert row.finish_reason == ("stop" if is_stopped else "length")
        assert row.stop_reason == (str(row.token_ids[-1]) if is_stopped else None)
        assert len(row.token_ids) == len(row.logprobs)
        assert is_stopped or len(row.token_ids) == room
        seen.add((row.finish_reason, room))
    assert {("stop", 15), ("length", 15), ("length", 11)} <= seen


def test_greedy_rows_follow_the_argmax(policy: Path) -> None:
    (row,) = make_engine(policy).generate([Request([5, 6, 7], seed=0)], Sampling(0.0, 10, ()), None)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    token_ids = [5, 6, 7]
    for _ in range(10):
        with torch.no_grad():
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    assert row.token_ids == token_ids[3:]


def test_draws_follow_the_models_distribution(policy: Path) -> None:
    prompt = [5, 6, 7]
    requests = [Request(prompt, seed=i) for i in range(4000)]
    rows = make_engine(policy, max_num_seqs=4000).generate(requests, Sampling(1.0, 1, ()), None)
    counts = torch.bincount(torch.tensor([row.token_ids[0] for row in rows]), minlength=VOCAB_SIZE)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1) * len(rows)
    deviations = (counts - expected) / expected.sqrt()
    assert deviations[expected > 5].abs().max() < 4


def test_load_exchanges_the_weights_and_takes_any_architecture(policy: Path, tmp_path: Path) -> None:
    engine = make_engine(policy)
    old = engine.generate(make_requests(4), SAMPLING, None)
    for other in (make_policy(tmp_path / "other", seed=1), make_policy(tmp_path / "wider", seed=1, hidden_size=64)):
        engine.load(other)
        requests = make_requests(4)
        rows = engine.generate(requests, SAMPLING, None)
        assert rows != old
        assert rows[0].logprobs == pytest.approx(forward_logprobs(other, requests[0], rows[0], 1.0), abs=1e-4)


def test_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=str(tmp_path)):
        make_engine(tmp_path)


def test_requests_outside_the_vocabulary_or_the_context_are_refused(policy: Path) -> None:
    engine = make_engine(policy)
    with pytest.raises(EngineError, match=f"expected 0 to {VOCAB_SIZE - 1}"):
        engine.generate([Request([VOCAB_SIZE], seed=0)], SAMPLING, None)
    with pytest.raises(EngineError, match="64 tokens: expected 1 to 63"):
        engine.generate([Request([5] * 64, seed=0)], SAMPLING, None)


def test_generate_without_a_policy_is_refused(policy: Path) -> None:
    engine = make_engine(policy)
    engine.close()
    with pytest.raises(EngineError, match="has no policy"):
        engine.generate(make_requests(1), SAMPLING, None)


def test_progress_counts_rows_and_tokens_to_the_end(policy: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = make_engine(policy).generate(make_requests(), SAMPLING, lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert seen[-1] == (20, sum(len(row.token_ids) for row in rows))


def test_no_requests_give_no_rows(policy: Path) -> None:
    assert make_engine(policy).generate([], SAMPLING, None) == []


def test_info_names_engine_and_mode(policy: Path) -> None:
    info = make_engine(policy).info
    assert (info.name, info.logprobs_mode) == ("transformers", "processed")
