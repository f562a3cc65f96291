"""logprobs: batches and a policy -> the log probabilities of the trained rows under that policy.

An offline iteration takes them as those of the proximal policy: the one with which the consecutive offline iterations
began. The clip then bounds how far all of them together go, as it bounds the optimizer steps of one iteration; see
docs/decisions/0016.
"""

import polars as pl

from grpo.settings import ForwardConfig
from pipeline.stage import Stage, StageTask
from stages.trainers.base import Trainer

PROXIMAL = "proximal"


def compute(task: StageTask[ForwardConfig, Trainer]) -> None:
    """Write the logprobs. ``task.resources`` is a `Trainer`, which stays at its own policy."""
    policy = task.inputs["policy"]
    found = task.resources.logprobs(policy, task.inputs["batches"], task.config, task.progress)
    named = found.with_columns(policy_name=pl.lit(PROXIMAL), policy_digest=pl.lit(policy.digest))
    task.writer.write_part(0, named.select("completion_id", "policy_name", "policy_digest", "logprobs"))


STAGE = Stage("logprobs", version=1, config=ForwardConfig, compute=compute)
