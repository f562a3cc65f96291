"""The plan of a run is what the run then does."""

import shutil
from pathlib import Path

import pytest

from flows.commands.fork import fork_tables
from flows.commands.plan import other_ways
from flows.planning.estimate import Estimator
from flows.planning.plan import make_plan
from flows.planning.planned import Reason, Verdict
from flows.rescoring import rescore_run
from pipeline.artifact import open_artifact
from pipeline.config import load_toml, validate
from pipeline.errors import ArtifactMissing, GrpoError, RecipeMismatch
from pipeline.prune import has_weights, prunable, prune
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from pipeline.runs import lock
from stages.config import config_class, load_config
from tests.planned_run import Recorder, check_equal, digests, drop, places, planned, reasons, train
from tests.small_run import make_small_run

CHAIN_OF_ITERATION = ("prompts", "generate", "score", "normalize", "batch", "update", "optimizer")


@pytest.fixture
def config(original: Path) -> Path:
    """Return the config of the finished run."""
    return original.parent.parent / "run.toml"


def test_a_fresh_run_computes_everything(config: Path, tmp_path: Path) -> None:
    settings, run = load_config(config), RunDir(tmp_path / "runs" / "new")
    run.root.parent.mkdir()
    plan = planned(settings, run)
    assert not places(plan, Verdict.reuse)
    found = reasons(plan, Verdict.compute)
    assert found["policy None"] == "not stored"
    assert found["prompts None"] == "input policy will be computed"
    assert found["evaluate -1"] == "inputs prompts, policy will be computed"
    assert found["generate 1"] == "inputs prompts, policy:current will be computed"
    check_equal(plan, train(settings, run))


def test_a_finished_run_computes_nothing(config: Path, run: RunDir) -> None:
    settings, before = load_config(config), digests(run)
    plan = planned(settings, run)
    assert not places(plan, Verdict.compute)
    assert places(plan, Verdict.reuse) == set(before)
    assert plan.totals()[Verdict.reuse].seconds == 0
    check_equal(plan, train(settings, run))
    assert digests(run) == before


def test_a_killed_run_goes_on_where_it_stopped(config: Path, run: RunDir) -> None:
    settings, before = load_config(config), digests(run)
    drop(run, 1, "rewards", "advantages", "batches", "training_records", "optimizer_steps", "policy", "optimizer")
    drop(run, 1, "evaluations")
    plan = planned(settings, run)
    found = reasons(plan, Verdict.compute)
    assert found == {
        "score 1": "not stored",
        "normalize 1": "input rewards will be computed",
        "batch 1": "input advantages will be computed",
        "update 1": "input batches will be computed",
        "optimizer 1": "input policy will be computed",
        "evaluate 1": "input policy will be computed",
    }
    check_equal(plan, train(settings, run))
    assert digests(run) == before


def test_a_lost_optimizer_state_is_made_again_from_stored_batches(config: Path, run: RunDir) -> None:
    settings = load_config(config)
    drop(run, 0, "optimizer")
    drop(run, 1, "optimizer")
    plan = planned(settings, run)
    assert reasons(plan, Verdict.compute) == {
        "optimizer 1": "not stored; the stored batches of iterations 0 to 1 are trained on again for it"
    }
    cost = next(cost for item, cost in plan.artifacts if item.verdict is Verdict.compute)
    assert cost.seconds is None  # no state is there that says what one takes
    done = train(settings, run)
    check_equal(plan, done)
    assert done.notes == ["no state of the optimizer after 2 updates: training again from that after 0"]


def test_training_again_costs_what_the_updates_took(config: Path, run: RunDir, original: Path) -> None:
    drop(run, 0, "optimizer")
    drop(run, 1, "optimizer")
    plan = make_plan(load_config(config), run, Estimator([run, RunDir(original)]))
    update = [open_artifact(run.place(index, "policy")).manifest.seconds for index in range(2)]
    states = [open_artifact(RunDir(original).place(index, "optimizer")).manifest for index in range(2)]
    cost = next(cost for item, cost in plan.artifacts if item.verdict is Verdict.compute)
    assert cost.seconds == pytest.approx(sum(update) + sum(state.seconds for state in states) / 2)
    assert cost.num_bytes == sum(facts["bytes"] for facts in states[1].files.values())


