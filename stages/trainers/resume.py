"""Bringing a trainer to a policy of the run."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from grpo.settings import UpdateConfig
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import PolicyError
from pipeline.files import explain_full_device
from pipeline.prune import has_weights, last_resumable
from pipeline.run_dir import RunDir, state_of
from stages.checkpoints import OPTIMIZER_FILE, STATE_FILE
from stages.trainers.base import Trainer

COMPARED = "grpo-weights-"


def resume(
    trainer: Trainer,
    run: RunDir,
    config: UpdateConfig,
    num_updates: int,
    note: Callable[[str], None] = lambda _: None,
    scratch: Path | None = None,
    *,
    is_stored: bool = True,
) -> None:
    """Bring the trainer to the policy after ``num_updates`` updates of the run, unless it is there already.

    Args:
        trainer: changed in place.
        run: holds policies, states and batches; read only.
        config: of the updates.
        num_updates: iterations behind the policy; 0 = the initial one.
        note: called when stored batches are trained on again.
        scratch: folder for the weights that are compared; None = the system's temporary folder.
        is_stored: the policy's weights must be on disk. False = dropped ones are made again from the last policy before
            that has its weights and its state, and compared by the hash in the manifest.

    Raises:
        PolicyError: when training again gives other weights than those stored, as on another kind of machine.
        ArtifactError: when a checkpoint that is needed was pruned, or is damaged.
    """
    policy = open_artifact(run.policy_before(num_updates))
    if trainer.is_at(policy):
        return
    if is_stored or has_weights(policy):
        policy.fetch()
        policy.check_sizes()
    first = last_resumable(run, num_updates)
    _load(trainer, open_artifact(run.policy_before(first)), config)
    if first == num_updates:
        return
    note(f"no state of the optimizer after {num_updates} updates: training again from that after {first}")
    for iteration in range(first, num_updates):
        made_with = open_artifact(run.policy_before(iteration + 1)).manifest.inputs
        logprobs = run.open(iteration, "logprobs") if "logprobs" in made_with else None
        trainer.train(run.open(iteration, "batches"), logprobs, config)
    check_equal(trainer, policy, first, scratch)


def resumed_from(run: RunDir, num_updates: int) -> int:
    """Return after how many updates training resumes, to come to the policy after ``num_updates``. Read-only.

    It is the last policy with weights and an optimizer state; stored batches are trained on from there.

    Raises:
        ArtifactError: when a checkpoint that is needed was pruned, or is damaged.
    """
    open_artifact(run.policy_before(num_updates)).check_sizes()
    first = last_resumable(run, num_updates)
    policy = open_artifact(run.policy_before(first))
    for artifact in (policy, state_of(policy)):
        if artifact is not None:
            artifact.check_sizes()
    return first


def _load(trainer: Trainer, policy: Artifact, config: UpdateConfig) -> None:
    policy.fetch()
    policy.check_sizes()
    state = state_of(policy)
    if state is not None:
        state.fetch()
        state.check_sizes()
        trainer.load(policy, state.path / STATE_FILE, config)
    elif OPTIMIZER_FILE in policy.manifest.files:  # a fork's initial policy holds the state
        trainer.load(policy, policy.path / OPTIMIZER_FILE, config)
    else:
        trainer.load(policy, None, config)


def check_equal(trainer: Trainer, policy: Artifact, first: int, scratch: Path | None = None) -> None:
    """Check that the trainer's weights are the policy's; afterwards the trainer is at that policy.

    Files are compared by their bytes: tensors in memory may be named and cut otherwise.

    Raises:
        PolicyError: when they differ.
    """
    for left in scratch.glob(f"{COMPARED}*") if scratch else ():
        shutil.rmtree(left)  # left by a killed process
    room = scratch or Path(tempfile.gettempdir())
    with explain_full_device(room), tempfile.TemporaryDirectory(prefix=COMPARED, dir=room) as folder:
        trainer.save_policy(Path(folder), policy.manifest.recipe)
    if not trainer.is_at(policy):
        raise PolicyError(
            f"the optimizer's state that belongs to {policy.path} is not there, and training again from the policy "
            f"after {first} updates gives other weights than those stored: expected a machine of the same kind with "
            f"the same versions (grpo replay says what differs); go on there, or, to go on here, delete the policy of "
            f"iteration {first} and everything that was made after it"
        )
