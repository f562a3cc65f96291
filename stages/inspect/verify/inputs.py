"""Verifies the chain: every manifest against its inputs, back to the first prompt, and against the run's config."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHAIN, INITIAL, STEPS, WRITER, From, load_stage
from pipeline.config import default_of
from pipeline.errors import GrpoError
from pipeline.manifest import canonical_json
from pipeline.reading import resolved, shorten
from pipeline.run_dir import RESOLVED_CONFIG, RunDir
from stages import policy
from stages.batch import IMPORTED
from stages.inspect.verify.files import Catalog, Located, policy_key, relative_path
from stages.inspect.verify.ledger import Ledger, Where, describe
from stages.logprobs import CURRENT, PROXIMAL
from stages.rewards.functions import RewardConfig
from stages.score import ScoreConfig

DECIDE_NOTHING = ScoreConfig.DECIDES_NOTHING | RewardConfig.DECIDES_NOTHING
"""Settings that may change between two starts of a run."""
IMPORTED_DATASETS = ("prompts", "completions")
"""What `grpo import` makes in place of the stages of the chain."""
BEFORE_ITERATIONS = {"held_out_prompts": "prompts", "initial_evaluations": "evaluations"}
"""Places before the first iteration -> the dataset that they hold."""


def check_inputs(ledger: Ledger, run: RunDir, catalog: Catalog) -> list[Located]:
    """Compare every manifest with its inputs, back to the first prompt; return artifacts that lie outside of the run.

    Read-only.
    """
    known = {resolved(item.artifact.path): item for item in catalog.values()}
    outside: dict[Path, Located] = {}
    queue = [(key, item) for key, item in catalog.items()]
    while queue:
        key, item = queue.pop(0)
        ledger.attempt("manifests", item.where, partial(_check_kind, ledger, key, item))
        for name, facts in item.artifact.manifest.inputs.items():
            ledger.checked("inputs")
            place = Path(os.path.normpath(resolved(item.artifact.path) / facts["path"]))
            source = known.get(place) or outside.get(place)
            if source is None:
                source = _open_outside(ledger, run, item, name, place)
                if source is None:
                    continue
                outside[place] = source
                queue.append(((None, ""), source))
            check = partial(_check_input, ledger, catalog, (key, item), name, source)
            ledger.attempt("inputs", item.where, check)
    return list(outside.values())


def _check_input(
    ledger: Ledger, catalog: Catalog, of: tuple[tuple[int | None, str], Located], name: str, source: Located
) -> None:
    """Check that an input has the digest that the manifest names, and stands where the stage takes it from."""
    key, item = of
    stated, digest = item.artifact.manifest.inputs[name]["digest"], source.artifact.digest
    if digest != stated:
        text = f"its input {name} is {stated[:16]}..., but {source.where.path} is {digest[:16]}..."
        ledger.wrong("inputs", item.where, text)
    elif item.is_own and (taken := _source_in_run(key, name, item.artifact)) is not None:
        wanted = catalog.get(taken)
        if wanted is not None and wanted.artifact.digest != digest:
            text = f"its input {name} is {source.where.path}, expected {wanted.where.path}"
            ledger.wrong("inputs", item.where, text)


def _check_kind(ledger: Ledger, key: tuple[int | None, str], item: Located) -> None:
    """Check that an artifact is of the kind that its place is for, by a stage that makes it, and lacks no input."""
    manifest, place = item.artifact.manifest, key[1]
    is_policy = place == "initial_policy" or place.startswith("member ")
    kind = "policy" if is_policy else BEFORE_ITERATIONS.get(place, place)
    if kind and manifest.dataset != kind:
        ledger.wrong("manifests", item.where, f"it holds {manifest.dataset}, expected {kind}")
    step = WRITER.get(kind)
    makers = {policy.STAGE.name} if is_policy else {step.name} if step else set()
    if makers and kind in IMPORTED_DATASETS:
        makers |= {IMPORTED}
    if makers and manifest.stage not in makers:
        expected = " or ".join(sorted(makers))
        ledger.wrong("manifests", item.where, f"it was made by stage {shorten(manifest.stage)}, expected {expected}")
    if is_policy or step is None or manifest.stage != step.name:
        return
    needed = {name: source for name, source in step.reads.items() if source not in (From.if_made, From.earlier)}
    required = {f"{name}:" if source in (From.members, From.named) else name for name, source in needed.items()}
    names = {"policy:" if name.startswith("policy:") else name for name in manifest.inputs}
    if lacking := sorted(required - names):
        ledger.wrong("inputs", item.where, f"the manifest of stage {manifest.stage} names no {', '.join(lacking)}")


def _open_outside(ledger: Ledger, run: RunDir, item: Located, name: str, place: Path) -> Located | None:
    try:
        artifact = open_artifact(place)
    except Exception as error:  # what is looked at may be anything
        ledger.wrong("inputs", item.where, f"its input {name} cannot be opened: {describe(error)}")
        return None
    ledger.checked("manifests")
    return Located(Where(relative_path(place, run.root), artifact.manifest.dataset), artifact, is_own=False)


def _source_in_run(key: tuple[int | None, str], name: str, artifact: Artifact) -> tuple[int | None, str] | None:
    """Return the place in the run that a stage takes this input from, None when only the manifest knows."""
    place, dataset = key
    index = INITIAL if place is None else place
    step = WRITER.get(BEFORE_ITERATIONS.get(dataset, dataset))
    name, _, member = name.partition(":")
    match step.reads.get(name) if step else None:
        case From.initial:
            return (None, "initial_policy")
        case From.named:  # of a reference the config says which one
            return {CURRENT: policy_key(index), PROXIMAL: (None, "initial_policy")}.get(member)
        case From.held_out:
            return (None, "held_out_prompts")
        case From.before:
            return policy_key(index)
        case From.after:
            return policy_key(index + 1)
        case From.members:
            updates = artifact.manifest.config.get("policy_iterations", {}).get(member)
            return (None, f"member {member}") if updates is None else policy_key(updates)
        case From.here | From.if_made:
            return (index, name)
        case From.earlier:
            return (index - 1, name)
    return None


def check_config(ledger: Ledger, run: RunDir, catalog: Catalog) -> dict[str, Any]:
    """Compare the settings in the run's own manifests with its resolved config; return that config. Read-only."""
    where = Where(run.resolved_config.name, "config")
    ledger.checked("config")
    try:
        tables = run.settings()
        stated = {step.name: dict(tables[step.name]) for step in CHAIN if step.name in tables}
        stated["evaluate"] = {
            **stated["generate"],
            **tables["evaluate"],
            **{n: tables[n] for n in ("score", "normalize")},
        }
    except (GrpoError, KeyError) as error:
        ledger.wrong("config", where, f"the file cannot be read: {type(error).__name__}: {error}")
        return {}
    for key, item in catalog.items():
        ledger.attempt("config", item.where, partial(_check_settings, ledger, tables, stated, key, item))
    return tables