def test_a_changed_reward_is_refused_and_the_stored_completions_are_offered(
    config: Path, run: RunDir, tmp_path: Path
) -> None:
    own = tmp_path / "terse.toml"
    own.write_text(config.read_text().replace("answers.matching:exact_match", "answers.matching:token_f1"))
    settings = load_config(own)
    plan = planned(settings, run)
    with pytest.raises(RecipeMismatch) as refused:
        train(settings, run)
    assert plan.refusals[0] == str(refused.value)
    assert "other versions of the reward functions ['exact']" in plan.refusals[0]
    found = reasons(plan, Verdict.refuse)
    assert found["score 0"] == "score.reward_recipes differs in exact"
    assert "generate 0" not in found
    assert found["generate 1"] == "stored, but input policy:current is refused"
    ways = other_ways(own, settings, run, load_toml(own), [], Estimator([run]))
    assert [way.command.split()[1] for way in ways] == ["run", "rescore", "fork"]
    assert ways[1].total.seconds < ways[2].total.seconds < ways[0].total.seconds
    recorder = Recorder()
    rescored = rescore_run(run, load_toml(own), RunDir(tmp_path / "rescored"), None, [], recorder)
    assert len(recorder.computed) == ways[1].total.artifacts == 2 * len(rescored.iterations)
    tables = fork_tables(run, 0, load_toml(own), None, [])
    forked = train(validate(config_class(), tables, "fork"), RunDir(tmp_path / "run-terse-0"))
    assert len(forked.computed) == ways[2].total.artifacts


def test_another_seed_is_refused_and_a_new_directory_computes_everything(
    config: Path, run: RunDir, tmp_path: Path
) -> None:
    settings = load_config(config, ["seed=7"])
    plan = planned(settings, run)
    with pytest.raises(RecipeMismatch) as refused:
        train(settings, run)
    assert plan.refusals[0] == str(refused.value)
    assert not places(plan, Verdict.compute)
    assert reasons(plan, Verdict.refuse)["prompts 0"] == "prompts.seed was 0, now 7"
    ways = other_ways(config, settings, run, load_toml(config), ["seed=7"], Estimator([run]))
    assert [way.command.split()[1] for way in ways] == ["run"]
    new = RunDir(Path(f"{run.root}-new"))
    done = train(settings, new)
    assert len(done.computed) == ways[0].total.artifacts
    check_equal(make_plan(settings, new, Estimator([])), Recorder())


def test_more_iterations_are_computed_after_the_stored_ones(config: Path, run: RunDir) -> None:
    settings = load_config(config, ["iterations=4"])
    plan = planned(settings, run)
    found = reasons(plan, Verdict.compute)
    steps = [f"{step} {index}" for index in (2, 3) for step in CHAIN_OF_ITERATION]
    assert sorted(found) == sorted([*steps, "evaluate 3"])
    assert found["prompts 2"] == "not stored"
    assert found["generate 2"] == "input prompts will be computed"
    check_equal(plan, train(settings, run))


def test_a_fork_trains_on_what_it_refers_to(config: Path, run: RunDir, tmp_path: Path) -> None:
    own = {"normalize": {"eps": 0.5}}
    tables = fork_tables(run, 1, own, None, [])
    settings, place = validate(config_class(), tables, "fork"), RunDir(tmp_path / "runs" / "fork")
    place.root.parent.mkdir()
    plan = planned(settings, place)
    found = {item.reason: item for item, _ in plan.artifacts}
    assert found[Reason.referred].verdict is Verdict.reuse
    assert {item.step for item, _ in plan.artifacts if item.reason is Reason.referred} == {"prompts", "generate"}
    check_equal(plan, train(settings, place))
    check_equal(planned(settings, place), train(settings, place))


