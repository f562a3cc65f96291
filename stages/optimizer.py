"""optimizer: the optimizer's state after an update -> an artifact next to the policy.

No update's recipe names this artifact: the recipe of the policy names its batches and the policy before it, back to the
first, and so determines the state too. The state may therefore be written while the next iteration samples, and may be
missing: after a kill `resume` loads the last stored state and trains again on the batches since.
"""

from contextlib import suppress

from pipeline.artifact import Artifact
from pipeline.config import StrictModel
from pipeline.errors import ArtifactMissing
from pipeline.object_store import url_of
from pipeline.run_dir import state_of
from pipeline.stage import Stage, StageTask
from stages.checkpoints import STATE_FILE
from stages.trainers.base import Trainer


class OptimizerConfig(StrictModel):
    """The stage has no settings."""


def compute(task: StageTask[OptimizerConfig, Trainer]) -> None:
    """Write the state. ``task.resources`` is the `Trainer`, as it is after the policy's update."""
    policy, trainer = task.inputs["policy"], task.resources
    assert trainer.is_at(policy), f"the trainer is not at {policy.path}: resume it first"
    trainer.save_state(task.writer.directory / STATE_FILE)


def state_beside(policy: Artifact) -> Artifact:
    """Return the optimizer's state that belongs to the policy of a run; one on a store is downloaded.

    Raises:
        ArtifactMissing: when it is not there.
    """
    place = policy.path.with_name(STAGE.name)
    url = url_of(place)
    if url is not None and state_of(policy) is None:
        from pipeline.working_copy import bring

        with suppress(ArtifactMissing):
            bring(url)
    state = state_of(policy)
    if state is None:
        raise ArtifactMissing(
            f"{place} is not the optimizer's state that belongs to {policy.path}: make it again (grpo stage optimizer "
            "RUN --iteration N), put it there if the policy is a copy, or begin with a new optimizer "
            "(policy.keep_optimizer = false)"
        )
    return state


STAGE = Stage("optimizer", version=1, config=OptimizerConfig, compute=compute)
