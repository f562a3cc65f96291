"""A real vLLM in its process, against transformers' forward of the same weights.

Three engines start side by side, once for the module: their start is the cost of these tests.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import EngineError
from stages.engines.base import EngineSettings, Generated, Request, Sampling
from stages.engines.process import EngineProcess
from tests.policies import EOS, save_random_qwen2

pytestmark = pytest.mark.vllm

VOCAB_SIZE = 83
SETTINGS = EngineSettings(
    engine="vllm",
    dtype="float32",
    max_model_len=256,
    max_num_seqs=16,
    num_threads=1,
    kv_cache_gib=0.004,  # 32 blocks of 128 tokens for these models: room for 16 short rows, not for 16 long ones
)
SAMPLING = Sampling(temperature=1.0, max_tokens=16, stop_token_ids=(EOS,))


@dataclass(frozen=True, slots=True)
class Engines:
    """Two engines of the same model, of which one starts with other weights, and one of another model."""

    tied: EngineProcess
    tied_later: EngineProcess
    untied: EngineProcess
    policies: dict[str, Path]
    """tied-0, tied-1, untied-0, untied-1"""
    logs: Path


def make_policy(path: Path, *, seed: int, is_tied: bool) -> Path:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    return save_random_qwen2(
        path, seed=seed, max_position_embeddings=256, tie_word_embeddings=is_tied, initializer_range=0.1, **sizes
    )


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    root = tmp_path_factory.mktemp("vllm")
    policies = {
        f"{kind}-{seed}": make_policy(root / f"{kind}-{seed}", seed=seed, is_tied=kind == "tied")
        for kind in ("tied", "untied")
        for seed in (0, 1)
    }
    started = {"tied": "tied-0", "tied_later": "tied-1", "untied": "untied-0"}
    processes = {name: EngineProcess(SETTINGS, root / f"{name}.log") for name in started}
    try:
        for name, policy in started.items():
            processes[name].start(policies[policy])
        yield Engines(**processes, policies=policies, logs=root)
    finally:
        for process in processes.values():
            process.close()


def make_requests(count: int = 48, length: int = 20) -> list[Request]:
    """Groups of four requests that share a prompt."""
    return [
        Request([3 + i // 4] + [5 + j % 60 for j in range(length - i // 4 % 8)], seed=10_000 + i) for i in range(count)
    ]


def forward_logprobs(policy: Path, requests: list[Request], rows: list[Generated], temperature: float) -> list[float]:
    """Return the log probabilities of all generated tokens, one after the other, from transformers' forward."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    values: list[float] = []
    for request, row in zip(requests, rows, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([request.prompt_token_ids + row.token_ids])).logits[0]
        logprobs_TV = (logits_TV / temperature).log_softmax(-1)[len(request.prompt_token_ids) - 1 : -1]
        values += logprobs_TV.gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0].tolist()
    return values


def flat_logprobs(rows: list[Generated]) -> list[float]:
    return [value for row in rows for value in row.logprobs if value is not None]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logprobs_equal_transformers_forward_at_the_start_and_after_each_reload(engines: Engines, kind: str) -> None:
    engine = engines.tied if kind == "tied" else engines.untied
    for seed in (0, 1, 0):
        policy = engines.policies[f"{kind}-{seed}"]
        engine.load(policy)
        requests = make_requests(16)
        rows = engine.generate(requests, SAMPLING, None)
        assert flat_logprobs(rows) == pytest.approx(forward_logprobs(policy, requests, rows, 1.0), abs=1e-4)


def test_processed_logprobs_include_the_temperature(engines: Engines) -> None:
    policy = engines.policies["tied-0"]
    engines.tied.load(policy)
    requests = make_requests()
    rows = engines.tied.generate(requests, Sampling(0.6, max_tokens=16, stop_token_ids=(EOS,)), None)
    pairs = zip(forward_logprobs(policy, requests, rows, 0.6), flat_logprobs(rows), strict=True)
    ratios = [math.exp(trainer - sampler) for trainer, sampler in pairs]
    assert len(ratios) > 300
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=1e-4)