def test_offline_iterations_are_not_generated(config: Path, run: RunDir, tmp_path: Path) -> None:
    """The second of them has a proximal policy of an earlier one, and so the step logprobs."""
    text = config.read_text() + f'\n[[offline]]\nrun = "{run.root}"\niterations = [0, 1]\n'
    own = tmp_path / "offline.toml"
    own.write_text(text)
    settings, place = load_config(own, ["iterations=3"]), RunDir(tmp_path / "runs" / "offline")
    place.root.parent.mkdir()
    plan = planned(settings, place)
    steps = {(item.step, item.iteration) for item, _ in plan.artifacts if item.verdict is Verdict.compute}
    assert {index for step, index in steps if step == "generate"} == {2}
    assert {index for step, index in steps if step == "logprobs"} == {1}
    check_equal(plan, train(settings, place))
    drop(place, 1, "logprobs", "training_records", "optimizer_steps", "policy", "optimizer")
    again = planned(settings, place)
    assert reasons(again, Verdict.compute)["logprobs 1"] == "not stored"
    assert reasons(again, Verdict.reuse)["generate 2"].startswith("stored; used if input policy:current come out")
    before = digests(run)
    check_equal(again, train(settings, place))
    assert digests(run) == before


def test_a_pruned_run_goes_on(config: Path, run: RunDir) -> None:
    assert list(prune(prunable(run, RetentionConfig(keep_last=1), set())))
    settings = load_config(config, ["iterations=3"])
    plan = planned(settings, run)
    assert places(plan, Verdict.reuse) >= {run.place(0, "policy"), run.place(0, "optimizer")}
    check_equal(plan, train(settings, run))


def test_a_plan_drops_nothing_that_retention_would(config: Path, run: RunDir) -> None:
    settings = load_config(config, ["iterations=5", "retention.keep_last=1"])
    plan = planned(settings, run)
    check_equal(plan, train(settings, run))
    assert not has_weights(open_artifact(run.policy_before(1)))


@pytest.mark.parametrize("lost", [[], ["batches"]], ids=["now", "after a batch"])
def test_a_pruned_policy_that_is_needed_is_told(config: Path, run: RunDir, lost: list[str]) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), set())))
    drop(run, 1, *lost, "training_records", "optimizer_steps", "policy", "optimizer", "evaluations")
    settings = load_config(config)
    plan = planned(settings, run)
    assert {item.step for item, _ in plan.artifacts if item.verdict is Verdict.refuse} == {"update"}
    with pytest.raises(ArtifactMissing) as refused:
        train(settings, run)
    assert plan.refusals == [str(refused.value)]


def test_a_pruned_member_of_a_coming_group_is_told(config: Path, run: RunDir, tmp_path: Path) -> None:
    """Its prompts are not there yet, so that the run stops only after it has made them."""
    own = tmp_path / "own.toml"
    members = "".join(
        f'[[generate.members]]\nname = "{name}"\npolicy = "{policy}"\ncount = 2\n'
        for name, policy in (("now", "current"), ("fixed", "iteration:1"))
    )
    own.write_text(config.read_text().replace("group_size = 4\n", "").replace("[[score", f"{members}\n[[score"))
    place = RunDir(tmp_path / "runs" / "new")
    train(load_config(own), place)
    list(prune(prunable(place, RetentionConfig(keep_last=1), set())))
    settings = load_config(own, ["iterations=3"])
    plan = planned(settings, place)
    assert [item.step for item, _ in plan.artifacts if item.verdict is Verdict.refuse] == ["generate"]
    with pytest.raises(ArtifactMissing) as refused:
        train(settings, place)
    assert plan.refusals == planned(settings, place).refusals == [str(refused.value)]
    assert place.has(2, "prompts")


def test_lost_rows_are_computed_again_and_what_was_made_of_them_is_found(config: Path, run: RunDir) -> None:
    settings, before = load_config(config), digests(run)
    drop(run, 0, "rewards")
    plan = planned(settings, run)
    assert reasons(plan, Verdict.compute) == {"score 0": "not stored"}
    expected = "stored; used if input rewards come out as before, else the run stops here"
    assert reasons(plan, Verdict.reuse)["normalize 0"] == expected
    check_equal(plan, train(settings, run))
    assert digests(run) == before


