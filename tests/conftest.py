"""Fixtures of several files: a tiny policy with its tokenizer, finished runs, a scorer, an object store."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.run_dir import RunDir
from pipeline.stage import StageCall, run_stage
from stages import policy
from stages.config import RunConfig
from stages.rewards.scorer import Scorer
from tests.finished import finished_run
from tests.policies import save_tiny_policy
from tests.stores import ROWS, new_machine, s3_server, small_config, start
from tests.tiny_models import save_case_models

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; else a wrong name is looked up, many times


LONG = (
    "test_train",
    "test_flows",
    "test_working_copy",
    "test_verify_forgeries",
    "test_bad_input",
    "test_engine_vllm",
    "test_rescore",
)
"""Files that are begun first: processes that share them out then end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def own_sigterm() -> Iterator[None]:
    """Take back what a command, run in this process, has made of SIGTERM: later tests start children with it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run of two evaluated iterations; not to be changed. A file may have another one."""
    return finished_run(tmp_path_factory.mktemp("finished"), tiny_policy).root


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunDir:
    """Return a copy of the finished run."""
    shutil.copytree(original, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture(scope="session")
def case_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the paths of the tiny models of worked cases, by name; not to be changed."""
    return save_case_models(tmp_path_factory.mktemp("case_models"))


@pytest.fixture
def uniform(case_models: dict[str, str]) -> str:
    """Return a language model that gives each of its 14 tokens the same probability."""
    return case_models["uniform_lm"]


@pytest.fixture
def nli(case_models: dict[str, str]) -> str:
    """Return a classifier that says contradiction 1/4, entailment 1/2, neutral 1/4 of everything."""
    return case_models["constant_classifier"]


@pytest.fixture
def encoder(case_models: dict[str, str]) -> str:
    """Return an encoder that takes the mean of the vectors of red, green, blue and minus."""
    return case_models["word_encoder"]


@pytest.fixture
def reward_model(case_models: dict[str, str]) -> str:
    """Return a reward model whose logit is 1.5 after red, -2 after blue and else 0."""
    return case_models["reward_model"]


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    """Return a scorer with two workers."""
    scorer = Scorer(num_workers=2)
    yield scorer
    scorer.close()


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
