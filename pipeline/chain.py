"""The chain of stages: the one list from which everything that names a stage or a dataset is derived.

It holds names only: `load_stage` imports a stage on demand, so that read-only commands start fast. A new stage is one
module and one line here; see docs/decisions/0012.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.stage import Stage


class From(StrEnum):
    """Where an input of a stage comes from."""

    here = "the dataset of the input's name, of the same iteration"
    if_made = "like here, where the config has the stage read it in this iteration; else there is no such input"
    earlier = "like here, but of the iteration before, where the config asks for it"
    initial = "the initial policy"
    named = "the policies under which the iteration's rows are looked at; one input policy:<name> for each"
    before = "the policy that the iteration begins with"
    after = "the policy after the iteration's update"
    members = "the policies of the group's members; one input policy:<name> for each"
    held_out = "the held-out prompts"


class When(StrEnum):
    """When a training run executes a stage."""

    in_order = "after the step before it"
    ahead = "in the background, while the iteration before samples: it needs nothing of its own iteration"
    late = "in the background, while the next iteration samples: it may be missing after a kill"
    evaluation = "after the iterations that evaluate.every names, and before the first"


@dataclass(frozen=True, slots=True)
class Step:
    """A stage in the chain."""

    name: str
    """The verb: the stage's module, its config table and its command have the same name."""
    writes: tuple[str, ...]
    """Datasets, which are folder names; the last is the main one, whose existence means that the stage is done."""
    reads: Mapping[str, From]
    uses: tuple[str, ...] = ()
    """Running helpers, which decide no result: engine, scorer, trainer, auditor."""
    tensors: tuple[str, ...] = ()
    """The datasets of ``writes`` that are checkpoints; all others hold rows."""
    when: When = When.in_order
    stage: str = ""
    """``module:STAGE``; empty = ``stages.<name>:STAGE``."""


CHAIN = (
    Step("prompts", ("prompts",), {"policy": From.initial}, when=When.ahead),
    Step("generate", ("completions",), {"prompts": From.here, "policy": From.members}, uses=("engine",)),
    Step("score", ("rewards",), {"prompts": From.here, "completions": From.here}, uses=("scorer",)),
    Step(
        "logprobs",
        ("logprobs",),
        {"completions": From.here, "rewards": From.here, "policy": From.named},
        uses=("trainer",),
    ),
    Step(
        "normalize",
        ("advantages",),
        {"rewards": From.here, "completions": From.if_made, "logprobs": From.if_made},
    ),
    Step(
        "check",
        ("checks",),
        {
            "prompts": From.here,
            "completions": From.here,
            "rewards": From.here,
            "advantages": From.here,
            "training_records": From.earlier,
        },
        uses=("auditor",),
    ),
    Step("batch", ("batches",), {"completions": From.here, "advantages": From.here, "checks": From.if_made}),
    Step(
        "update",
        ("training_records", "optimizer_steps", "policy"),
        {"batches": From.here, "logprobs": From.if_made, "policy": From.before},
        uses=("trainer",),
        tensors=("policy",),
    ),
    Step(
        "optimizer", ("optimizer",), {"policy": From.after}, uses=("trainer",), tensors=("optimizer",), when=When.late
    ),
    Step(
        "evaluate",
        ("evaluations",),
        {"prompts": From.held_out, "policy": From.after},
        uses=("engine", "scorer"),
        when=When.evaluation,
    ),
)
"""In the order in which an iteration executes them; `RunConfig.executes` says which iterations go without one."""

STEPS = {step.name: step for step in CHAIN}
DATASETS = tuple(dataset for step in CHAIN for dataset in step.writes)
"""Folders of an iteration, in the order in which they are written."""
CHECKPOINTS = tuple(dataset for step in CHAIN for dataset in step.tensors)
"""The datasets that hold tensors."""
WRITER = {dataset: step for step in CHAIN for dataset in step.writes}
"""Dataset -> the step that writes it."""
INITIAL = -1
"""The index before the first iteration; the evaluation of the initial policy has it."""


@cache
def known_schemas() -> "Mapping[str, pa.Schema]":
    """Return the schema of every dataset that holds rows, including those of custom stages."""
    from pipeline.schema import SCHEMAS

    return {**SCHEMAS, **{name: schema for s in CHAIN if s.stage for name, schema in load_stage(s).schemas.items()}}


def load_stage(step: Step) -> "Stage[Any, Any]":
    """Return the step's stage; the first call imports its module."""
    module, _, name = (step.stage or f"stages.{step.name}:STAGE").partition(":")
    stage: Stage[Any, Any] = getattr(importlib.import_module(module), name)
    return stage
