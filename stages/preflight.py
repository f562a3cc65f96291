"""Checks before anything is written or started."""

import os

from grpo.losses.options import CustomLoss
from pipeline.artifact import open_artifact
from pipeline.errors import ConfigError
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from stages import generate
from stages.checkpoints import (
    check_policy,
    checkpoint_path,
    context_length,
    hub_config,
    looks_local,
)
from stages.config import RunConfig
from stages.custom_functions import check_call
from stages.generate import check_room
from stages.normalize import NormalizeConfig
from stages.score import check_rewards
from stages.wiring import outside_members, policy_of_run, with_optimizer

FLOAT32_STEP = 2.0**-24
"""Below it 1 - x is 1 in float32, or twice as far from it as it should be."""


def preflight(config: RunConfig, run: RunDir) -> None:
    """Check all that can be checked before anything is written or started. Read-only.

    Once a run has its initial policy, the sources of that policy are not checked.

    Raises:
        GrpoError: one message, of the fitting class.
    """
    from stages.sources import first_row

    cores = len(os.sched_getaffinity(0))
    for key, threads in (("generate", config.generate.num_threads), ("update", config.update.num_threads)):
        if threads > cores:
            raise ConfigError(
                f"{key}.num_threads is {threads}, but this process may use {cores} cores: set it to {cores} or less "
                "(another number of threads gives other bits)"
            )
    check_functions(config)
    check_rewards(config.score, first_row(config.prompts).metadata)
    if config.evaluate.source is not None:
        first_row(config.evaluate.source)
    if is_finished(run.initial_policy):
        check_room(config.generate, context_length(check_policy(str(open_artifact(run.initial_policy).fetch()))))
    elif config.starter is not None:
        check_room(config.generate, config.starter.max_context)
    elif looks_local(config.policy.model):
        check_room(config.generate, context_length(check_policy(config.policy.model)))
        if (trained := policy_of_run(checkpoint_path(config.policy.model))) is not None:
            for artifact in with_optimizer(trained, config.policy).values():
                artifact.check_sizes()
    else:
        check_room(config.generate, context_length(hub_config(config.policy.model, config.policy.revision)))
    for member in outside_members(config):
        check_policy(member.policy)
    for offline in config.offline:
        source = open_run(offline.run)
        for iteration in offline.iterations:
            if source.open(iteration, "completions").manifest.stage != generate.STAGE.name:
                raise ConfigError(
                    f"[[offline]] names {offline.run}, whose completions no policy of this program has sampled, so "
                    "they cannot train: name a run that generated its own"
                )


def remarks(config: RunConfig) -> list[str]:
    """Return what a user should know about settings that are allowed and do not do what they say."""
    found = []
    decay = config.update.learning_rate * config.update.weight_decay
    if 0 < decay < FLOAT32_STEP:
        found.append(
            f"update.learning_rate times update.weight_decay is {decay:.0e}, and a float32 weight changes by steps of "
            f"{FLOAT32_STEP:.0e} of its size: the decay is rounded away; set weight_decay to 0, or to "
            f"{FLOAT32_STEP / config.update.learning_rate:.1g} or more"
        )
    return found


def check_functions(config: RunConfig) -> None:
    """Check that the custom functions that a config names can be imported and accept their arguments.

    Raises:
        ConfigError: naming the setting.
    """
    loss = config.update.loss
    check_call("update.loss.name", loss.name, ["inputs"], loss.arguments if isinstance(loss, CustomLoss) else {})
    check_call("generate.engine", config.generate.engine, ["settings"], {})
    check_normalize(config.normalize)


def check_normalize(normalize: NormalizeConfig) -> None:
    """Check the custom functions of [normalize] in the same way.

    Raises:
        ConfigError: naming the setting.
    """
    check_call("normalize.baseline", normalize.baseline, ["groups"], {})
    check_call("normalize.scale", normalize.scale, ["raw", "groups", "eps"], {})
