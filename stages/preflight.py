"""Checks before anything is written or started."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.losses.options import OF_ROWS, CustomLoss
from pipeline.artifact import open_artifact
from pipeline.errors import ConfigError
from pipeline.manifest import is_finished
from pipeline.prune import has_weights, num_finished
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from stages import generate
from stages.checkpoints import (
    check_policy,
    checkpoint_path,
    context_length,
    hub_config,
    hub_tokenizer,
    load_tokenizer,
    looks_local,
    stop_token_ids,
)
from stages.config import RunConfig
from stages.custom_functions import check_call
from stages.encoding import render
from stages.generate import check_room
from stages.normalize import NormalizeConfig
from stages.probe import check_template, try_task
from stages.score import check_rewards
from stages.source_rows import SourceRow
from stages.sources import REASONING_GYM, SourceConfig, first_row
from stages.starter.tokenizer import CHAT_TEMPLATE, EOS
from stages.wiring import outside_members, policy_of_run, with_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLOAT32_STEP = 2.0**-24
"""Below it 1 - x is 1 in float32, or twice as far from it as it should be."""


def preflight(config: RunConfig, run: RunDir) -> None:
    """Check all that can be checked before anything is written or started. Read-only.

    Once a run has its initial policy, the sources of that policy are not checked.

    Raises:
        GrpoError: one message, of the fitting class.
    """
    cores = len(os.sched_getaffinity(0))
    for key, threads in (("generate", config.generate.num_threads), ("update", config.update.num_threads)):
        if threads > cores:
            raise ConfigError(
                f"{key}.num_threads is {threads}, but this process may use {cores} cores: set it to {cores} or less "
                "(another number of threads gives other bits)"
            )
    check_functions(config)
    first = check_source(config.prompts)
    check_rewards(config.score, json.loads(first.metadata))
    _check_policies(config, run)
    _check_due_evaluations(config, run)
    _check_templates(config, run, first)
    for offline in config.offline:
        source = open_run(offline.run)
        for iteration in offline.iterations:
            if source.open(iteration, "completions").manifest.stage != generate.STAGE.name:
                raise ConfigError(
                    f"[[offline]] names {offline.run}, whose completions no policy of this program has sampled, so "
                    "they cannot train: name a run that generated its own"
                )


def check_source(config: SourceConfig) -> SourceRow:
    """Return one row of a source, after checking that it can be read and comes to an end. Read-only.

    Raises:
        SourceError: when it cannot be used.
    """
    if config.source.startswith(REASONING_GYM):
        try_task(config.model_dump_json(include=set(SourceConfig.model_fields)))
    return first_row(config)


def _check_policies(config: RunConfig, run: RunDir) -> None:
    """Check the checkpoints that the run needs, and that prompt and completion fit into their context."""
    if is_finished(run.initial_policy):
        initial = open_artifact(run.initial_policy)
        initial.check_sizes()
        check_room(config.generate, context_length(check_policy(str(initial.fetch()))))
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
        if not is_finished(run.member(member.name)):
            check_policy(member.policy)


def _check_due_evaluations(config: RunConfig, run: RunDir) -> None:
    """Check that no finished policy is still to be evaluated whose weights were dropped."""
    for num_updates in range(1, min(num_finished(run), config.iterations) + 1):
        place = run.policy_before(num_updates)
        if not config.is_to_be_evaluated(num_updates) or is_finished(run.place(num_updates - 1, "evaluations")):
            continue
        if not has_weights(open_artifact(place)):
            raise ConfigError(
                f"evaluate.every = {config.evaluate.every} and iterations = {config.iterations} ask for an evaluation "
                f"of the policy after {num_updates} updates, whose weights were dropped: set both back, or make the "
                f"weights again (grpo replay {run.name} --iteration {num_updates - 1} --stage update --scratch FOLDER) "
                f"and copy them from FOLDER/{place.parent.name}/policy to {place}"
            )


def _check_templates(config: RunConfig, run: RunDir, first: SourceRow) -> None:
    """Check that the policy's chat template writes a conversation of each source."""
    rows: list[tuple[SourceConfig, SourceRow]] = [(config.prompts, first)]
    if config.evaluate.source is not None:
        rows.append((config.evaluate.source, check_source(config.evaluate.source)))
    tokenizer = None if config.starter is not None else _tokenizer(config, run)
    for source, row in rows:
        variables = source.chat_template_kwargs
        if tokenizer is None:
            check_template(CHAT_TEMPLATE, variables, {"eos_token": EOS}, row.messages)
        else:
            check_conversation(tokenizer, variables, row.messages)


def check_conversation(
    tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any], messages: Sequence[Mapping[str, str]]
) -> None:
    """Check that a tokenizer's chat template reads the variables, comes to an end and writes the conversation.

    Raises:
        ConfigError: when a variable is none of the template's.
        PolicyError: when the template fails.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # named ones
        template = template.get("default")
    check_template(template, variables, tokenizer.special_tokens_map, messages)
    if tokenizer.chat_template:
        render(messages, tokenizer, variables)


def _tokenizer(config: RunConfig, run: RunDir) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the policy that the run begins with."""
    if is_finished(run.initial_policy):
        return _with_stops(open_artifact(run.initial_policy).fetch())
    if looks_local(config.policy.model):
        return _with_stops(checkpoint_path(config.policy.model))
    return hub_tokenizer(config.policy.model, config.policy.revision)


def _with_stops(policy: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint, after checking that its model knows the tokens that end a sequence."""
    stop_token_ids(policy)
    return load_tokenizer(policy)


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
    steps = config.batch.optimizer_steps * config.batch.epochs
    if config.update.loss.name == "reinforce" and (steps > 1 or config.offline):
        found.append(
            "update.loss reinforce takes no ratio, and in later optimizer steps, or with [[offline]] rows, the weights "
            'are others than the proximal policy: "cispo" is the same loss with the ratio'
        )
    if config.update.loss.name in OF_ROWS and config.batch.aggregation != "row_mean":
        found.append(
            f"update.loss {config.update.loss.name} is a loss of rows, and batch.aggregation = "
            f'"{config.batch.aggregation}" weighs the rows by their length: "row_mean" is the mean of its paper'
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
