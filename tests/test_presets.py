"""Presets: each is a whole method by name, and what a config says itself counts."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.run_dir import RunDir
from stages.config import RunConfig, derive_tables, parse_config
from stages.presets.merge import FOLDER, presets, with_preset

MINIMAL = """
{preset}
[policy]
model = "m"
[prompts]
source = "s"
[[score.rewards]]
name = "r"
function = "stages.rewards.answers.matching:exact_match"
{more}
"""
CONSTANT = "[batch]\naggregation_tokens = 100\n"
NEEDS = {"dr_grpo": CONSTANT}
DOC = (Path(__file__).parent.parent / "docs" / "algorithm.md").read_text(encoding="utf-8")


def config(preset: str, more: str = "") -> RunConfig:
    return parse_config(MINIMAL.format(preset=f'preset = "{preset}"', more=more), "config")


def leaves(tables: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the settings of nested tables by their path."""
    found = {}
    for key, value in tables.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


@pytest.mark.parametrize("name", presets())
def test_a_config_of_a_preset_has_every_setting_of_it(name: str) -> None:
    wanted = leaves(tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")))
    found = leaves(config(name, NEEDS.get(name, "")).model_dump(mode="json"))
    assert {path: found[path] for path in wanted} == wanted
    assert f"`{name}`" in DOC.split("## Presets")[1].split("\n## ")[0]


def test_there_is_a_preset_for_each_method() -> None:
    assert set(presets()) == {
        "grpo_original", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_pp_baseline", "scale_rl",
    }  # fmt: skip


def test_what_the_config_says_itself_counts() -> None:
    found = config("gspo", "[update]\nlearning_rate = 0.5\n[update.loss]\nclip_low = 0.1\n[batch]\nmax_tokens = 9\n")
    assert found.update.loss.model_dump() == {"name": "gspo", "clip_low": 0.1, "clip_high": 4e-4}
    assert (found.batch.aggregation, found.batch.max_tokens, found.update.learning_rate) == ("row_mean", 9, 0.5)


def test_another_loss_takes_no_option_of_the_presets_one() -> None:
    assert config("gspo", '[update.loss]\nname = "cispo"\n').update.loss.model_dump() == {
        "name": "cispo", "ratio_cap": 5.0, "ratio_floor": 0.0,
    }  # fmt: skip


def test_another_estimate_of_the_kl_keeps_the_presets_coefficient() -> None:
    found = config("grpo_original", '[update.kl]\nname = "weighted_k3"\n').update.kl
    assert found is not None
    assert (found.name, found.coef) == ("weighted_k3", 0.04)


def test_the_kl_of_a_preset_can_be_switched_off() -> None:
    found = config("grpo_original", '[update]\nkl = "none"\n')
    assert found.update.kl is None
    assert found.model_dump(mode="json")["update"]["kl"] is None


def test_an_override_chooses_a_preset() -> None:
    found = parse_config(MINIMAL.format(preset="", more=""), "config", ["preset=sapo", "normalize.scale=none"])
    assert (found.update.loss.name, found.normalize.scale) == ("sapo", "none")


def test_a_preset_that_leaves_something_open_says_what() -> None:
    with pytest.raises(ConfigError, match="constant_length wants a number of tokens"):
        config("dr_grpo")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"preset is 'grpo': expected one of cispo, dapo, .*; correct the name"):
        config("grpo")


def test_a_fork_takes_no_preset(tmp_path: Path) -> None:
    """Its tables replace those of the run as a whole: a preset would reset the learning rate, too."""
    run = RunDir(tmp_path / "run")
    run.record_config("", config("gspo").model_dump(mode="json"))
    for tables, overrides in (({"preset": "sapo"}, []), ({}, ["preset=sapo"])):
        with pytest.raises(ConfigError, match=r"preset is 'sapo', but the settings of .* expected no preset"):
            derive_tables(run, tables, overrides)


def test_without_a_preset_nothing_changes() -> None:
    assert with_preset({"a": {"b": 1}}) == {"a": {"b": 1}}
