"""update: batches and a policy -> the next policy and a record of what happened to every row.

The order, the microbatches and the denominators are in the batches; this stage only does the arithmetic of `grpo`.
The next policy holds what transformers and vLLM load as it stands; the optimizer's state becomes an artifact of its own
(stages/optimizer.py).
"""

from pipeline.stage import Stage, StageTask
from stages.checkpoints import copy_tokenizer
from stages.trainers.base import UpdateConfig
from stages.trainers.local import Trainer, train


def compute(task: StageTask[UpdateConfig, Trainer]) -> None:
    """Train on the batches. ``task.resources`` is a `Trainer` at the policy."""
    from grpo.policy import save_policy

    policy, trainer = task.inputs["policy"], task.resources
    model, _ = trainer.at(policy)
    records, steps = train(trainer, task.inputs["batches"], task.config, task.progress)
    save_policy(model, task.writer.directory)
    copy_tokenizer(policy.path, task.writer.directory)
    task.writers["training_records"].write_part(0, records)
    task.writers["optimizer_steps"].write_part(0, steps)


STAGE = Stage("update", version=2, config=UpdateConfig, compute=compute)
