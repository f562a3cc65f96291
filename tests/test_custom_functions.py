"""Losses, baselines and scales from outside: they reach the arithmetic, and their source stands in the recipe."""

import importlib
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from flows.session import Session
from grpo.losses.base import LossInputs
from grpo.losses.chosen import token_losses
from grpo.losses.options import CustomLoss
from pipeline.errors import ConfigError, GrpoError
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from stages.config import RunConfig, load_config, recorded_config
from stages.custom_functions import SOURCES, sources
from stages.engines.scripted import ScriptedEngine
from stages.inspect.verify.verify import verify_run
from stages.normalize import NormalizeConfig, normalize_rows
from stages.preflight import check_functions, preflight
from stages.rewards.functions import source_hashes
from stages.wiring import Wiring
from tests.finished import answer, finished_run

LOSSES = """
from grpo.losses.base import LossInputs, TokenLosses
from grpo.losses.clip import ppo_clip


def same(inputs: LossInputs) -> TokenLosses:
    return ppo_clip(inputs)


def reinforce(inputs: LossInputs, *, factor: float) -> TokenLosses:
    return TokenLosses(-factor * inputs.advantage_N * inputs.trainer_logprobs_N, {"negative": inputs.advantage_N < 0})


def whole(inputs: LossInputs) -> TokenLosses:
    return TokenLosses(inputs.trainer_logprobs_N.sum(), {})
"""

ADVANTAGES = """
import numpy as np


def median(groups):
    medians = [np.nanmedian(groups.values[groups.number == n]) for n in groups.number]
    return groups.values - np.array(medians)


def doubled(raw, groups, eps):
    return raw * 2 + eps


def short(groups):
    return groups.values[:-1]


def unknown(raw, groups, eps):
    return raw * np.nan
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the modules be importable from here."""
    for name, text in (("own_losses", LOSSES), ("own_advantages", ADVANTAGES)):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    source_hashes.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))


def run_with(folder: Path, policy: Path, loss: str, name: str = "run") -> RunDir:
    """Return a finished run of two iterations whose update has this loss and records tokens."""
    return finished_run(folder, policy, name=name, update=f"record_tokens = true\n[update.loss]\n{loss}\n")


def test_a_loss_from_outside_that_does_the_same_gives_the_same_bits(tmp_path: Path, tiny_policy: Path) -> None:
    built_in = run_with(tmp_path, tiny_policy, 'name = "ppo_clip"', "built_in")
    own = run_with(tmp_path, tiny_policy, 'name = "own_losses:same"', "own")
    ours, theirs = (run.open(0, "policy").manifest for run in (built_in, own))
    assert ours.files == theirs.files
    assert SOURCES not in ours.config
    assert set(theirs.config[SOURCES]) == {"update.loss.name"}
    assert ours.recipe != theirs.recipe
    assert verify_run(own).problems == []


def test_a_loss_from_outside_is_given_its_arguments_and_its_reasons_are_recorded(
    tmp_path: Path, tiny_policy: Path
) -> None:
    losses = []
    for factor in (1.0, 2.0):
        loss = f'name = "own_losses:reinforce"\narguments = {{ factor = {factor} }}'
        run = run_with(tmp_path, tiny_policy, loss, f"factor{factor:.0f}")
        records = run.open(0, "training_records").read().sort("completion_id")
        losses.append(records["loss"])
        reasons = {reason for row in records["clip_reasons"] for reason in row}
        assert reasons == {None, "negative"}
        assert records["clipped_low_tokens"].sum() + records["clipped_high_tokens"].sum() == 0
    assert losses[0].abs().min() > 0
    assert losses[1].to_list() == pytest.approx((losses[0] * 2).to_list())


def test_the_source_of_a_function_stands_in_the_recipe(tmp_path: Path) -> None:
    before = sources({"loss": "own_losses:same"})
    assert sources({"loss": "ppo_clip", "scale": "none"}) == {}
    assert sources({"loss": "own_losses:reinforce"}) == before
    (tmp_path / "own_losses.py").write_text(LOSSES + "\n# another source\n")
    importlib.invalidate_caches()
    source_hashes.cache_clear()
    assert sources({"loss": "own_losses:same"}) != before


def inputs() -> LossInputs:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    fixed = logprobs.detach()
    return LossInputs(logprobs, fixed, fixed, torch.ones(2), torch.tensor([0, 0]), 1)


