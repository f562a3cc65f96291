"""optimizer: the optimizer's state after an update -> an artifact beside the policy.

Nothing is made from this artifact: the policy's recipe names the batches and the policy before it, back to the first,
and so vouches for the state too. Hence it may be written while the next iteration samples, and may be missing: after a
kill `resume` takes the last state that is there, and trains once more on the stored batches since.
"""

from collections.abc import Callable

from pipeline.artifact import Artifact, is_finished, open_artifact
from pipeline.config import StrictModel
from pipeline.errors import PolicyError
from pipeline.retention import pruned_files
from pipeline.run_dir import RunDir
from pipeline.stage import Stage, StageTask
from stages.policy import OPTIMIZER_FILE
from stages.update import Trainer, UpdateConfig, train

STATE_FILE = "state.safetensors"


class OptimizerConfig(StrictModel):
    """The stage has no settings."""


def compute(task: StageTask) -> None:
    """Write the state. ``task.resources`` is the `Trainer`, as it is after the policy's update."""
    from grpo.optimize import save_optimizer

    model, optimizer = task.resources.at(task.inputs["policy"])
    save_optimizer(optimizer, model, task.writer.directory / STATE_FILE)


def resume(
    trainer: Trainer,
    run: RunDir,
    config: UpdateConfig,
    num_updates: int,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Make the trainer's model and optimizer those after so many updates of the run; in memory they may be already.

    Args:
        trainer: changed in place.
        run: where policies, states and batches lie; read only.
        config: of the updates.
        num_updates: iterations behind the policy; 0 = the initial one.
        note: told when stored batches are trained on once more.

    Raises:
        PolicyError: when training once more gives other weights than those stored, as on another kind of machine.
        ArtifactError: when a checkpoint that is needed was pruned, or is damaged.
    """
    policy = open_artifact(run.policy_before(num_updates))
    if trainer.is_at(policy):
        return
    first = num_updates
    while first and _state_before(run, first) is None:
        first -= 1
    _load(trainer, run, config, first)
    if first == num_updates:
        return
    note(f"no state of the optimizer after {num_updates} updates: training again from that after {first}")
    for iteration in range(first, num_updates):
        train(trainer, run.open(iteration, "batches"), config)
    _check_equal(trainer, policy, first)
    trainer.digest = policy.digest


def _state_before(run: RunDir, num_updates: int) -> Artifact | None:
    """Return the state that belongs to the policy after so many updates, None where it is missing or pruned."""
    place = run.optimizer_before(num_updates)
    if place is None or not is_finished(place):
        return None
    state = open_artifact(place)
    return None if pruned_files(state) else state


def _load(trainer: Trainer, run: RunDir, config: UpdateConfig, num_updates: int) -> None:
    policy, state = open_artifact(run.policy_before(num_updates)), _state_before(run, num_updates)
    file = policy.fetch() / OPTIMIZER_FILE  # a fork's initial policy has brought it along
    policy.check_sizes()
    if state is not None:
        file = state.fetch() / STATE_FILE
        state.check_sizes()
    trainer.load(policy, file, config)


def _check_equal(trainer: Trainer, policy: Artifact, first: int) -> None:
    from grpo.policy import has_weights_of

    assert trainer.model is not None
    policy.fetch()
    policy.check_sizes()
    if not has_weights_of(trainer.model, policy.path):
        raise PolicyError(
            f"the optimizer's state that belongs to {policy.path} is not there, and training again from iteration "
            f"{first} on gives other weights than those stored: expected a machine of the same kind with the same "
            f"versions (grpo replay says what differs); continue on one, or delete {policy.path} and all that came "
            "after it, and it is made here"
        )


STAGE = Stage("optimizer", version=1, outputs=("optimizer",), compute=compute)
