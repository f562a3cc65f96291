"""Identity that survives an upgrade: what a recipe holds, and the defaults of each stage's version."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytest
from pydantic import BaseModel, Field

from pipeline.chain import CHAIN, load_stage
from pipeline.config import StrictModel, chosen, deciding, default_of
from pipeline.manifest import is_part_of
from pipeline.stage import Stage, StageCall, StageTask
from stages import importing, policy
from stages.config import RunConfig
from stages.reward_model import reward_model
from stages.rewards.functions import RewardConfig
from stages.score import ScoreConfig
from stages.starter import starter

DEFAULTS = Path(__file__).parent / "golden" / "stage_defaults.json"
STAGES = [*(load_stage(step) for step in CHAIN), policy.STAGE, importing.STAGE, starter.STAGE, reward_model.STAGE]


class Inner(StrictModel):
    name: Literal["inner"] = "inner"
    width: int = 3


class Old(StrictModel):
    """A stage's config before an upgrade ..."""

    rate: float = 1.0
    inner: Inner = Inner()
    items: list[Inner] = Field(default_factory=list)


class New(Old):
    """... and after it."""

    momentum: float | None = 0.5
    more: Inner = Inner(width=9)


def call(config: StrictModel, version: int = 1) -> StageCall[Any, None]:
    def compute(task: StageTask[Any, None]) -> None: ...

    return StageCall(Stage("toy", version, type(config), compute), config, {}, {"toys": Path("toys")}, {"seed": 3})


@pytest.mark.parametrize(
    "settings", [{}, {"rate": 2.0}, {"inner": Inner(width=4)}, {"items": [Inner(), Inner(width=1)]}]
)
def test_a_setting_that_is_added_at_its_default_changes_no_recipe(settings: dict[str, Any]) -> None:
    assert call(Old(**settings)).recipe() == call(New(**settings)).recipe()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"rate": 1.0, "momentum": 0.5}, {}),
        ({"momentum": None}, {"momentum": None}),
        ({"rate": 2.0}, {"rate": 2.0}),
        ({"inner": Inner(width=4)}, {"inner": {"name": "inner", "width": 4}}),
        ({"items": [Inner(), Inner(width=1)]}, {"items": [{"name": "inner"}, {"name": "inner", "width": 1}]}),
    ],
)
def test_a_recipe_holds_what_differs_from_the_defaults(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chosen(New(**settings)) == expected
    assert call(New(**settings)).recipe_parts().chosen == {**expected, "seed": 3}


def test_every_choice_and_the_version_change_the_recipe() -> None:
    configs = [New(), New(rate=2.0), New(momentum=None), New(inner=Inner(width=4))]
    recipes = {call(config).recipe() for config in configs} | {call(New(), version=2).recipe()}
    assert len(recipes) == len(configs) + 1


def test_a_manifest_whose_config_contradicts_its_recipe_is_found() -> None:
    config = New(rate=2.0, items=[Inner(width=1)])
    whole = config.model_dump(mode="json")
    assert is_part_of(chosen(config), whole)
    assert not is_part_of(chosen(config), {**whole, "rate": 1.0})
    assert not is_part_of(chosen(config), {**whole, "items": []})


def test_what_decides_nothing_is_in_no_recipe_and_may_change() -> None:
    class Table(StrictModel):
        DECIDES_NOTHING: ClassVar = frozenset({"limit"})
        DECIDES_ELSEWHERE: ClassVar = frozenset({"arguments"})
        limit: int = 1
        arguments: int = 1

    assert chosen(Table(limit=2, arguments=2)) == {}
    assert deciding(Table(limit=2, arguments=2)) == {"arguments": 2}


def test_where_a_reward_lies_and_how_often_it_may_fail_is_in_no_recipe() -> None:
    one = RewardConfig(name="exact", function="here:exact_match", concurrency=1)
    two = RewardConfig(name="exact", function="there:exact_match", concurrency=2)
    assert chosen(ScoreConfig(rewards=[one])) == {"rewards": [{"name": "exact"}]}
    assert chosen(ScoreConfig(rewards=[two], max_failed_share=0.5)) == {"rewards": [{"name": "exact"}]}
    limited = ScoreConfig(rewards=[one.model_copy(update={"time_limit": 3.0})])
    assert chosen(limited) == {"rewards": [{"name": "exact", "time_limit": 3.0}]}


def test_the_tables_of_a_run_are_the_configs_of_its_stages() -> None:
    """Of five tables stages/wiring.py puts together what decides."""
    for step in CHAIN:
        if step.name not in ("prompts", "check", "logprobs", "optimizer", "evaluate"):
            assert RunConfig.model_fields[step.name].annotation is load_stage(step).config


def tables(of: Any) -> set[type[BaseModel]]:
    """Return every table that a config, or the type of one of its settings, is made of."""
    if isinstance(of, type) and issubclass(of, BaseModel):
        return {of}.union(*(tables(field.annotation) for field in of.model_fields.values()))
    return set().union(*map(tables, get_args(of)))


def defaults(config: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return the defaults of a config's tables, by the name of the class."""
    return {
        table.__name__: {n: default_of(table, n) for n, field in table.model_fields.items() if not field.is_required()}
        for table in tables(config)
    }


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_default_that_changes_raises_the_version_of_its_stage(stage: Stage[Any, Any]) -> None:
    """A recipe leaves defaults out: a new default needs a new version, and a new setting a line in the file."""
    known = json.loads(DEFAULTS.read_text(encoding="utf-8"))[stage.name]
    assert known == {"version": stage.version, "defaults": defaults(stage.config)}, (
        f"a default of stage {stage.name} {known['version']} is not what it was: raise the stage's version if one "
        f"changed or went; then write the new ones into {DEFAULTS.name}"
    )
