"""The audit of checkpoints: policies and optimizer states against those they were updated from."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from stages.checkpoints import OPTIMIZER_FILE, STATE_FILE
from stages.inspect.verify.files import Catalog, Located, policy_key
from stages.inspect.verify.ledger import Findings, shorten

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, struct.error)
"""What a header raises that is none."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json")


def check_policies(findings: Findings, catalog: Catalog, sound: set[Path]) -> None:
    """Compare tokenizer and tensor shapes of each policy with those of the one it was updated from. Read-only."""
    policies = [(key, item) for key, item in catalog.items() if item.where.dataset == "policy"]
    for (index, _), item in policies:
        parent = catalog.get(policy_key(index) or (None, ""))
        if parent is None or not {item.artifact.path, parent.artifact.path} <= sound:
            continue
        findings.checked("policies")
        ours, theirs = item.artifact.manifest.files, parent.artifact.manifest.files
        for name in TOKENIZER_FILES:
            if (name in ours, ours.get(name, {}).get("sha256")) != (name in theirs, theirs.get(name, {}).get("sha256")):
                findings.wrong("policies", item.where, f"it differs from that of {parent.where.path}", part=name)
        _compare_tensors(findings, item, parent)


def _compare_tensors(findings: Findings, item: Located, parent: Located) -> bool:
    """Return whether both can be read."""
    try:
        shapes = dict(_tensors(item.artifact)), dict(_tensors(parent.artifact))
    except UNREADABLE as error:
        findings.wrong("policies", item.where, f"its tensors cannot be read: {error}")
        return False
    if shapes[0] and shapes[1] and shapes[0] != shapes[1]:
        odd = sorted(str(name) for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        text = f"names, types or shapes of tensors differ from {parent.where.path}: {shorten(sorted(set(odd)))}"
        findings.wrong("policies", item.where, text)
    return True


def check_states(findings: Findings, catalog: Catalog, sound: set[Path]) -> None:
    """Compare the tensors' shapes and the steps taken of each optimizer state with the one before it. Read-only."""
    for (index, dataset), item in catalog.items():
        if dataset != "optimizer" or index is None or item.artifact.path not in sound:
            continue
        findings.checked("policies")
        key, file = ((index - 1, "optimizer"), STATE_FILE) if index else ((None, "initial_policy"), OPTIMIZER_FILE)
        before, steps = catalog.get(key), catalog.get((index, "optimizer_steps"))
        if before is None or steps is None or before.artifact.path not in sound:
            continue
        if index and not _compare_tensors(findings, item, before):
            continue
        try:
            taken, earlier = _num_steps(item.artifact, STATE_FILE), _num_steps(before.artifact, file)
        except UNREADABLE as error:
            findings.wrong("policies", item.where, f"its tensors cannot be read: {error}")
            continue
        if taken is not None and earlier is not None and taken != earlier + (steps.artifact.manifest.rows or 0):
            text = f"{taken} steps taken, expected {earlier} and the {steps.artifact.manifest.rows} of this iteration"
            findings.wrong("policies", item.where, text)


def _num_steps(artifact: Artifact, name: str) -> int | None:
    """Return the optimizer steps behind a state, 0 where an optimizer begins, None where the file is pruned."""
    if name not in artifact.manifest.files:
        return 0
    path = artifact.path / name
    return int(_header(path)["__metadata__"]["num_steps"]) if path.is_file() else None


def _tensors(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Yield name and type with shape of every tensor; nothing where they are pruned."""
    for name in artifact.manifest.files:
        path = artifact.path / name
        if name.endswith(".safetensors") and "/" not in name and path.is_file():
            yield from ((k, f"{f['dtype']} {f['shape']}") for k, f in _header(path).items() if k != "__metadata__")


def _header(path: Path) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors.

    Raises:
        ValueError: when the file is not as long as that says; others for a header that is none.
    """
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} has a header of {length} bytes, more than the file")
        header: dict[str, Any] = json.loads(file.read(length))
    ends = [facts["data_offsets"][1] for tensor, facts in header.items() if tensor != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError(f"{path.name} does not end with its last tensor")
    return header
