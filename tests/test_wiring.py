"""The wiring: each step is called with the run's own table, its inputs and its places."""

from pathlib import Path

import pytest

from grpo.settings import KlConfig
from pipeline.chain import CHAIN, INITIAL, From
from pipeline.run_dir import RunDir
from stages.config import RunConfig, recorded_config
from stages.logprobs import LogprobsConfig
from stages.wiring import Wiring
from tests.small_run import make_small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunDir:
    """Return a run of two iterations; not to be changed."""
    return RunDir(make_small_run(tmp_path_factory.mktemp("wiring"), tiny_policy, iterations=2))


@pytest.fixture(scope="module")
def config(run: RunDir) -> RunConfig:
    """Return the run's config with a setting of each table that is not its default."""
    found = recorded_config(run)
    changes = {
        "generate": {"temperature": 0.5},
        "score": {"max_failed_share": 0.3},
        "normalize": {"eps": 0.5},
        "batch": {"epochs": 3},
        "update": {"learning_rate": 0.5},
        "evaluate": {"num_samples": 5},
        "prompts": {"system_prompt": "Add."},
    }
    tables = {name: getattr(found, name).model_copy(update=change) for name, change in changes.items()}
    return found.model_copy(update={"seed": 11, **tables})


@pytest.mark.parametrize("name", ["generate", "score", "normalize", "batch", "update"])
def test_a_step_takes_the_table_of_its_name(run: RunDir, config: RunConfig, name: str) -> None:
    assert Wiring(config, run).call(name, 1).config is getattr(config, name)


def test_prompts_and_evaluate_take_what_decides_them_from_several_tables(run: RunDir, config: RunConfig) -> None:
    wiring = Wiring(config, run)
    prompts = wiring.call("prompts", 1)
    assert prompts.config.system_prompt == "Add."
    assert prompts.parameters["count"] == config.prompts.prompts_per_iteration
    assert "prompts_per_iteration" not in type(prompts.config).model_fields
    settings = config.evaluation()
    assert (settings.num_samples, settings.temperature, settings.normalize.eps) == (5, 0.5, 0.5)
    assert settings.score is config.score


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prompts", {"seed": 11, "iteration": 1, "drawn_for": "train"}),
        ("generate", {"seed": 11, "iteration": 1, "policy_iterations": {"current": 1}}),
        ("batch", {"seed": 11, "iteration": 1}),
        ("normalize", {}),
        ("update", {}),
    ],
)
def test_a_step_is_told_what_it_wants_of_the_run(
    run: RunDir, config: RunConfig, name: str, expected: dict[str, object]
) -> None:
    found = Wiring(config, run).call(name, 1).parameters
    assert {key: found[key] for key in expected} == expected
    assert name == "prompts" or set(found) == set(expected)


def test_inputs_come_from_where_the_chain_says(run: RunDir, config: RunConfig) -> None:
    places = {
        From.initial: run.initial_policy,
        From.before: run.policy_before(1),
        From.after: run.policy_before(2),
        From.members: run.policy_before(1),
    }
    for step in CHAIN:
        if From.held_out in step.reads.values():
            continue  # this run has no evaluation
        found = Wiring(config, run).call(step.name, 1).inputs
        for name, source in step.reads.items():
            if source in (From.if_made, From.earlier, From.named):
                assert name not in found  # this run has no offline iteration, no reference policy and no checks
                continue
            given = found["policy:current" if source is From.members else name]
            assert given.path == places.get(source, run.place(1, name)), (step.name, name)


@pytest.mark.parametrize(("refresh_every", "expected"), [(None, 0), (1, 1), (2, 0)])
def test_the_reference_is_the_policy_of_the_last_refresh(
    run: RunDir, config: RunConfig, refresh_every: int | None, expected: int
) -> None:
    kl = KlConfig(refresh_every=refresh_every)
    held = config.model_copy(update={"update": config.update.model_copy(update={"kl": kl})})
    found = Wiring(held, run).reads("logprobs", 1)
    assert found["policy:reference"] == run.policy_before(expected)
    assert Wiring(held, run).reads("update", 1)["logprobs"] == run.place(1, "logprobs")
    assert "logprobs" not in Wiring(config, run).reads("update", 1)


def test_a_forward_under_another_policy_is_that_of_the_update(run: RunDir, config: RunConfig) -> None:
    """Its logprobs are compared with the update's, so nothing else may differ."""
    forward = {"autocast_bf16": True, "head_chunk_tokens": 7, "num_threads": 3}
    tables = {
        "update": config.update.model_copy(update=forward),
        "batch": config.batch.model_copy(update={"microbatch_tokens": 99}),
    }
    found = Wiring(config.model_copy(update=tables), run).call("logprobs", 1).config
    assert found == LogprobsConfig(**forward, microbatch_tokens=99)


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("group_mean", "none", {}),
        ("none", "group_std", {}),
        ("none", "none", {"every_group": True}),
        ("flows.app:build_app", "none", {"every_group": True}),
    ],
)
def test_logprobs_leave_groups_out_where_these_cannot_train(
    run: RunDir, config: RunConfig, baseline: str, scale: str, expected: dict[str, bool]
) -> None:
    normalize = config.normalize.model_copy(update={"baseline": baseline, "scale": scale})
    assert Wiring(config.model_copy(update={"normalize": normalize}), run).call("logprobs", 1).parameters == expected


def test_outputs_go_into_the_iteration_and_those_of_the_first_evaluation_before_it(
    run: RunDir, config: RunConfig
) -> None:
    assert list(Wiring(config, run).call("update", 1).places.values()) == [
        run.place(1, name) for name in ("training_records", "optimizer_steps", "policy")
    ]
    assert run.place(INITIAL, "evaluations") == run.root / "evaluations"
