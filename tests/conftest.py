"""Fixtures that are dear to make: a tiny policy with its tokenizer."""

from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.stage import StageCall, run_stage
from stages import policy
from tests.policies import save_tiny_policy


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
    return run_stage(call, resources=tiny_policy).main
