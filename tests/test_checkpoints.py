"""What a checkpoint's directory says of itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.weight_files import WEIGHTS_INDEX
from pipeline.errors import PolicyError
from stages.checkpoints import read_header, read_layout, stated_stop_token_ids, stop_token_ids, weight_names


@pytest.fixture
def policy(tiny_policy: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny policy, to be changed."""
    return shutil.copytree(tiny_policy, tmp_path / "policy")


def test_weights_in_several_files_have_the_layout_of_one(tiny_policy: Path, policy: Path) -> None:
    tensors = load_file(policy / "model.safetensors")
    names = sorted(tensors)
    (policy / "model.safetensors").unlink()
    holders = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(holders.values()):
        save_file({name: tensors[name] for name in names if holders[name] == file}, policy / file)
    (policy / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": holders}))
    assert read_layout(policy) == read_layout(tiny_policy)


def test_the_optimizer_state_of_a_fork_is_no_weight() -> None:
    names = ["config.json", "model.safetensors", "optimizer/state.safetensors"]
    assert weight_names(names) == ["model.safetensors"]


@pytest.mark.parametrize("size", [4, 200, -1])
def test_a_cut_file_is_no_checkpoint(policy: Path, size: int) -> None:
    path = policy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PolicyError, match="is no safetensors file"):
        read_layout(policy)


def test_a_header_has_types_shapes_and_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors", metadata={"num_steps": "7"})
    header = read_header(tmp_path / "x.safetensors")
    assert (header.dtypes, header.shapes, header.metadata) == ({"a": "F32"}, {"a": [2, 3]}, {"num_steps": "7"})


def test_the_files_state_the_stop_tokens_that_the_tokenizer_has(tiny_policy: Path, policy: Path) -> None:
    assert stated_stop_token_ids(tiny_policy) == stop_token_ids(tiny_policy) == [1]
    (policy / "tokenizer.json").unlink()
    assert stated_stop_token_ids(policy) is None