def test_rows_that_were_changed_are_told_as_the_run_tells_them(config: Path, run: RunDir) -> None:
    part = next(run.place(0, "rewards").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    settings = load_config(config)
    plan = planned(settings, run)
    with pytest.raises(GrpoError) as refused:
        train(settings, run)
    assert plan.refusals[0] == str(refused.value)


def test_a_source_that_was_changed_is_told_as_the_run_tells_it(tmp_path: Path, tiny_policy: Path) -> None:
    """No setting differs, so that only the recipe shows it."""
    run = RunDir(make_small_run(tmp_path, tiny_policy))
    source = tmp_path / "rows.jsonl"
    source.write_text(source.read_text() + '{"question": "1 + 3 =", "answer": "4"}\n')
    settings = load_config(tmp_path / "config.toml")
    plan = planned(settings, run)
    with pytest.raises(RecipeMismatch) as refused:
        train(settings, run)
    assert plan.refusals == [str(refused.value)]
    assert reasons(plan, Verdict.refuse)["prompts 0"].startswith("prompts.source_")


def test_a_policy_that_is_gone_is_reused_as_the_run_has_it(tmp_path: Path, tiny_policy: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    run = RunDir(make_small_run(tmp_path, policy))
    shutil.rmtree(policy)
    settings = load_config(tmp_path / "config.toml")
    plan = planned(settings, run)
    assert reasons(plan, Verdict.reuse)["policy None"].startswith("stored; what it was made from is not there")
    done = train(settings, run)
    check_equal(plan, done)
    assert list(plan.notes) == done.notes


STARTER = """
[policy]
model = "starter"
[starter]
hidden_size = 32
num_layers = 1
num_heads = 1
num_kv_heads = 1
intermediate_size = 32
steps = 2
batch_size = 4
demonstrations = 8
questions = 8
"""


def test_a_starter_is_made_before_the_initial_policy(config: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    text = config.read_text()
    policy = text[text.index("[policy]") : text.index("[prompts]")]
    own.write_text(text.replace(policy, STARTER).replace("iterations = 2", "iterations = 1"))
    settings, run = load_config(own), RunDir(tmp_path / "runs" / "new")
    run.root.parent.mkdir()
    plan = planned(settings, run)
    found = reasons(plan, Verdict.compute)
    assert (found["starter None"], found["policy None"]) == ("not stored", "input starter will be computed")
    done = train(settings, run)
    starter = next(item.main for item, _ in plan.artifacts if item.step == "starter")
    assert open_artifact(starter).manifest.stage == "starter"
    assert places(plan, Verdict.compute) - {starter} == done.computed
    again = planned(settings, run)
    assert reasons(again, Verdict.reuse)["starter None"] == "stored, of the recipe that is wanted"
    check_equal(again, train(settings, run))
    shutil.rmtree(starter)
    lost = planned(settings, run)
    assert set(reasons(lost, Verdict.compute)) == {"starter None"}
    assert not train(settings, run).computed
    assert open_artifact(starter).manifest.stage == "starter"


def test_a_policy_from_outside_is_brought_in_before_it_writes(config: Path, tmp_path: Path, tiny_policy: Path) -> None:
    own = tmp_path / "own.toml"
    members = f'''
[[generate.members]]
name = "now"
count = 2
[[generate.members]]
name = "before"
policy = "age:1"
count = 1
[[generate.members]]
name = "sibling"
policy = "{tiny_policy}"
count = 1
'''
    own.write_text(config.read_text().replace("group_size = 4\n", "").replace("[[score", f"{members}\n[[score"))
    settings, run = load_config(own), RunDir(tmp_path / "runs" / "new")
    run.root.parent.mkdir()
    plan = planned(settings, run)
    assert run.member("sibling") in places(plan, Verdict.compute)
    inputs = "inputs prompts, policy:now, policy:before, policy:sibling will be computed"
    assert reasons(plan, Verdict.compute)["generate 1"] == inputs
    check_equal(plan, train(settings, run))
    check_equal(planned(settings, run), train(settings, run))


def test_what_the_checks_of_a_run_refuse_is_told(config: Path, run: RunDir) -> None:
    settings = load_config(config, ["update.num_threads=4096"])
    plan = planned(settings, RunDir(run.root.parent / "new"))
    with pytest.raises(GrpoError) as refused:
        train(settings, RunDir(run.root.parent / "new"))
    assert plan.refusals == [str(refused.value)]
    assert not plan.is_of_other_recipe
    gone = load_config(config, ["prompts.source=gone.jsonl"])
    assert "gone.jsonl" in planned(gone, RunDir(run.root.parent / "new")).refusals[0]


def test_a_run_that_is_being_written_is_told(config: Path, run: RunDir) -> None:
    with lock(run):
        plan = make_plan(load_config(config), run, Estimator([run]))
    assert plan.notes == [f"a process is writing {run.name}: until it ends, no other run can begin there"]
