"""Tests of grpo.policy: checkpoints in, checkpoints out, and a model whose forward is a function of its weights."""

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config

from grpo.logprobs import token_logprobs
from grpo.policy import POLICY_FILES, load_policy, save_policy

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait

INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any connection: a local checkpoint must not need one."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a test of a local checkpoint opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def tiny(model_type: str, **options: Any) -> PreTrainedModel:
    """Return a small random model."""
    torch.manual_seed(7)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(model_type, **options))
    return model


def tiny_qwen2(**options: Any) -> PreTrainedModel:
    """Return a small random Qwen2."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return tiny("qwen2", **sizes | options)


def tiny_gpt2(dropout: float) -> PreTrainedModel:
    """Return a small random GPT-2, whose layers hold dropout modules."""
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return tiny("gpt2", **sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)


def tiny_opt(dropout: float) -> PreTrainedModel:
    """Return a small random OPT, whose layers apply dropout themselves."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny("opt", **sizes, **layers, dropout=dropout, attention_dropout=dropout)


def hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file of a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def logprobs(model: PreTrainedModel) -> Tensor:
    """Return the logprobs of the fixture's tokens."""
    target = INPUT_IDS[0, 1:]
    return token_logprobs(model, INPUT_IDS, torch.arange(5), target, torch.ones(5), chunk_tokens=8)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_weights_are_saved_as_the_same_bytes(tmp_path: Path, tied: bool) -> None:
    save_policy(tiny_qwen2(tie_word_embeddings=tied), tmp_path / "first")
    save_policy(tiny_qwen2(tie_word_embeddings=tied), tmp_path / "second")
    save_policy(load_policy(tmp_path / "first"), tmp_path / "third")
    assert tuple(hashes(tmp_path / "first")) == POLICY_FILES
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second") == hashes(tmp_path / "third")


def test_a_saved_policy_loads_in_transformers_as_it_stands(tmp_path: Path) -> None:
    model: Any = tiny_qwen2()
    model.eval()
    save_policy(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_a_tied_head_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    save_policy(tiny_qwen2(tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model: Any = load_policy(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_loaded_weights_can_be_trained_while_the_file_is_gone(tmp_path: Path) -> None:
    save_policy(tiny_qwen2(), tmp_path)
    before = hashes(tmp_path)
    model = load_policy(tmp_path)
    for parameter in model.parameters():
        assert parameter.data_ptr() % 64 == 0
        parameter.data += 1
    assert hashes(tmp_path) == before


def test_saving_and_loading_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_policy(tiny_qwen2(), tmp_path)
    load_policy(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_dropout_is_off(tmp_path: Path) -> None:
    save_policy(tiny_gpt2(dropout=0.5), tmp_path)
    model = load_policy(tmp_path)
    assert torch.equal(logprobs(model), logprobs(model))


def test_another_dtype_is_honoured(tmp_path: Path) -> None:
    save_policy(tiny_qwen2(), tmp_path)
    assert {p.dtype for p in load_policy(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_gradient_checkpointing_recomputes_layers_and_keeps_dropout_off(tmp_path: Path, name: str) -> None:
    save_policy(tiny_gpt2(dropout=0.5) if name == "gpt2" else tiny_opt(dropout=0.5), tmp_path)
    calls, found = {}, {}
    for checkpointing in (False, True):
        model: Any = load_policy(tmp_path, gradient_checkpointing=checkpointing)
        layers = model.transformer.h if name == "gpt2" else model.model.decoder.layers
        seen: list[int] = []
        next(iter(layers[0].children())).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        torch.autograd.backward(logprobs(model).sum())
        calls[checkpointing] = len(seen)
        found[checkpointing] = [parameter.grad for parameter in model.parameters()]
    assert calls == {False: 1, True: 2}
    for plain, again in zip(found[False], found[True], strict=True):
        assert plain is not None
        assert torch.equal(plain, again)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a directory: expected .*correct the path"):
        load_policy(tmp_path / "nowhere")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json: expected"):
        load_policy(str(tmp_path))


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a t5 model: expected a causal language model"):
        load_policy(tmp_path)


def test_a_model_type_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ValueError, match=r"no usable configuration .*abacus"):
        load_policy(tmp_path)


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_qwen2().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no model.safetensors and no .*pickled ones are not read"):
        load_policy(tmp_path)


def test_a_damaged_weight_file_is_refused(tmp_path: Path) -> None:
    save_policy(tiny_qwen2(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="weights that cannot be read"):
        load_policy(tmp_path)


def test_a_missing_weight_is_refused_instead_of_starting_at_random(tmp_path: Path) -> None:
    save_policy(tiny_qwen2(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*model.norm.weight: expected all"):
        load_policy(tmp_path)


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    save_policy(tiny_qwen2(), tmp_path)
    tiny_qwen2(vocab_size=50).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights that cannot be read"):
        load_policy(tmp_path)
