"""The plan of a run that checks hold, or have let pass: as it then goes."""

from pathlib import Path

import pytest

from flows.planning.estimate import Estimator
from flows.planning.plan import Plan, because, make_plan
from flows.planning.planned import Reason, Verdict
from pipeline.errors import CheckFailed
from stages.config import RunConfig
from tests.checked_run import ANSWERED, HALF_NULL, NEVER, Place
from tests.small_run import EXACT


@pytest.fixture
def held(tmp_path: Path, tiny_policy: Path) -> Place:
    """Return a run whose first iteration is held for its reward: half of it is null."""
    place = Place(tmp_path, tiny_policy)
    with pytest.raises(CheckFailed):
        place.go(place.config(ANSWERED, HALF_NULL))
    return place


def planned(place: Place, config: RunConfig) -> tuple[Plan, dict[str, tuple[Verdict, Reason]]]:
    """Return the plan, and the verdict and reason of each step of the first iteration."""
    plan = make_plan(config, place.run, Estimator([place.run]))
    return plan, {item.step: (item.verdict, item.reason) for item, _ in plan.artifacts if item.iteration == 0}


def test_the_same_command_is_refused_by_the_check_again(held: Place) -> None:
    config = held.config(ANSWERED, HALF_NULL)
    plan, steps = planned(held, config)
    with pytest.raises(CheckFailed) as refused:
        held.go(config)
    assert plan.refusals == [str(refused.value)]
    assert steps["normalize"] == (Verdict.reuse, Reason.finished)
    assert steps["check"] == (Verdict.refuse, Reason.held)
    assert steps["batch"] == (Verdict.compute, Reason.inputs)
    assert [because(item) for item, _ in plan.artifacts if item.step == "batch"] == ["input checks is refused"]


def test_a_repaired_reward_takes_the_place_of_the_held_one(held: Place) -> None:
    config = held.config(ANSWERED, EXACT)
    plan, steps = planned(held, config)
    before = {name: held.run.open(0, name).digest for name in ("completions", "rewards", "advantages", "checks")}
    held.go(config)
    after = {name: held.run.open(0, name).digest for name in before}
    assert plan.refusals == []
    assert steps["generate"] == (Verdict.reuse, Reason.finished)
    assert steps["score"] == (Verdict.compute, Reason.replaced)
    assert {steps[name] for name in ("normalize", "check", "batch", "update")} == {(Verdict.compute, Reason.inputs)}
    assert after["completions"] == before["completions"]
    assert [name for name in before if after[name] == before[name]] == ["completions"]


def test_another_check_lets_the_stored_rewards_pass(held: Place) -> None:
    config = held.config(ANSWERED.replace("block", "warn"), HALF_NULL)
    plan, steps = planned(held, config)
    held.go(config)
    assert plan.refusals == []
    assert steps["score"] == steps["normalize"] == (Verdict.reuse, Reason.finished)
    assert steps["check"] == (Verdict.compute, Reason.replaced)
    assert steps["batch"] == (Verdict.compute, Reason.inputs)
    assert held.run.has(0, "policy")


def test_a_check_that_came_later_holds_nothing_that_has_trained(tmp_path: Path, tiny_policy: Path) -> None:
    place = Place(tmp_path, tiny_policy)
    place.go(place.config("", EXACT))
    plan, steps = planned(place, place.config(NEVER, EXACT))
    place.go(place.config(NEVER, EXACT))
    assert plan.refusals == []
    assert {verdict for verdict, _ in steps.values()} == {Verdict.reuse}
    assert not place.run.has(0, "checks")
