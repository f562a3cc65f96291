"""The checks that ship: each looks at the rows of one iteration, and says which fail."""

import polars as pl

from stages.checks.config import (
    GroupsInform,
    JudgeAnswered,
    NoLeakedReference,
    NoRepetition,
    OffPolicy,
    RewardNotCollapsed,
)
from stages.checks.outcome import Frames, Outcome, judged
from stages.ngrams import names_reference, normalized, repeated_share

Shipped = JudgeAnswered | GroupsInform | NoRepetition | NoLeakedReference | RewardNotCollapsed | OffPolicy


def judge_answered(config: JudgeAnswered, frames: Frames) -> Outcome:
    """Return which rewards are null; too many of one function are a failure."""
    rewards = frames["rewards"]
    if config.reward is not None:
        rewards = rewards.filter(pl.col("reward_name") == config.reward)
    rows = rewards.select("completion_id", "reward_name", is_failed=pl.col("reward").is_null()).collect()
    shares = rows.group_by("reward_name", maintain_order=True).agg(pl.col("is_failed").mean())
    note = ", ".join(f"{name} {share:.1%}" for name, share in shares.iter_rows())
    highest = float(shares["is_failed"].max() or 0.0)  # type: ignore[arg-type]
    found = judged(rows, 1.0)
    is_passed = highest <= config.max_share
    return Outcome(found.num_rows, found.num_failed, found.failed_ids, is_passed, f"null rewards: {note or 'no rows'}")


def groups_inform(config: GroupsInform, frames: Frames) -> Outcome:
    """Return the members of groups of which no row is informative."""
    tells_nothing = pl.col("drop_reason").is_not_null().all().over("group_id")
    rows = frames["advantages"].select("completion_id", "group_id", is_failed=tells_nothing).collect()
    groups = rows.unique("group_id", keep="first")
    found = judged(rows, 1.0)
    silent = int(groups["is_failed"].sum())
    note = f"{silent:,} of {groups.height:,} groups tell nothing"
    is_passed = silent <= config.max_share * groups.height
    return Outcome(found.num_rows, found.num_failed, found.failed_ids, is_passed, note)


def no_repetition(config: NoRepetition, frames: Frames) -> Outcome:
    """Return the completions that repeat themselves; those too short to tell do not."""
    texts = frames["completions"].select("completion_id", pl.col("completion").str.head(config.characters)).collect()
    rows = texts.with_row_index("row")
    shares = repeated_share(rows, config.min_words, config.min_characters)
    is_repetitive = (pl.col("repeated") >= config.repeated).fill_null(False)
    marked = rows.join(shares, on="row", how="left", maintain_order="left").select(
        "completion_id", is_failed=is_repetitive
    )
    return judged(marked, config.max_share)


def no_leaked_reference(config: NoLeakedReference, frames: Frames) -> Outcome:
    """Return the completions of prompts that contain their own reference answer."""
    contents = pl.col("messages").list.eval(pl.element().struct.field("content")).list.join("\n", ignore_nulls=True)
    bare = normalized(pl.col("reference_answer")).str.strip_chars(" ")
    is_leaked = (bare.str.len_chars() >= config.min_characters) & names_reference(contents, pl.col("reference_answer"))
    asked = frames["prompts"].select("prompt_id", is_failed=is_leaked).unique("prompt_id", keep="first")
    rows = frames["completions"].select("completion_id", "prompt_id")
    return judged(rows.join(asked, on="prompt_id", how="left", maintain_order="left").collect(), config.max_share)


def reward_not_collapsed(config: RewardNotCollapsed, frames: Frames) -> Outcome:
    """Return the completions with the most common combined reward."""
    scored = frames["advantages"].select("completion_id", "reward").drop_nulls("reward").collect()
    if not scored.height:
        return Outcome(0, 0, [], True, "no completion is scored")
    counts = scored.group_by("reward").len().sort("len", "reward", descending=[True, False])
    most = counts["reward"][0]
    has_collapsed = counts["len"][0] > config.max_share * scored.height
    rows = scored.with_columns(is_failed=(pl.col("reward") == most) & has_collapsed)
    note = f"reward {most:.3g} for {counts['len'][0]:,} of {scored.height:,} scored completions"
    return judged(rows, config.max_share, note)


def off_policy(config: OffPolicy, frames: Frames, iteration: int, *, is_offline: bool) -> Outcome:
    """Return the rows of a policy that is too old; all of them when the update before went too far from its sampler."""
    notes, age = [], iteration - pl.col("policy_iteration")
    is_old = pl.lit(False)
    if config.max_age is not None and not is_offline:
        is_old = age.is_null() | (age > config.max_age)
    rows = frames["completions"].select("completion_id", age=age, is_failed=is_old).collect()
    if config.max_age is not None:
        oldest = rows["age"].max()
        unknown = rows["age"].null_count()
        notes.append("no age: offline" if is_offline else f"age at most {oldest!s}, {unknown:,} unknown")
    kl = _kl_before(frames)
    if config.max_kl is not None:
        notes.append("no KL is known yet" if kl is None else f"KL to the sampler {kl:.3g} in the update before")
        if kl is not None and kl > config.max_kl:
            return judged(rows.with_columns(is_failed=pl.lit(True)), 0.0, "; ".join(notes))
    return judged(rows, config.max_share, "; ".join(notes))


def _kl_before(frames: Frames) -> float | None:
    """Return the mean over the known tokens of kl_to_sampler in the update before, None when nothing is known."""
    if "training_records" not in frames:
        return None
    known = pl.col("known_tokens").filter(pl.col("kl_to_sampler").is_not_null())
    sums = frames["training_records"].select(kl=(pl.col("kl_to_sampler") * pl.col("known_tokens")).sum(), n=known.sum())
    total, tokens = sums.collect().row(0)
    return float(total / tokens) if tokens else None


def check_shipped(config: Shipped, frames: Frames, iteration: int, *, is_offline: bool) -> Outcome:
    """Return the outcome of a check that ships."""
    match config:
        case JudgeAnswered():
            return judge_answered(config, frames)
        case GroupsInform():
            return groups_inform(config, frames)
        case NoRepetition():
            return no_repetition(config, frames)
        case NoLeakedReference():
            return no_leaked_reference(config, frames)
        case RewardNotCollapsed():
            return reward_not_collapsed(config, frames)
        case OffPolicy():
            return off_policy(config, frames, iteration, is_offline=is_offline)
