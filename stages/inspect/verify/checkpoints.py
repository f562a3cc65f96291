"""Verifies checkpoints: policies and optimizer states against those they were updated from."""

from functools import partial
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.reading import shorten
from stages.checkpoints import OPTIMIZER_FILE, STATE_FILE, TOKENIZER_FILES, Header, read_header, weight_names
from stages.inspect.verify.files import Catalog, Located, policy_key
from stages.inspect.verify.ledger import Ledger


def check_policies(ledger: Ledger, catalog: Catalog, sound: set[Path]) -> None:
    """Compare tokenizer and tensor shapes of each policy with those of the one it was updated from. Read-only."""
    policies = [(key, item) for key, item in catalog.items() if item.where.dataset == "policy"]
    for (index, _), item in policies:
        parent = catalog.get(policy_key(index) or (None, ""))
        if parent is None or not {item.artifact.path, parent.artifact.path} <= sound:
            continue
        ledger.checked("policies")
        ledger.attempt("policies", item.where, partial(_check_policy, ledger, item, parent))


def _check_policy(ledger: Ledger, item: Located, parent: Located) -> None:
    ours, theirs = item.artifact.manifest.files, parent.artifact.manifest.files
    for name in TOKENIZER_FILES:
        if ours.get(name, {}).get("sha256") != theirs.get(name, {}).get("sha256"):
            ledger.wrong("policies", item.where, f"it differs from that of {parent.where.path}", part=name)
    _compare_tensors(ledger, item, parent)


def _compare_tensors(ledger: Ledger, item: Located, parent: Located) -> bool:
    """Return whether both can be read."""
    try:
        ours, theirs = _tensors(item.artifact), _tensors(parent.artifact)
    except ValueError as error:
        ledger.wrong("policies", item.where, f"its tensors cannot be read: {error}")
        return False
    if ours and theirs and ours != theirs:
        odd = sorted({name for name, _ in ours.items() ^ theirs.items()})
        text = f"names, types or shapes of tensors differ from {parent.where.path}: {shorten(odd)}"
        ledger.wrong("policies", item.where, text)
    return True


def _tensors(artifact: Artifact) -> dict[str, str]:
    """Return type and shape of every tensor by its name; none where they are pruned."""
    paths = [artifact.path / name for name in weight_names(artifact.manifest.files)]
    headers = [header for path in paths if (header := _header(path)) is not None]
    return {name: f"{dtype} {header.shapes[name]}" for header in headers for name, dtype in header.dtypes.items()}


def _header(path: Path) -> Header | None:
    """Return the header of a file, None where it is pruned, perhaps just now: the run may go on."""
    try:
        return read_header(path) if path.is_file() else None
    except (ValueError, FileNotFoundError):
        if path.is_file():
            raise
        return None


def check_states(ledger: Ledger, catalog: Catalog, sound: set[Path]) -> None:
    """Compare the tensors' shapes and the steps taken of each optimizer state with the one before it. Read-only."""
    for (index, dataset), item in catalog.items():
        if dataset != "optimizer" or index is None or item.artifact.path not in sound:
            continue
        ledger.checked("policies")
        ledger.attempt("policies", item.where, partial(_check_state, ledger, catalog, sound, index, item))


def _check_state(ledger: Ledger, catalog: Catalog, sound: set[Path], index: int, item: Located) -> None:
    key, file = ((index - 1, "optimizer"), STATE_FILE) if index else ((None, "initial_policy"), OPTIMIZER_FILE)
    before, steps = catalog.get(key), catalog.get((index, "optimizer_steps"))
    if before is None or steps is None or before.artifact.path not in sound:
        return
    if index and not _compare_tensors(ledger, item, before):
        return
    try:
        taken, earlier = _num_steps(item.artifact, STATE_FILE), _num_steps(before.artifact, file)
    except (ValueError, LookupError) as error:
        ledger.wrong("policies", item.where, f"its tensors cannot be read: {error}")
        return
    if taken is not None and earlier is not None and taken != earlier + (steps.artifact.manifest.rows or 0):
        text = f"{taken} steps taken, expected {earlier} and the {steps.artifact.manifest.rows} of this iteration"
        ledger.wrong("policies", item.where, text)


def _num_steps(artifact: Artifact, name: str) -> int | None:
    """Return the optimizer steps behind a state, 0 where an optimizer begins, None where the file is pruned."""
    if name not in artifact.manifest.files:
        return 0
    header = _header(artifact.path / name)
    return None if header is None else int(header.metadata["num_steps"])