def test_a_loss_that_is_not_one_number_for_each_token_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    with pytest.raises(
        ValueError, match=r"returned TokenLosses with losses of shape \(\).*expected .* each of 2 tokens"
    ):
        token_losses(inputs(), CustomLoss(name="own_losses:whole"))
    with pytest.raises(GrpoError, match="the loss own_losses:whole returned"):
        run_with(tmp_path, tiny_policy, 'name = "own_losses:whole"')


REWARDS = pl.DataFrame(
    {
        "completion_id": ["a", "b", "c", "d"],
        "group_id": ["g", "g", "g", "h"],
        "reward_name": ["x"] * 4,
        "reward_recipe": ["r"] * 4,
        "reward": [0.0, 1.0, 5.0, 1.0],
    }
).lazy()


def test_baselines_and_scales_from_outside_make_the_advantages() -> None:
    config = NormalizeConfig(baseline="own_advantages:median", scale="own_advantages:doubled", eps=0.5)
    frame = normalize_rows(REWARDS, config)
    assert frame["advantage"].to_list() == [-1.5, 0.5, 8.5, 0.0]
    assert frame["drop_reason"].to_list() == [None, None, None, "singleton"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "own_advantages:short"}, r"the baseline gave an array of shape \(3,\): expected \(4,\)"),
        ({"scale": "own_advantages:unknown"}, r"the scale gave nan for member 0 \(and 2 more\): expected a finite"),
    ],
)
def test_a_baseline_or_scale_without_a_number_for_each_member_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        normalize_rows(REWARDS, NormalizeConfig(**options))


def test_an_unknown_baseline_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"found 'mean', expected one of group_mean, leave_one_out, .*, none, or module"
    ):
        NormalizeConfig(baseline="mean")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["update.loss.name=own_losses:gone"], "update.loss.name names 'own_losses:gone', which cannot be imported"),
        (["update.loss.name=own_losses:reinforce"], "missing a required argument: 'factor'.*expected a function that"),
        (["normalize.baseline=own_advantages:doubled"], "normalize.baseline names .* expected a function that can be"),
        (["normalize.scale=nowhere:f"], "normalize.scale names 'nowhere:f', which cannot be imported"),
    ],
)
def test_functions_are_checked_before_anything_is_written(
    tmp_path: Path, tiny_policy: Path, overrides: list[str], message: str
) -> None:
    config = small_config(tmp_path, tiny_policy, overrides)
    with pytest.raises(ConfigError, match=message):
        preflight(config, RunDir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_functions_that_fit_pass_the_check(tmp_path: Path, tiny_policy: Path) -> None:
    fitting = ["update.loss={name = 'own_losses:reinforce', arguments = {factor = 2.0}}"]
    fitting += ["normalize.baseline=own_advantages:median", "normalize.scale=own_advantages:doubled"]
    check_functions(small_config(tmp_path, tiny_policy, fitting))


def small_config(folder: Path, policy: Path, overrides: list[str]) -> RunConfig:
    (folder / "rows.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n' * 8)
    text = f'''
[policy]
model = "{policy}"
[prompts]
source = "{folder}/rows.jsonl"
prompts_per_iteration = 2
[generate]
max_tokens = 8
num_threads = 1
[update]
num_threads = 1
[[score.rewards]]
name = "exact"
function = "stages.rewards.answers.matching:exact_match"
'''
    (folder / "own.toml").write_text(text)
    return load_config(folder / "own.toml", overrides)


def test_advantages_by_functions_that_changed_are_not_judged(tmp_path: Path, tiny_policy: Path) -> None:
    run = finished_run(tmp_path, tiny_policy)
    settings = recorded_config(run).model_dump(mode="json")
    settings["normalize"]["baseline"] = "own_advantages:median"
    config = RunConfig.model_validate(settings)
    other = RunDir(tmp_path / "runs" / "other")
    other.record_config("", settings)
    with closing(Session(config, other, _engine=ScriptedEngine(answer))) as session:
        session.initial_policy()
        for stage in ("prompts", "generate", "score", "normalize"):
            session.perform(stage, 0)
    assert is_finished(other.place(0, "advantages"))
    assert set(Wiring(config, other).call("normalize", 0).parameters[SOURCES]) == {"normalize.baseline"}
    assert ("advantages", CHANGED) not in verify_run(other).notes
    (tmp_path / "own_advantages.py").write_text(ADVANTAGES.replace("nanmedian", "nanmax"))
    source_hashes.cache_clear()
    assert ("advantages", CHANGED) in verify_run(other).notes


CHANGED = "a function of normalize is not there as it was"
