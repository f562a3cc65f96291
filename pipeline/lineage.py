"""Lineage: what an artifact was made from, which rows made a policy, which policies a completion helped to train."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ArtifactDamaged, ArtifactMissing, UsageError
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Node:
    """An artifact in the tree of what another one was made from."""

    depth: int
    name: str
    """Its input name in the artifact above it; empty for the first."""
    artifact: Artifact
    is_repeated: bool
    """It was yielded before; its inputs are not yielded again."""


def ancestry(artifact: Artifact, depth: int | None = None) -> Iterator[Node]:
    """Yield the artifact and everything it was made from, each before its own inputs. Read-only.

    Args:
        artifact: where the chain ends.
        depth: largest depth of the tree; None = back to the first prompt.

    Raises:
        ArtifactMissing: when an input is gone.
        ArtifactDamaged: when another artifact is in an input's place.
    """
    seen: set[str] = set()
    stack = [Node(0, "", artifact, is_repeated=False)]
    while stack:
        node = stack.pop()
        digest = node.artifact.digest
        yield Node(node.depth, node.name, node.artifact, is_repeated=digest in seen)
        if digest in seen or node.depth == depth:
            continue
        seen.add(digest)
        inputs = [Node(node.depth + 1, name, a, is_repeated=False) for name, a in open_inputs(node.artifact).items()]
        stack += reversed(inputs)


def open_inputs(artifact: Artifact) -> dict[str, Artifact]:
    """Return the artifacts that this one was made from, by input name. Read-only.

    Raises:
        ArtifactMissing: when one is gone.
        ArtifactDamaged: when another one is in its place.
    """
    found = {}
    for name, facts in artifact.manifest.inputs.items():
        # relative to this artifact, so that a run can be moved
        source = open_artifact(Path(os.path.normpath(artifact.path.resolve() / facts["path"])))
        if source.digest != facts["digest"]:
            raise ArtifactDamaged(
                f"{artifact.path} was made from {name} {facts['digest'][:16]}, but {source.path} is "
                f"{source.digest[:16]}: it was replaced; restore it from a copy (see grpo verify)"
            )
        found[name] = source
    return found


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """One update: the policy that it made, and from what."""

    policy: Artifact
    parent: Artifact
    batches: Artifact
    num_rows: int
    """Completions that trained."""
    num_dropped: int


def updates_of(policy: Artifact) -> Iterator[TrainedOn]:
    """Yield the updates behind a policy, the last one first, with their numbers of rows. Read-only."""
    while {"batches", "policy"} <= set(policy.manifest.inputs):
        inputs = open_inputs(policy)
        rows = inputs["batches"].scan().select("completion_id", is_kept=pl.col("drop_reason").is_null())
        counts = rows.group_by("is_kept").agg(pl.col("completion_id").n_unique()).collect()
        number = dict(counts.iter_rows())
        yield TrainedOn(policy, inputs["policy"], inputs["batches"], number.get(True, 0), number.get(False, 0))
        policy = inputs["policy"]


@dataclass(frozen=True, slots=True)
class Step:
    """One fact about a completion: the artifact that holds it, and what it says."""

    what: str
    artifact: Artifact
    says: str


def trace(run: RunDir, completion_id: str) -> list[Step]:
    """Return the history of a completion: its prompt, its author, its rewards, and every policy it helped to train.

    Those are the policy whose update trained on the row, and each later policy that descends from it. Read-only.

    Raises:
        UsageError: when the run has no completion, or several, whose id begins so.
    """
    iteration, full_id = find_completion(run, completion_id)
    is_it = pl.col("completion_id") == full_id
    completions = run.open(iteration, "completions")
    row = completions.scan().filter(is_it).collect().row(0, named=True)
    steps = []
    inputs = open_inputs(completions)
    if "prompts" in inputs:
        prompt = inputs["prompts"].scan().filter(pl.col("prompt_id") == row["prompt_id"]).collect().to_dicts()
        text = prompt[0]["messages"][-1]["content"] if prompt else "unknown"
        steps.append(Step("prompt", inputs["prompts"], f"{row['prompt_id']}: {text}"))
    for name, author in inputs.items():
        if author.digest == row["policy_digest"]:
            steps.append(Step("author", author, f"{name}, {_updates(row['policy_iteration'])}"))
    steps.append(Step("completion", completions, f"{row['finish_reason']}: {row['completion']}"))
    for dataset in ("rewards", "advantages", "batches", "training_records"):
        artifact = open_if_there(run, iteration, dataset)
        rows = artifact.scan().filter(is_it).collect().to_dicts() if artifact else []
        steps += [Step(dataset, artifact, _SAYS[dataset].format(**found)) for found in rows if artifact]
    return [*steps, *_trained(run, iteration, full_id)]


_SAYS = {
    "rewards": "{reward_name} = {reward} {error}",
    "advantages": "reward {reward} in a group of mean {group_reward_mean}: advantage {advantage}",
    "batches": "optimizer step {optimizer_step}, microbatch {microbatch}, row {row}, dropped: {drop_reason}",
    "training_records": "optimizer step {optimizer_step}: {num_tokens} tokens, share of the loss {loss}",
}


def open_if_there(run: RunDir, iteration: int, dataset: str) -> Artifact | None:
    """Return an artifact of an iteration; None if it does not exist, or is in another run that is gone. Read-only.

    Raises:
        ArtifactDamaged: when another artifact is in its place.
    """
    try:
        return run.open(iteration, dataset)
    except ArtifactMissing:
        return None


def _updates(count: int | None) -> str:
    return "from outside the run" if count is None else f"after {count} updates"


def find_completion(run: RunDir, completion_id: str, iteration: int | None = None) -> tuple[int, str]:
    """Return the iteration and the full id of the completion whose id begins with ``completion_id``. Read-only.

    Raises:
        UsageError: when the run, or the iteration, has none or several.
    """
    found: set[tuple[int, str]] = set()
    for index in run.iterations() if iteration is None else [iteration]:
        if completions := open_if_there(run, index, "completions"):
            ids = completions.scan().select("completion_id")
            matching = ids.filter(pl.col("completion_id").str.starts_with(completion_id)).head(1000).collect()
            found |= {(index, name) for name in matching["completion_id"]}
    found = {item for item in found if item[1] == completion_id} or found
    if len(found) != 1:
        where = "" if iteration is None else f"iteration {iteration} of "
        raise UsageError(
            f"{where}{run.name} has {len(found) or 'no'} completions whose id begins with {completion_id!r}, expected "
            "one: see `grpo rows RUN completions -c completion_id`"
        )
    return next(iter(found))


def _trained(run: RunDir, iteration: int, completion_id: str) -> Iterator[Step]:
    """Yield every policy of the run that the completion helped to train, in order."""
    helped: set[str] = set()
    for index in (i for i in run.iterations() if i >= iteration):
        if not is_finished(run.policy_before(index + 1)):
            continue
        policy = open_artifact(run.policy_before(index + 1))
        inputs = {name: facts["digest"] for name, facts in policy.manifest.inputs.items()}
        batches = run.open(index, "batches")
        if index == iteration and inputs.get("batches") == batches.digest:
            used = batches.scan().filter((pl.col("completion_id") == completion_id) & pl.col("drop_reason").is_null())
            if len(used.head(1).collect()):
                helped.add(policy.digest)
                yield Step("trained", policy, "directly: the update trained on this row")
        elif inputs.get("policy") in helped:
            helped.add(policy.digest)
            yield Step("trained", policy, "by descent: the update began with a policy above")