def test_same_requests_give_the_same_bits_in_a_process_with_another_past(engines: Engines) -> None:
    policy = engines.policies["tied-1"]
    fresh = engines.tied_later.generate(make_requests(), SAMPLING, None)
    # this one began with other weights and has served other requests, some with the same prompts
    engines.tied.load(engines.policies["tied-0"])
    engines.tied.generate(make_requests(7), SAMPLING, None)
    engines.tied.load(policy)
    engines.tied.generate(make_requests(30, length=24), SAMPLING, None)
    assert engines.tied.generate(make_requests(), SAMPLING, None) == fresh
    assert engines.tied_later.generate(make_requests(), SAMPLING, None) == fresh


def test_rows_end_at_a_stop_token_or_at_max_tokens(engines: Engines) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=16, stop_token_ids=(7, 8, 9))
    rows = engines.tied_later.generate(make_requests(), sampling, None)
    for row in rows:
        assert not {7, 8, 9} & set(row.token_ids[:-1])
        if row.token_ids[-1] in {7, 8, 9}:
            assert (row.finish_reason, row.stop_reason) == ("stop", str(row.token_ids[-1]))
        else:
            assert (row.finish_reason, row.stop_reason, len(row.token_ids)) == ("length", None, 16)
        assert len(row.logprobs) == len(row.token_ids)
        assert row.kept_mass is None
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    # the model's own end-of-sequence token is a token like any other unless the caller names it
    assert any(EOS in row.token_ids[:-1] for row in rows)


def test_greedy_and_a_single_kept_token_agree(engines: Engines) -> None:
    requests = make_requests(12)
    greedy = engines.tied_later.generate(requests, Sampling(0.0, 16, (EOS,)), None)
    only_one = engines.tied_later.generate(requests, Sampling(1.0, 16, (EOS,), top_k=1), None)
    assert [row.token_ids for row in greedy] == [row.token_ids for row in only_one]
    assert set(flat_logprobs(only_one)) == {0.0}


def test_seed_decides_the_row(engines: Engines) -> None:
    requests = [Request([5, 6, 7], seed) for seed in (1, 2, 1)]
    one, other, again = engines.tied_later.generate(requests, SAMPLING, None)
    assert one.token_ids == again.token_ids != other.token_ids


def test_progress_ends_with_all_rows_and_tokens(engines: Engines) -> None:
    seen: list[tuple[int, int]] = []
    rows = engines.tied_later.generate(make_requests(), SAMPLING, lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert seen[-1] == (48, sum(len(row.token_ids) for row in rows))


def test_call_that_could_overflow_the_cache_is_refused_and_the_engine_goes_on(engines: Engines) -> None:
    long = [Request([5] * 100, seed=i) for i in range(16)]
    with pytest.raises(EngineError, match=r"can need 32: expected room for all; set resources\.kv_cache_gib to 0\.01"):
        engines.tied_later.generate(long, Sampling(1.0, 100, (EOS,)), None)
    with pytest.raises(EngineError, match=f"expected 0 to {VOCAB_SIZE - 1}"):
        engines.tied_later.generate([Request([VOCAB_SIZE], seed=0)], SAMPLING, None)
    assert len(engines.tied_later.generate(make_requests(3), SAMPLING, None)) == 3


def test_info_is_read_back_from_the_engine(engines: Engines) -> None:
    info = engines.tied_later.info
    assert (info.name, info.version, info.logprobs_mode, info.device) == ("vllm", "0.32.0", "processed", "cpu")


def test_vllm_writes_nothing_to_the_terminal(engines: Engines, capfd: pytest.CaptureFixture[str]) -> None:
    engines.tied_later.generate(make_requests(2), SAMPLING, None)
    assert capfd.readouterr() == ("", "")
    assert "Traceback" not in (engines.logs / "tied_later.log").read_text(encoding="utf-8")
