"""update: batches and a policy -> the next policy and a record of what happened to every row.

The order, the microbatches and the denominators are in the batches; this stage only does the arithmetic of `grpo`. The
input logprobs, where there is one, has the numbers of the proximal policy, of the reference, or of both. transformers
and vLLM load the next policy as it is; the optimizer's state becomes an artifact of its own (stages/optimizer.py).
"""

from grpo.settings import UpdateConfig
from pipeline.stage import Stage, StageTask
from stages.checkpoints import copy_tokenizer
from stages.trainers.base import Trainer


def compute(task: StageTask[UpdateConfig, Trainer]) -> None:
    """Train on the batches. ``task.resources`` is a `Trainer` at the policy; afterwards it is at the next one."""
    policy, trainer = task.inputs["policy"], task.resources
    assert trainer.is_at(policy), f"the trainer is not at {policy.path}: resume it first"
    records, steps = trainer.train(task.inputs["batches"], task.inputs.get("logprobs"), task.config, task.progress)
    trainer.save_policy(task.writer.directory, task.recipe)
    copy_tokenizer(policy.path, task.writer.directory)
    task.writers["training_records"].write_part(0, records)
    task.writers["optimizer_steps"].write_part(0, steps)


STAGE = Stage("update", version=4, config=UpdateConfig, compute=compute)
