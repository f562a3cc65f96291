"""The optimizer's state: an artifact of its own that may come late or be lost, and is then made again from batches."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from flows.commands.fork import fork_tables
from flows.session import Session
from grpo.settings import UpdateConfig
from pipeline.artifact import Artifact, open_artifact
from pipeline.config import validate
from pipeline.errors import ArtifactMissing, PolicyError
from pipeline.manifest import STORE_NOTE, Manifest, is_finished
from pipeline.object_store import open_store
from pipeline.prune import prunable, prune
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from pipeline.runs import lock, open_run
from pipeline.stage import StageCall, run_stage
from stages import policy
from stages.checkpoints import copy_tokenizer
from stages.config import RunConfig, recorded_config
from stages.engines.scripted import ScriptedEngine
from stages.inspect.verify.verify import verify_run
from stages.policy import PolicyConfig
from stages.preflight import preflight
from stages.trainers.local import LocalTrainer
from stages.trainers.resume import check_equal, resume
from tests.finished import answer, finished_run
from tests.manifests import fix_hashes, manifest_of
from tests.stores import new_machine, objects, start

STATE = "state.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunDir:
    """Return a finished run of two iterations, whose learning rate falls; not to be changed."""
    schedule = 'schedule = "linear"\ntotal_steps = 9\n'
    return finished_run(tmp_path_factory.mktemp("state"), tiny_policy, update=schedule)


@pytest.fixture
def run(original: RunDir, tmp_path: Path) -> RunDir:
    """Return a copy of the finished run."""
    shutil.copytree(original.root, tmp_path / "run")
    return RunDir(tmp_path / "run")


def forget(run: RunDir, iteration: int, *datasets: str) -> None:
    for name in datasets:
        shutil.rmtree(run.place(iteration, name))


def session_of(run: RunDir) -> Session:
    return Session(recorded_config(run), run, _engine=ScriptedEngine(answer))


def test_a_policy_holds_no_optimizer_and_a_state_names_its_policy(original: RunDir) -> None:
    policy, state = original.open(1, "policy"), original.open(1, "optimizer")
    assert [name for name in policy.manifest.files if name.endswith(".safetensors")] == ["model.safetensors"]
    assert (list(state.manifest.files), state.manifest.rows) == ([STATE], None)
    assert {name: facts["digest"] for name, facts in state.manifest.inputs.items()} == {"policy": policy.digest}


def test_a_state_that_was_lost_is_made_again_to_the_bit(original: RunDir, run: RunDir) -> None:
    forget(run, 1, "optimizer")
    with closing(session_of(run)) as session:
        session.perform("optimizer", 1)
    assert run.open(1, "optimizer").digest == original.open(1, "optimizer").digest


def test_without_any_state_training_starts_again_from_the_initial_policy(original: RunDir, run: RunDir) -> None:
    forget(run, 0, "optimizer")
    forget(run, 1, "optimizer", "policy", "training_records", "optimizer_steps")
    with closing(session_of(run)) as session:
        session.perform("update", 1)
        session.perform("optimizer", 1)
    assert not is_finished(run.place(0, "optimizer"))
    for dataset in ("policy", "optimizer", "training_records", "optimizer_steps"):
        assert run.open(1, dataset).digest == original.open(1, dataset).digest


def test_the_moments_matter(original: RunDir, run: RunDir) -> None:
    """An update that began with a new optimizer would give other weights: the tests above would notice."""
    forget(run, 1, "optimizer", "policy", "training_records", "optimizer_steps")
    with closing(session_of(run)) as session:
        session.trainer_after(1).load(open_artifact(run.policy_before(1)), None, session.config.update)
        session.perform("update", 1)
    assert run.open(1, "policy").digest != original.open(1, "policy").digest


def test_other_weights_than_those_stored_are_refused(run: RunDir) -> None:
    """As another machine's rounding would give them: here the stored ones are replaced."""
    forget(run, 1, "optimizer")
    shutil.copyfile(run.policy_before(1) / "model.safetensors", run.policy_before(2) / "model.safetensors")
    fix_hashes(run.policy_before(2))
    with closing(session_of(run)) as session, pytest.raises(PolicyError, match="gives other weights than those stored"):
        session.perform("optimizer", 1)
    assert not run.place(1, "optimizer").exists()


def test_a_state_of_another_policy_is_not_taken_for_one(original: RunDir, run: RunDir, tmp_path: Path) -> None:
    """As when a policy was deleted and made anew elsewhere, and the old state stayed beside it."""
    forget(run, 1, "optimizer", "policy", "training_records", "optimizer_steps")
    shutil.rmtree(run.place(0, "optimizer"))
    shutil.copytree(original.place(1, "optimizer"), run.place(0, "optimizer"))
    with pytest.raises(ArtifactMissing, match="is not the optimizer's state that belongs to"):
        fork_tables(open_run(run.root), 1, rewards_only(), None, [])
    with closing(session_of(run)) as session:
        session.perform("update", 1)
        session.perform("optimizer", 0)
    assert run.open(1, "policy").digest == original.open(1, "policy").digest
    assert run.open(0, "optimizer").digest == original.open(0, "optimizer").digest


