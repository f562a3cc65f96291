"""Verifies the chain: every manifest against its inputs, back to the first prompt, and against the run's config."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ArtifactError
from pipeline.manifest import canonical_json
from pipeline.run_dir import RunDir
from stages.inspect.verify.files import Catalog, Located, policy_key, relative_path
from stages.inspect.verify.ledger import Ledger, Where, shorten

OWN_TABLE = {
    "completions": "generate",
    "rewards": "score",
    "advantages": "normalize",
    "batches": "batch",
    "policy": "update",
    "training_records": "update",
    "optimizer_steps": "update",
    "prompts": "prompts",
}
"""Dataset of an iteration -> table of the config that decides it."""


REQUIRED_INPUTS = {
    "prompts": {"policy"},
    "held_out_prompts": {"policy"},
    "completions": {"prompts", "policy:"},
    "rewards": {"prompts", "completions"},
    "advantages": {"rewards"},
    "batches": {"completions", "advantages"},
    "training_records": {"batches", "policy"},
    "optimizer_steps": {"batches", "policy"},
    "policy": {"batches", "policy"},
    "optimizer": {"policy"},
    "evaluations": {"prompts", "policy"},
    "initial_evaluations": {"prompts", "policy"},
}
"""What each dataset is made from; ``policy:`` stands for one or more members."""

STAGE_OF = {
    "initial_policy": "policy",
    "held_out_prompts": "prompts",
    "prompts": "prompts",
    "completions": "generate",
    "rewards": "score",
    "advantages": "normalize",
    "batches": "batch",
    "training_records": "update",
    "optimizer_steps": "update",
    "policy": "update",
    "optimizer": "optimizer",
    "evaluations": "evaluate",
    "initial_evaluations": "evaluate",
}
"""The stage of this program that makes what stands in a place of a run; other stages' inputs are their own matter."""


def check_inputs(ledger: Ledger, run: RunDir, catalog: Catalog) -> list[Located]:
    """Compare every manifest with its inputs, back to the first prompt; return artifacts that lie outside of the run.

    Read-only.
    """
    known = {item.artifact.path.resolve(): item for item in catalog.values()}
    outside: dict[Path, Located] = {}
    queue = [(key, item) for key, item in catalog.items()]
    while queue:
        key, item = queue.pop(0)
        _check_kind(ledger, key, item)
        for name, facts in item.artifact.manifest.inputs.items():
            ledger.checked("inputs")
            place = Path(os.path.normpath(item.artifact.path.resolve() / str(facts.get("path"))))
            source = known.get(place) or outside.get(place)
            if source is None:
                source = _open_outside(ledger, run, item, name, place)
                if source is None:
                    continue
                outside[place] = source
                queue.append(((None, ""), source))
            digest = source.artifact.digest
            if digest != facts["digest"]:
                text = f"its input {name} is {facts['digest'][:16]}..., but {source.where.path} is {digest[:16]}..."
                ledger.wrong("inputs", item.where, text)
            elif item.is_own and (taken := _source_in_run(key, name, item.artifact)) is not None:
                wanted = catalog.get(taken)
                if wanted is not None and wanted.artifact.digest != digest:
                    text = f"its input {name} is {source.where.path}, expected {wanted.where.path}"
                    ledger.wrong("inputs", item.where, text)
    return list(outside.values())


def _check_kind(ledger: Ledger, key: tuple[int | None, str], item: Located) -> None:
    """Check that an artifact is of the kind that its place is for, and lacks no input of its stage."""
    manifest, place = item.artifact.manifest, key[1]
    kind = {"initial_policy": "policy", "held_out_prompts": "prompts", "initial_evaluations": "evaluations"}.get(
        place, "policy" if place.startswith("member ") else place
    )
    if kind and manifest.dataset != kind:
        ledger.wrong("manifests", item.where, f"it holds {manifest.dataset}, expected {kind}")
    if manifest.stage != STAGE_OF.get(place):
        return
    names = {"policy:" if name.startswith("policy:") else name for name in manifest.inputs}
    if lacking := sorted(REQUIRED_INPUTS.get(place, set()) - names):
        ledger.wrong("inputs", item.where, f"the manifest of stage {manifest.stage} names no {', '.join(lacking)}")


def _open_outside(ledger: Ledger, run: RunDir, item: Located, name: str, place: Path) -> Located | None:
    try:
        artifact = open_artifact(place)
    except (ArtifactError, OSError, UnicodeDecodeError) as error:
        ledger.wrong("inputs", item.where, f"its input {name} cannot be opened: {error}")
        return None
    ledger.checked("manifests")
    return Located(Where(relative_path(place, run.root), artifact.manifest.dataset), artifact, is_own=False)


def _source_in_run(key: tuple[int | None, str], name: str, artifact: Artifact) -> tuple[int | None, str] | None:
    """Return the place in the run that a stage takes this input from, None when only the manifest knows."""
    index, dataset = key
    config = artifact.manifest.config
    if dataset in ("held_out_prompts", "prompts"):
        return (None, "initial_policy")
    if dataset in ("evaluations", "initial_evaluations"):
        return (None, "held_out_prompts") if name == "prompts" else policy_key(config.get("policy_iteration"))
    if index is None:
        return None
    if dataset == "optimizer":
        return (index, "policy")
    if name.startswith("policy:"):
        member = name.removeprefix("policy:")
        updates = config.get("policy_iterations", {}).get(member)
        return (None, f"member {member}") if updates is None else policy_key(updates)
    return policy_key(index) if name == "policy" else (index, name)


def check_config(ledger: Ledger, run: RunDir, catalog: Catalog) -> dict[str, Any]:
    """Compare the settings in the run's own manifests with its resolved config; return that config. Read-only."""
    where = Where(run.resolved_config.name, "config")
    ledger.checked("config")
    try:
        tables: dict[str, Any] = json.loads(run.resolved_config.read_text(encoding="utf-8"))
        stated = {name: dict(tables[name]) for name in dict.fromkeys(OWN_TABLE.values())}
        stated["evaluate"] = {
            **stated["generate"],
            **tables["evaluate"],
            **{n: tables[n] for n in ("score", "normalize")},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        ledger.wrong("config", where, f"the file cannot be read: {type(error).__name__}: {error}")
        return {}
    for (index, dataset), item in catalog.items():
        table = "evaluate" if dataset in ("evaluations", "initial_evaluations") else OWN_TABLE.get(dataset)
        if table is None or (index is None and table != "evaluate") or not item.is_own:
            continue
        expected = {**stated[table], "seed": tables.get("seed"), "iteration": index}
        for name, value in item.artifact.manifest.config.items():
            if name in expected:
                ledger.checked("config")
                if canonical_json(value) != canonical_json(expected[name]):
                    text = f"{table}.{name} is {shorten(value)}, {where.path} says {shorten(expected[name])}"
                    ledger.wrong("config", item.where, text)
    return tables
