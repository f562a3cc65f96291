"""Pruning: drops checkpoints of a run, never rows or manifests.

`pruned.json` in the artifact names the files before they are removed. A kill in between leaves the note and some of the
files; the same command removes the rest. The note hides no damage: a file that is still there is compared with its
manifest.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import PRUNED_NOTE, WEIGHTS, Artifact, open_artifact, pruned_files
from pipeline.errors import UsageError
from pipeline.files import sync_file, write_text
from pipeline.manifest import is_finished
from pipeline.parquet import explained
from pipeline.reading import inside
from pipeline.retention import RetentionConfig, kept_policies
from pipeline.run_dir import RunDir, state_of


@dataclass(frozen=True, slots=True)
class Pruned:
    """A policy, or the optimizer state next to it, whose files are dropped, or would be."""

    num_updates: int
    """Iterations behind the policy; 0 = the initial one."""
    artifact: Artifact
    files: tuple[str, ...]
    num_bytes: int


def has_weights(artifact: Artifact) -> bool:
    """Return whether every file of weights, or of an optimizer's state, is here or on a store. Read-only."""
    names = [name for name in artifact.manifest.files if name.endswith(WEIGHTS)]
    return artifact.is_on_store or all((artifact.path / name).is_file() for name in names)


def is_resumable(policy: Artifact) -> bool:
    """Return whether a policy has its weights and its optimizer state, so that training can continue. Read-only."""
    state = state_of(policy)
    return state is not None and has_weights(policy) and has_weights(state)


def last_resumable(run: RunDir, num_updates: int) -> int:
    """Return the number of updates behind the last policy, up to this one, from which training can continue.

    0 = the initial policy, whether its weights are there or not. Read-only.
    """
    while num_updates and not is_resumable(open_artifact(run.policy_before(num_updates))):
        num_updates -= 1
    return num_updates


def can_be_made_again(run: RunDir, num_updates: int) -> bool:
    """Return whether a dropped policy follows from one before it that is there, and the rows since. Read-only."""
    return has_weights(open_artifact(run.policy_before(last_resumable(run, num_updates))))


def num_finished(run: RunDir) -> int:
    """Return the number of iterations, from the first on, whose policy exists. Read-only."""
    done = 0
    while is_finished(run.policy_before(done + 1)):
        done += 1
    return done


def prunable(run: RunDir, rules: RetentionConfig, needed: Collection[int], *, initial: bool = False) -> list[Pruned]:
    """Return the checkpoints that may be dropped, oldest first, each policy after its optimizer state. Read-only.

    These policies stay: those of ``rules``; those after ``needed`` updates, which the next iterations load; the one
    that the next update begins with; the last one with an optimizer state, without which a run cannot continue. The
    initial policy stays unless ``initial``: without it a run can neither be continued nor replayed from its start. A
    policy in another run belongs to that run, and one that is not published yet stays.

    Raises:
        UsageError: when the initial policy is needed.
        ArtifactDamaged: when a file lies behind a link, perhaps outside of the run, or the figures cannot be read.
    """
    existing = [n for n in _counts(run) if is_finished(run.policy_before(n))]
    resumable = (n for n in reversed(existing) if n == 0 or is_resumable(open_artifact(run.policy_before(n))))
    going_on = {num_finished(run), next(resumable, 0)}
    scores = evaluation_scores(run, rules.best_by) if rules.keep_best else {}
    kept = kept_policies(existing, rules, scores) | {*needed} | going_on
    if initial and 0 in kept:
        raise UsageError(
            f"the initial policy of {run.root} is among those that must stay (by a rule, for coming iterations, or as "
            "the last one with a state of the optimizer): leave --initial out"
        )
    with_state = kept if rules.states == "kept" else {*existing[-rules.keep_last :], *going_on}
    places = [
        (n, place)
        for n in existing
        for place, stay in ((run.optimizer_before(n), with_state), (run.policy_before(n), kept))
        if place is not None and n not in stay and (n or initial)
    ]
    found = (_pruned(run, n, place) for n, place in places if not _is_pruned(place) and is_finished(place))
    return [item for item in found if item is not None]


def evaluation_scores(run: RunDir, metric: str) -> dict[int, float]:
    """Return a figure of the evaluated policies, by the number of updates behind them. Read-only.

    The initial policy is not among them.

    Raises:
        ArtifactDamaged: when `metrics.parquet` cannot be read.
    """
    import polars as pl

    if not run.metrics.is_file():
        return {}
    figure = pl.col(metric).cast(pl.Float64)
    with explained(run.metrics, "delete it and start the run's own command again, which makes it of the artifacts"):
        table = run.read_metrics().select(pl.col("iteration").cast(pl.Int64), figure)
    return {iteration + 1: value for iteration, value in table.filter(figure.is_finite()).drop_nulls().rows()}


def _counts(run: RunDir) -> list[int]:
    return [0, *(index + 1 for index in run.iterations())]


def _is_pruned(place: Path) -> bool:
    """Return whether everything was dropped here before: the cheap answer for most of a long run."""
    return (place / PRUNED_NOTE).is_file() and not any(place.rglob(f"*{WEIGHTS}"))


def _pruned(run: RunDir, num_updates: int, place: Path) -> Pruned | None:
    artifact = open_artifact(place)
    is_own = artifact.path.resolve().is_relative_to(run.root.resolve())
    if not is_own or (run.copy is not None and not artifact.is_on_store):
        return None
    weights = [n for n in artifact.manifest.files if n.endswith(WEIGHTS)]
    files = tuple(n for n in weights if (artifact.path / n).is_file() and inside(artifact.path, n))
    size = sum((artifact.path / name).stat().st_size for name in files)
    return Pruned(num_updates, artifact, files, size) if files else None


def prune(items: Collection[Pruned]) -> Iterator[Pruned]:
    """Drop the files, and yield each checkpoint when it is done. The caller holds the run's lock."""
    for item in items:
        files = item.artifact.manifest.files
        noted = pruned_files(item.artifact) | set(item.files)
        note = {"files": {name: files[name]["sha256"] for name in sorted(noted)}}
        write_text(item.artifact.path / PRUNED_NOTE, json.dumps(note, indent=2) + "\n")
        sync_file(item.artifact.path)  # the note is on the device before the first file is removed
        for name in item.files:
            path = inside(item.artifact.path, name)
            path.unlink(missing_ok=True)
            if path.parent != item.artifact.path:
                with suppress(OSError):  # it has other files
                    path.parent.rmdir()
        yield item