def test_a_pruning_that_was_killed_between_state_and_weights_leaves_a_way(original: RunDir, run: RunDir) -> None:
    next(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    forget(run, 1, "optimizer")
    with closing(session_of(run)) as session:
        session.perform("optimizer", 1)
    assert run.open(1, "optimizer").digest == original.open(1, "optimizer").digest


def test_weights_that_are_pruned_are_missed_before_anything_is_trained_again(run: RunDir) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    notes: list[str] = []
    with pytest.raises(ArtifactMissing, match="was dropped by `grpo prune`"):
        resume(LocalTrainer(), run, recorded_config(run).update, 1, notes.append)
    assert notes == []


def test_weights_are_compared_as_they_are_stored(tmp_path: Path, tiny_policy: Path) -> None:
    """A mixture of experts holds in one tensor what its file holds in several."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 2}
    config = Qwen3MoeConfig(vocab_size=64, num_experts_per_tok=1, **sizes, **heads)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    made = policy_of(model, tiny_policy, tmp_path / "made")
    next(model.parameters()).data[0, 0] += 1.0
    other = policy_of(model, tiny_policy, tmp_path / "other")
    trainer = LocalTrainer()
    trainer.load(made, None, UpdateConfig(num_threads=1))
    check_equal(trainer, made, 0)
    assert trainer.is_at(made)
    with pytest.raises(PolicyError, match="gives other weights than those stored"):
        check_equal(trainer, other, 0)
    assert not trainer.is_at(other)


def policy_of(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Artifact:
    """Return the artifact of a model, made as that of a run's initial policy."""
    model.save_pretrained(folder / "model")
    copy_tokenizer(tokenizer, folder / "model")
    call = StageCall(policy.STAGE, PolicyConfig(model="local files"), {}, {"policy": folder / "policy"})
    return run_stage(call, folder / "model").main


def test_a_trainer_is_at_a_policy_of_its_own_weights_and_recipe_alone(run: RunDir, tmp_path: Path) -> None:
    before, after = (open_artifact(run.policy_before(n)) for n in (0, 1))
    trainer, config = LocalTrainer(), recorded_config(run).update
    assert not trainer.is_at(before)
    trainer.load(before, None, config)
    assert (trainer.is_at(before), trainer.is_at(after)) == (True, False)
    trainer.train(run.open(0, "batches"), None, config)
    assert (trainer.is_at(before), trainer.is_at(after)) == (False, False)
    (tmp_path / "saved").mkdir()
    trainer.save_policy(tmp_path / "saved", after.manifest.recipe)
    assert (trainer.is_at(before), trainer.is_at(after)) == (False, True)
    # of the same recipe on a machine that rounds otherwise; and with the same weights, but trained with other settings
    for name in ("files", "recipe"):
        manifest = manifest_of(after.path)
        if name == "files":
            manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
        else:
            manifest["recipe"] = "0" * 64
        assert not trainer.is_at(Artifact(after.path, Manifest(**manifest)))
    trainer.close()
    assert not trainer.is_at(after)


def test_a_pruned_state_is_not_taken_for_one(run: RunDir) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    forget(run, 1, "optimizer")
    with closing(session_of(run)) as session:
        session.perform("optimizer", 1)
    assert is_finished(run.place(1, "optimizer"))


def test_a_state_whose_file_is_gone_is_none(original: RunDir, run: RunDir) -> None:
    forget(run, 1, "optimizer", "policy", "training_records", "optimizer_steps")
    (run.place(0, "optimizer") / STATE).unlink()
    with closing(session_of(run)) as session:
        session.perform("update", 1)
    assert run.open(1, "policy").digest == original.open(1, "policy").digest


def rewards_only() -> dict[str, object]:
    return {"score": {"rewards": [{"name": "exact", "function": "stages.rewards.answers.matching:exact_match"}]}}


def test_a_fork_wants_the_state_or_the_word_that_none_is_wanted(run: RunDir, tmp_path: Path) -> None:
    forget(run, 0, "optimizer")
    with pytest.raises(ArtifactMissing, match=r"is not the optimizer's state .*policy\.keep_optimizer = false"):
        fork_tables(open_run(run.root), 1, rewards_only(), None, [])
    wish = ["policy.keep_optimizer=false"]
    settings = validate(RunConfig, fork_tables(open_run(run.root), 1, rewards_only(), None, wish), "fork")
    fork = RunDir(tmp_path / "fork")
    with closing(Session(settings, fork)) as session:
        session.initial_policy()
    assert not (fork.initial_policy / "optimizer").exists()


def test_a_fork_decides_for_itself_whether_it_keeps_the_state(run: RunDir, tmp_path: Path) -> None:
    settings = run.settings()
    settings["policy"]["keep_optimizer"] = False  # as the run itself began
    run.resolved_config.write_text(json.dumps(settings))
    assert set(fork_tables(open_run(run.root), 1, rewards_only(), 0, [])["policy"]) == {"model"}  # type: ignore[call-overload]


def test_a_fork_of_a_run_on_a_store_brings_weights_and_state(
    base: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(f"{base}/runs/demo", config, iterations=1)
    new_machine(tmp_path / "other", monkeypatch)
    source = open_run(f"{base}/runs/demo")
    settings = validate(RunConfig, fork_tables(source, 1, rewards_only(), None, []), "fork")
    fork = RunDir(tmp_path / "fork")
    with closing(Session(settings, fork)) as session:
        session.initial_policy()
    files = open_artifact(fork.initial_policy).manifest.files
    assert files["optimizer/state.safetensors"] == source.open(0, "optimizer").manifest.files[STATE]
    assert files["model.safetensors"] == source.open(0, "policy").manifest.files["model.safetensors"]


@pytest.mark.parametrize("loss", ["state", "weights", "run"])
def test_a_fork_goes_on_without_the_run_that_it_came_from(run: RunDir, tmp_path: Path, loss: str) -> None:
    settings = validate(RunConfig, fork_tables(open_run(run.root), 1, rewards_only(), 0, []), "fork")
    fork = RunDir(tmp_path / "fork")
    preflight(settings, fork)
    with closing(Session(settings, fork)) as session:
        session.initial_policy()
    before = open_artifact(fork.initial_policy).digest
    if loss == "state":
        forget(run, 0, "optimizer")
    elif loss == "weights":
        list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    else:
        shutil.move(run.root, tmp_path / "elsewhere")
    preflight(settings, fork)
    with closing(Session(settings, fork)) as session:
        session.initial_policy()
    assert open_artifact(fork.initial_policy).digest == before


def test_a_new_fork_wants_what_it_begins_with(run: RunDir, tmp_path: Path) -> None:
    settings = validate(RunConfig, fork_tables(open_run(run.root), 1, rewards_only(), 0, []), "fork")
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    with pytest.raises((ArtifactMissing, PolicyError)):
        preflight(settings, RunDir(tmp_path / "fork"))


def test_a_fork_of_a_fork_at_its_beginning_keeps_the_state(run: RunDir, tmp_path: Path) -> None:
    source = run
    for name, at in (("fork", 1), ("second", 0)):
        settings = validate(RunConfig, fork_tables(open_run(source.root), at, rewards_only(), 0, []), "fork")
        source = RunDir(tmp_path / name)
        source.record_config("", settings.model_dump(mode="json"))
        with closing(Session(settings, source)) as session:
            session.initial_policy()
    files = open_artifact(source.initial_policy).manifest.files
    assert files["optimizer/state.safetensors"] == run.open(0, "optimizer").manifest.files[STATE]


def test_a_state_of_another_policy_is_not_published(base: str, config: RunConfig) -> None:
    """As of a machine that was cut off while another one made the policy anew."""
    run = start(f"{base}/demo", config)
    place = run.place(0, "optimizer")
    manifest = manifest_of(place)
    manifest["inputs"]["policy"]["digest"] = "0" * 64
    fix_hashes(place, manifest)
    (place / STORE_NOTE).unlink()
    open_store(f"{base}/demo/iterations/000000/optimizer").remove(["manifest.json", STATE])
    with lock(run):
        pass
    assert [name for name in objects(f"{base}/demo") if "/optimizer/" in name] == []


def test_a_group_member_from_a_run_brings_no_optimizer(run: RunDir, tmp_path: Path) -> None:
    config = recorded_config(run).model_dump(mode="json")
    members = [
        {"name": "now", "policy": "current", "count": 2},
        {"name": "sibling", "policy": str(run.policy_before(1)), "count": 2},
    ]
    config["generate"] |= {"members": members, "group_size": None}
    settings = validate(RunConfig, config, "members")
    new = RunDir(tmp_path / "new")
    with closing(Session(settings, new)) as session:
        session.member_policy("sibling")
    assert not (new.member("sibling") / "optimizer").exists()


def test_a_state_with_other_steps_or_tensors_than_the_one_before_is_found(run: RunDir) -> None:
    place = run.place(1, "optimizer")
    tensors = load_file(place / "state.safetensors")
    save_file(tensors, place / "state.safetensors", metadata={"num_steps": "99"})
    fix_hashes(place)
    (problem,) = verify_run(run).problems
    assert (problem.check, problem.where.path) == ("policies", "iterations/000001/optimizer")
    assert problem.found == "99 steps taken, expected 1 and the 1 of this iteration"
    tensors.popitem()
    save_file(tensors, place / "state.safetensors", metadata={"num_steps": "2"})
    fix_hashes(place)
    (problem,) = verify_run(run).problems
    assert "names, types or shapes of tensors differ from iterations/000000/optimizer" in problem.found


@pytest.mark.parametrize("header", [b"[]", b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', b"{"])
def test_a_state_that_is_none_is_found(run: RunDir, header: bytes) -> None:
    place = run.place(1, "optimizer")
    (place / STATE).write_bytes(len(header).to_bytes(8, "little") + header)
    fix_hashes(place)
    (problem,) = verify_run(run).problems
    assert problem.found.startswith("its tensors cannot be read: ")