def _check_settings(
    ledger: Ledger,
    tables: Mapping[str, Any],
    stated: Mapping[str, dict[str, Any]],
    key: tuple[int | None, str],
    item: Located,
) -> None:
    """Compare the settings in a manifest with the tables that the run's config states for its stage."""
    index, dataset = key
    if item.is_own:
        _check_defaults(ledger, item)
    step = WRITER.get(BEFORE_ITERATIONS.get(dataset, dataset))
    table = step.name if step else ""
    if table not in stated or dataset in ("held_out_prompts", "initial_policy") or not item.is_own:
        return
    expected = {**stated[table], "seed": tables.get("seed"), "iteration": index}
    for name, value in item.artifact.manifest.config.items():
        if name in expected and name not in DECIDE_NOTHING:
            ledger.checked("config")
            if canonical_json(_deciding(value)) != canonical_json(_deciding(expected[name])):
                text = f"{table}.{name} is {shorten(value)}, {RESOLVED_CONFIG} says {shorten(expected[name])}"
                ledger.wrong("config", item.where, text)


def _deciding(value: Any) -> Any:
    """Return a setting without those inside it that may change between two starts of a run."""
    if isinstance(value, dict):
        return {key: _deciding(item) for key, item in value.items() if key not in DECIDE_NOTHING}
    return [_deciding(item) for item in value] if isinstance(value, list) else value


def _check_defaults(ledger: Ledger, item: Located) -> None:
    """Derive the settings that stand at their default, which no hash covers, from those that were chosen."""
    manifest = item.artifact.manifest
    stage = load_stage(STEPS[manifest.stage]) if manifest.stage in STEPS else policy.STAGE
    if (stage.name, stage.version) != (manifest.stage, manifest.stage_version):
        return
    fields = stage.config.model_fields
    for name in manifest.config:
        if name not in fields and name not in manifest.chosen:
            ledger.wrong("config", item.where, f"{shorten(name)} is no setting of stage {stage.name} {stage.version}")
        elif name not in manifest.chosen and name not in DECIDE_NOTHING:
            default = "nothing: it is required" if fields[name].is_required() else default_of(stage.config, name)
            ledger.checked("config")
            if canonical_json(manifest.config[name]) != canonical_json(default):
                found = shorten(manifest.config[name])
                text = f"{name} is {found}, which nobody has chosen: the default is {shorten(default)}"
                ledger.wrong("config", item.where, text)
