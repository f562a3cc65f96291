"""logprobs: completions and policies -> the log probabilities of the completions under each of them.

The names say what they are for. ``proximal``: an offline iteration compares with the policy with which the consecutive
offline iterations began, so that the clip bounds how far all of them together go (docs/decisions/0016). ``reference``:
the policy to which [update.kl] holds the one that trains. ``current``: the policy with which the iteration begins, by
which a baseline weighs the answers of others.
"""

import polars as pl
from pydantic import Field

from grpo.batching import cut_microbatches
from grpo.groups import differ
from grpo.settings import ForwardConfig
from pipeline.stage import Progress, Stage, StageTask
from stages.trainers.base import Trainer

PROXIMAL, REFERENCE, CURRENT = "proximal", "reference", "current"
NEEDED = ("completion_id", "group_id", "prompt_token_ids", "completion_token_ids", "loss_mask", "temperature")
UNREAD = {
    "sampling_logprobs": pl.lit(None, pl.List(pl.Float32)),
    "advantage": pl.lit(0.0),
    "loss_denominator": pl.lit(1.0),
}
"""Columns that a microbatch has and no forward reads."""


class LogprobsConfig(ForwardConfig):
    """Config of the logprobs stage: that of the update's forwards."""

    microbatch_tokens: int = Field(8192, ge=1)
    """Padded tokens (rows x longest row) of a forward pass, as in the batch."""


def forward_rows(completions: pl.DataFrame, rewards: pl.DataFrame | None, microbatch_tokens: int) -> pl.DataFrame:
    """Return the completions that may train, in the order and the microbatches of a forward.

    With rewards, groups in which no reward differs are left out: they have zero variance whatever the weights are, and
    do not train.
    """
    rows = completions
    if rewards is not None:
        reward = pl.col("reward")
        tells = rewards.group_by("group_id", "reward_name").agg(
            (differ(reward).fill_null(False) | reward.null_count().is_between(1, pl.len() - 1)).alias("tells")
        )
        rows = rows.join(tells.filter("tells").select("group_id").unique(), on="group_id", how="semi")
    rows = rows.with_columns(
        num_tokens=pl.col("prompt_token_ids").list.len() + pl.col("completion_token_ids").list.len()
    )
    rows = rows.sort("num_tokens", "completion_id")
    microbatch = cut_microbatches(rows["num_tokens"].to_list(), microbatch_tokens)
    return rows.with_columns(
        optimizer_step=pl.lit(0, pl.Int32), microbatch=pl.Series(microbatch, dtype=pl.Int32), **UNREAD
    )


def compute(task: StageTask[LogprobsConfig, Trainer]) -> None:
    """Write the logprobs. ``task.resources`` is a `Trainer`, which stays at its own policy."""
    completions = task.inputs["completions"].scan().select(NEEDED).collect()
    rewards = None if task.parameters.get("every_group") else task.inputs["rewards"].scan().collect()
    rows = forward_rows(completions, rewards, task.config.microbatch_tokens)
    policies = {name.partition(":")[2]: found for name, found in task.inputs.items() if name.startswith("policy:")}
    found: dict[str, pl.DataFrame] = {}  # several names may be those of one policy
    for part, (name, policy) in enumerate(policies.items()):
        if policy.digest not in found:
            progress = _share(task.progress, part, len(policies))
            found[policy.digest] = task.resources.logprobs(policy, rows, task.config, progress)
        named = found[policy.digest].with_columns(policy_name=pl.lit(name), policy_digest=pl.lit(policy.digest))
        task.writer.write_part(part, named.select("completion_id", "policy_name", "policy_digest", "logprobs"))


def _share(progress: Progress, part: int, parts: int) -> Progress:
    """Return the progress of one of several equal parts."""
    return lambda done, total, text="": progress(part * total + done, parts * total, text)


STAGE = Stage("logprobs", version=2, config=LogprobsConfig, compute=compute)
