"""Stages: what is computed, from what, and whether it was computed before.

A stage module has a config, a pure core (frames in, frames out) and a `Stage` record. `run_stage` supplies the rest:
the recipe, reuse of a finished artifact, refusal of another recipe's, atomic parts, the manifest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
from pydantic import BaseModel

from pipeline.artifact import Artifact, open_artifact
from pipeline.config import chosen
from pipeline.errors import OutOfSpace, RecipeMismatch
from pipeline.files import explain_full_device
from pipeline.manifest import Recipe, canonical_json, is_finished, recipe_differences, recipe_hash
from pipeline.provenance import environment
from pipeline.schema import SCHEMAS
from pipeline.writer import ArtifactWriter, remove_artifact


class Progress(Protocol):
    """Called with a stage's progress; the default, `silent`, ignores it."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def silent(done: int, total: int, text: str = "") -> None:
    """Ignore progress."""


C = TypeVar("C", bound=BaseModel)
"""The stage's config."""
R = TypeVar("R")
"""The running helpers that the stage uses, such as an engine; they decide no result."""


@dataclass(slots=True)
class StageTask(Generic[C, R]):
    """The argument of a stage's compute function."""

    config: C
    parameters: Mapping[str, Any]
    """What decides the result besides the config: seed, iteration, hashes of user code."""
    inputs: Mapping[str, Artifact]
    writers: Mapping[str, ArtifactWriter]
    """Output name -> writer."""
    recipe: str
    resources: R
    progress: Progress = silent

    @property
    def writer(self) -> ArtifactWriter:
        """The writer of the stage's main output."""
        return list(self.writers.values())[-1]


@dataclass(frozen=True, slots=True)
class Stage(Generic[C, R]):
    """The record of a stage. `pipeline.chain` says which datasets it reads and writes."""

    name: str
    """The verb: module, config table and command have the same name."""
    version: int
    """Raised whenever the same recipe would give other rows, or a default of the config changes."""
    config: type[C]
    compute: Callable[[StageTask[C, R]], None]
    schemas: Mapping[str, pa.Schema] = field(default_factory=dict)
    """Schemas of the datasets that it writes or reads and that `pipeline.schema` lacks."""
    wants: tuple[str, ...] = ()
    """What it needs from the run besides its config: ``seed``, ``iteration``. Part of the recipe."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """The artifacts of a stage, and whether they existed before."""

    outputs: Mapping[str, Artifact]
    reused: bool

    @property
    def main(self) -> Artifact:
        return list(self.outputs.values())[-1]


@dataclass(frozen=True, slots=True)
class StageCall(Generic[C, R]):
    """One stage, bound to its config, inputs and places: what can be hashed, reused or run."""

    stage: Stage[C, R]
    config: C
    inputs: Mapping[str, Artifact]
    places: Mapping[str, Path]
    """Dataset -> directory; the last is the main one, whose existence means that the stage is done."""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def recipe_parts(self) -> Recipe:
        """Return everything that decides the result, in readable form; its hash is the recipe."""
        parameters = dict(self.parameters)
        assert parameters.keys().isdisjoint(type(self.config).model_fields), "a parameter would hide a setting"
        inputs = {name: artifact.digest for name, artifact in self.inputs.items()}
        settings = {**self.config.model_dump(mode="json"), **parameters}
        return Recipe(self.stage.name, self.stage.version, {**chosen(self.config), **parameters}, inputs, settings)

    def recipe(self) -> str:
        """Return the hash of everything that decides the result."""
        return recipe_hash(self.recipe_parts())


def run_stage(call: StageCall[C, R], resources: R, progress: Progress = silent) -> StageResult:
    """Return the stage's artifacts: the finished ones when their recipe matches, else freshly computed.

    Secondary outputs of a stage whose main output is missing are debris of a killed process and are made again.

    Raises:
        RecipeMismatch: when a finished artifact of another recipe is in the main output's place.
        OutOfSpace: when the device is full; nothing half-written is left.
    """
    finished = find_finished(call)
    if finished is not None:
        return finished
    recipe = call.recipe()
    schemas = {**SCHEMAS, **call.stage.schemas}
    writers = {name: ArtifactWriter(place, name, recipe, schemas.get(name)) for name, place in call.places.items()}
    for artifact in call.inputs.values():
        artifact.fetch()
    check_inputs(call)
    for writer in writers.values():
        if is_finished(writer.place):
            remove_artifact(writer.place)
        writer.open()
    task = StageTask(call.config, call.parameters, call.inputs, writers, recipe, resources, progress)
    try:
        with explain_full_device(next(iter(call.places.values()))):
            call.stage.compute(task)
        sealed = {
            name: writer.seal(
                stage=call.stage.name,
                stage_version=call.stage.version,
                config=dict(call.recipe_parts().settings),
                chosen=dict(call.recipe_parts().chosen),
                inputs=dict(call.inputs),
                environment=environment(),
            )
            for name, writer in writers.items()
        }
    except OutOfSpace:
        for writer in writers.values():
            writer.drop_unfinished()  # a partial checkpoint takes space that others need
        raise
    return StageResult(sealed, reused=False)


def check_inputs(call: StageCall[Any, Any]) -> None:
    """Check that what a stage reads is there and has the documented columns, as far as it is here. Read-only.

    Raises:
        ArtifactMissing: when a file was pruned.
        ArtifactDamaged: when a file is gone or has another size.
        SchemaError: when columns differ from the documented ones.
    """
    for artifact in call.inputs.values():
        artifact.check_sizes()
        if all(path.is_file() for path in artifact.files()):  # else on a store
            artifact.check_schema({**SCHEMAS, **call.stage.schemas})


def find_finished(call: StageCall[Any, Any]) -> StageResult | None:
    """Return the finished artifacts of this recipe, or None when the main one does not exist. Read-only.

    Raises:
        RecipeMismatch: when another recipe's artifact is there.
        ArtifactDamaged: when its rows differ from its manifest. Checkpoints are verified only when they are read.
    """
    main = list(call.places.values())[-1]
    if not is_finished(main):
        return None
    outputs = {name: open_artifact(place) for name, place in call.places.items()}
    for artifact in outputs.values():
        if artifact.manifest.recipe != call.recipe():
            raise RecipeMismatch(
                f"{artifact.path} is taken by an artifact of another recipe ({_difference(call, artifact)}): "
                "finished artifacts are never overwritten; use a new run directory, or go back to the old settings"
            )
        if artifact.files():
            artifact.verify()
        else:
            artifact.check_sizes(is_read=False)
    return StageResult(outputs, reused=True)


def _difference(call: StageCall[Any, Any], found: Artifact) -> str:
    """Return the first difference between a finished artifact's recipe and the wanted one."""
    for part, name, was, now in recipe_differences(found.manifest.recipe_parts(), call.recipe_parts()):
        if part == "stage":
            return f"stage {was}, wanted {now}"
        if part == "config":
            return f"{call.stage.name}.{name} was {canonical_json(was)}, now {canonical_json(now)}"
        return f"its input {name} was {str(was)[:12]}, now {str(now)[:12]}"
    return "its recipe cannot be read from its manifest"
