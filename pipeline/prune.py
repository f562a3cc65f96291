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
from pipeline.reading import inside
from pipeline.run_dir import RunDir, state_of


@dataclass(frozen=True, slots=True)
class Pruned:
    """A policy, or the optimizer state next to it, whose files are dropped, or would be."""

    num_updates: int
    """Iterations behind the policy; 0 = the initial one."""
    artifact: Artifact
    files: tuple[str, ...]
    num_bytes: int


def is_resumable(policy: Artifact) -> bool:
    """Return whether a policy has its weights and its optimizer state, so that training can continue. Read-only."""
    state = state_of(policy)
    return state is not None and all(_has_weights(artifact) for artifact in (policy, state))


def _has_weights(artifact: Artifact) -> bool:
    names = [name for name in artifact.manifest.files if name.endswith(WEIGHTS)]
    return not pruned_files(artifact) and (artifact.is_on_store or all((artifact.path / n).is_file() for n in names))


def prunable(run: RunDir, keep_policies: int, needed: Collection[int], *, initial: bool = False) -> list[Pruned]:
    """Return the checkpoints that may be dropped, oldest first, each policy after its optimizer state. Read-only.

    These policies stay: the last ``keep_policies``; those after ``needed`` updates, which the next iterations load; the
    last one with an optimizer state, without which a run cannot continue. The initial policy stays unless ``initial``:
    without it a run can neither be continued nor replayed from its start. A policy in another run belongs to that run.

    Raises:
        UsageError: when no policy would be kept, or the initial policy is needed.
        ArtifactDamaged: when a file lies behind a link, perhaps outside of the run.
    """
    if keep_policies < 1:
        raise UsageError(f"--keep-policies is {keep_policies}: the last policy is needed to continue; keep 1 or more")
    existing = [n for n in _counts(run) if is_finished(run.policy_before(n))]
    resumable = (n for n in reversed(existing) if n == 0 or is_resumable(open_artifact(run.policy_before(n))))
    kept = {*existing[-keep_policies:], *needed, next(resumable, 0)}
    if initial and 0 in kept:
        raise UsageError(
            f"the initial policy of {run.root} is among those that must stay (the last {keep_policies}, the members of "
            "coming groups, and the last one with a state of the optimizer): leave --initial out"
        )
    going = [n for n in existing if n not in kept and (n or initial)]
    places = [(n, place) for n in going for place in (run.optimizer_before(n), run.policy_before(n))]
    found = (_pruned(run, n, place) for n, place in places if place is not None and is_finished(place))
    return [item for item in found if item is not None]


def _counts(run: RunDir) -> list[int]:
    return [0, *(index + 1 for index in run.iterations())]


def _pruned(run: RunDir, num_updates: int, place: Path) -> Pruned | None:
    artifact = open_artifact(place)
    if not artifact.path.resolve().is_relative_to(run.root.resolve()):
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
