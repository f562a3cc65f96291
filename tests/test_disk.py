"""What a run will take of the disk: said before it begins, and refused where it cannot fit."""

import json
import math
import shutil
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import pytest

from flows.prepare import prepare
from flows.session import Session
from grpo.policy import num_parameters
from pipeline.errors import OutOfSpace
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from stages.checkpoints import read_layout
from stages.config import RunConfig, load_config
from stages.disk import DiskUse, disk_use, size
from stages.engines.scripted import ScriptedEngine
from tests.finished import answer
from tests.small_run import CONFIG, EXACT, perform_iteration
from tests.stores import ROWS

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def path(tmp_path: Path, tiny_policy: Path) -> Path:
    """Return the path of a config of 6 iterations."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(policy=tiny_policy, source=tmp_path / "rows.jsonl", iterations=6, function=EXACT))
    return path


def with_rules(config: RunConfig, **rules: int) -> RunConfig:
    return config.model_copy(update={"retention": RetentionConfig(**rules)})


def work(config: RunConfig, run: RunDir, until: int) -> None:
    with closing(Session(config, run, _engine=ScriptedEngine(answer))) as session:
        session.initial_policy()
        for iteration in range(until):
            perform_iteration(session, iteration)
            session.retain()


def on_disk(run: RunDir, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in run.root.rglob(pattern) if path.is_file())


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 0, num_bytes))


def test_policies_and_states_are_known_before_the_run_begins_and_rows_afterwards(path: Path, tmp_path: Path) -> None:
    config, run = load_config(path), RunDir(tmp_path / "run")
    before = disk_use(config, run)
    assert (before.now, before.num_policies, before.num_states) == (0, 6, 6)
    work(config, run, 2)
    during = disk_use(config, run)
    work(config, run, 6)
    after = disk_use(config, run)
    tensors = on_disk(run, "*.safetensors")
    # the headers of the files are not counted before there is one
    assert before.checkpoints == pytest.approx(tensors, rel=0.15)
    assert during.checkpoints == pytest.approx(tensors, rel=0.001)
    assert during.rows == pytest.approx(on_disk(run) - tensors, rel=0.06)
    assert before.rows == pytest.approx(on_disk(run) - tensors, rel=0.3)
    assert during.more == pytest.approx(on_disk(run) - during.now, rel=0.05)
    assert (after.now, after.more) == (on_disk(run), 0)


def test_under_retention_what_is_kept_counts_and_one_more_while_it_is_written(path: Path, tmp_path: Path) -> None:
    config, run = with_rules(load_config(path), keep_last=1, keep_every=4), RunDir(tmp_path / "run")
    work(config, run, 1)
    use = disk_use(config, run)
    pair = sum(on_disk(RunDir(run.place(0, name)), "*.safetensors") for name in ("policy", "optimizer"))
    initial = on_disk(RunDir(run.initial_policy), "*.safetensors")
    assert (use.num_policies, use.num_states) == (2, 2)  # the last, and that after 4
    assert use.checkpoints == 2 * pair + initial
    assert use.more == use.checkpoints + use.rows + pair - use.now
    assert disk_use(with_rules(config, keep_last=1), run).num_policies == 1


@pytest.mark.parametrize(
    ("rules", "policies", "states"),
    [
        ({"keep_last": 2}, 2, 2),
        ({"keep_last": 9}, 6, 6),
        ({"keep_last": 9, "states": "last"}, 6, 6),
        ({"keep_last": 1, "keep_best": 2}, 3, 3),
        ({"keep_last": 1, "keep_best": 9}, 3, 3),  # three policies are evaluated, one of them the last
        ({"keep_last": 1, "keep_every": 2, "states": "last"}, 3, 1),
    ],
)
def test_the_rules_decide_how_many_stay(
    path: Path, tmp_path: Path, rules: dict[str, int], policies: int, states: int
) -> None:
    config = with_rules(load_config(path, ["evaluate.every=2", "evaluate.held_out_share=0.5"]), **rules)
    use = disk_use(config, RunDir(tmp_path / "run"))
    assert (use.num_policies, use.num_states) == (policies, states)


def test_a_starter_and_a_fork_are_counted_before_they_exist(path: Path, tmp_path: Path) -> None:
    starter = ["policy.model=starter", "starter.hidden_size=128", "starter.steps=1"]
    use = disk_use(load_config(path, [*starter, "iterations=1"]), RunDir(tmp_path / "new"))
    # the demo's policy has 1,323,872 bytes with another vocabulary
    assert use.checkpoints == pytest.approx(4 * 1_323_872, rel=0.15)
    config, run = load_config(path), RunDir(tmp_path / "run")
    work(config, run, 1)
    tensors = on_disk(run, "iterations/*/*/*.safetensors")
    fork = load_config(path, ["iterations=1", f"policy.model={run.policy_before(1)}"])
    assert disk_use(fork, RunDir(tmp_path / "fork")).checkpoints == pytest.approx(2 * tensors, rel=0.15)


def test_the_weights_of_a_model_are_counted_from_its_configuration_alone(tiny_policy: Path) -> None:
    shapes = read_layout(tiny_policy)["weights"].values()
    assert num_parameters(json.loads((tiny_policy / "config.json").read_text())) == sum(map(math.prod, shapes))
    with pytest.raises(ValueError, match="could be code from elsewhere"):
        num_parameters({"model_type": "qwen2", "attn_implementation": "somebody/kernel"})


def test_a_model_of_unknown_size_is_said_and_its_rows_counted() -> None:
    use = DiskUse(0, 30, 30, None, 2_000_000, 2_000_000, 10**9, Path("/"))
    assert use.line() == (
        "disk: rows and tokenizers about 2 MB, 30 policies and 30 optimizer states whose size is not known before the "
        "model is loaded; 0 bytes are there, 1 GB are free"
    )


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = disk_use(load_config(path), RunDir(tmp_path / "run"))
    free(monkeypatch, whole.more - 1)
    with pytest.raises(OutOfSpace) as refused:
        prepare(path, str(tmp_path / "run"))
    assert str(refused.value).startswith(f"{tmp_path}/run takes up to {size(whole.more)} more than is there (about ")
    assert f": expected room for it on the device of {tmp_path}; keep fewer policies ([retention] kee" in str(
        refused.value
    )
    assert not (tmp_path / "run").exists()
    free(monkeypatch, whole.more)
    assert prepare(path, str(tmp_path / "run")).remarks == (
        disk_use(load_config(path), RunDir(tmp_path / "run")).line(),
    )
    free(monkeypatch, whole.more - 1)
    prepare(path, str(tmp_path / "run"), ["retention.keep_last=1"])
    free(monkeypatch, 1000)
    with pytest.raises(OutOfSpace, match=r"another device \(--run\), or keep fewer policies \(\[retention\]\)$"):
        prepare(path, str(tmp_path / "run"), ["retention.keep_last=1"])
    with pytest.raises(OutOfSpace, match=r"; make room, or name a directory on another device \(--run\)$"):
        prepare(path, str(tmp_path / "run"))


def test_a_finished_run_starts_again_on_a_full_device(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = load_config(path, ["iterations=1"]), RunDir(tmp_path / "run")
    run.record_config(path.read_text(), config.model_dump(mode="json"))
    work(config, run, 1)
    free(monkeypatch, 0)
    prepare(path, str(run.root), ["iterations=1"])
    with pytest.raises(OutOfSpace):
        prepare(path, str(run.root), ["iterations=2"])


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (5_950_000_000, "5.95 GB"), (10**16, "10,000 TB")],
)
def test_sizes_have_three_digits(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
