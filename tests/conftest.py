"""Fixtures that are dear to make: a tiny policy with its tokenizer, an object store, a run to put there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.run_dir import RunDir
from pipeline.stage import StageCall, run_stage
from stages import policy
from stages.config import RunConfig
from tests.policies import save_tiny_policy
from tests.stores import ROWS, new_machine, s3_server, small_config, start

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; else a wrong name is looked up, many times


LONG = ("test_train", "test_working_copy", "test_verify", "test_bad_input", "test_engine_vllm", "test_rescore")
"""Files that are begun first: processes that share them out then end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a random Qwen2 checkpoint with tokenizer; not to be changed."""
    path = tmp_path_factory.mktemp("policies") / "tiny"
    save_tiny_policy(path)
    return path


@pytest.fixture(scope="session")
def tiny_artifact(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return the policy artifact of the tiny policy; not to be changed."""
    place = tmp_path_factory.mktemp("artifacts") / "policy"
    call = StageCall(policy.STAGE, policy.PolicyConfig(model="local files"), {}, {"policy": place})
    return run_stage(call, tiny_policy).main


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """Offer an S3 server to this process."""
    with s3_server():
        yield


@pytest.fixture(params=["memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty place; this machine is new to it."""
    if request.param == "s3":
        request.getfixturevalue("server")
    new_machine(tmp_path / "work", monkeypatch)
    return f"{request.param}://bucket/{tmp_path.parent.name}/{tmp_path.name}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunConfig:
    """Return the config of a small run, for stores or directories."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "rows.jsonl").write_text(ROWS)
    return small_config(folder, str(tiny_policy), str(folder / "rows.jsonl"))


@pytest.fixture(scope="module")
def local(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a local run of two iterations; not to be changed."""
    return start(tmp_path_factory.mktemp("runs") / "local", config, iterations=2)
