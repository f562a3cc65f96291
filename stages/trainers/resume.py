"""Bringing a trainer to a policy of the run."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import PolicyError
from pipeline.files import explain_full_device
from pipeline.prune import is_resumable
from pipeline.run_dir import RunDir, state_of
from stages.checkpoints import OPTIMIZER_FILE, STATE_FILE, weight_hashes, weight_names
from stages.trainers.base import UpdateConfig
from stages.trainers.local import Trainer, train

COMPARED = "grpo-weights-"


def resume(
    trainer: Trainer,
    run: RunDir,
    config: UpdateConfig,
    num_updates: int,
    note: Callable[[str], None] = lambda _: None,
    scratch: Path | None = None,
) -> None:
    """Make the trainer's model and optimizer those after so many updates of the run; in memory they may be already.

    Args:
        trainer: changed in place.
        run: where policies, states and batches lie; read only.
        config: of the updates.
        num_updates: iterations behind the policy; 0 = the initial one.
        note: told when stored batches are trained on once more.
        scratch: folder with room for the weights, for comparing them; None = the system's for temporary files.

    Raises:
        PolicyError: when training once more gives other weights than those stored, as on another kind of machine.
        ArtifactError: when a checkpoint that is needed was pruned, or is damaged.
    """
    policy = open_artifact(run.policy_before(num_updates))
    if trainer.is_at(policy):
        return
    policy.fetch()
    policy.check_sizes()
    first = num_updates
    while first and not is_resumable(open_artifact(run.policy_before(first))):
        first -= 1
    _load(trainer, open_artifact(run.policy_before(first)), config)
    if first == num_updates:
        return
    note(f"no state of the optimizer after {num_updates} updates: training again from that after {first}")
    for iteration in range(first, num_updates):
        train(trainer, run.open(iteration, "batches"), config)
    check_equal(trainer, policy, first, scratch)
    trainer.digest = policy.digest


def _load(trainer: Trainer, policy: Artifact, config: UpdateConfig) -> None:
    policy.fetch()
    policy.check_sizes()
    state = state_of(policy)
    if state is not None:
        state.fetch()
        state.check_sizes()
        trainer.load(policy, state.path / STATE_FILE, config)
    elif OPTIMIZER_FILE in policy.manifest.files:  # a fork's initial policy has brought it along
        trainer.load(policy, policy.path / OPTIMIZER_FILE, config)
    else:
        trainer.load(policy, None, config)


def check_equal(trainer: Trainer, policy: Artifact, first: int, scratch: Path | None = None) -> None:
    """Compare weights by the bytes of their files: what a model has in memory may be named and cut otherwise."""
    from grpo.policy import save_policy

    assert trainer.model is not None
    for left in scratch.glob(f"{COMPARED}*") if scratch else ():
        shutil.rmtree(left)  # by a killed process
    room = scratch or Path(tempfile.gettempdir())
    with explain_full_device(room), tempfile.TemporaryDirectory(prefix=COMPARED, dir=room) as folder:
        save_policy(trainer.model, folder)
        found = weight_hashes(Path(folder))
    files = policy.manifest.files
    if found != {name: files[name]["sha256"] for name in weight_names(files)}:
        raise PolicyError(
            f"the optimizer's state that belongs to {policy.path} is not there, and training again from the policy "
            f"after {first} updates gives other weights than those stored: expected a machine of the same kind with "
            f"the same versions (grpo replay says what differs); go on there, or, to go on here, delete the policy of "
            f"iteration {first} and everything that was made after it"
        )
