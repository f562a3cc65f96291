"""Verifies a run: files, chain and meaning. Proves what a policy was trained on, as far as files can prove it.

Nothing is trusted that can be derived: every file is hashed, every manifest compared with its inputs, and what follows
from config and inputs - ids, seeds, texts, advantages, batches, sums - is derived anew. What remains to be taken on
trust is what only a model or a reward function can say: which tokens were sampled with which probability, the score of
a text, and the weights of a policy. `grpo replay` computes those again.

Imports neither torch nor vllm nor prefect.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.chain import STEPS, load_stage
from pipeline.files import WRITER_LOCK, is_locked
from pipeline.run_dir import RunDir
from stages.inspect.verify.checkpoints import check_policies, check_states
from stages.inspect.verify.derived import (
    check_advantages,
    check_batches,
    check_checks,
    check_logprobs_rows,
    check_metrics,
    check_quarantine,
    check_records,
    check_rewards,
)
from stages.inspect.verify.files import Catalog, Located, check_files, open_all, relative_path
from stages.inspect.verify.inputs import check_config, check_inputs
from stages.inspect.verify.ledger import Ledger, Where
from stages.inspect.verify.plan import check_evaluations, check_plan
from stages.inspect.verify.rows import check_completions, check_held_out, check_prompts, questions
from stages.inspect.verify.tokens import check_tokens

CheckRows = Callable[[Ledger, Where, Artifact, Artifact], None]


def verify_run(run: RunDir, *, limit: int = 20, progress: Callable[[str], None] = lambda _: None) -> Ledger:
    """Return what is wrong in a run, and what was looked at. Read-only.

    Args:
        run: the run, finished or not; artifacts of other runs that it refers to are verified with it.
        limit: rows named of each check and artifact; all are counted.
        progress: told what is being looked at.
    """
    ledger = Ledger(limit=limit)
    progress("files")
    metrics = Where(run.metrics.name, "metrics")
    is_being_written = is_locked(run.root / WRITER_LOCK)
    noted_before = ledger.attempt("metrics", metrics, partial(_noted, run))
    catalog = open_all(run, ledger)
    outside = check_inputs(ledger, run, catalog)
    sound = check_files(ledger, [*catalog.values(), *outside])
    config = check_config(ledger, run, catalog)
    where = Where(run.resolved_config.name, "config")
    ledger.attempt("checks", where, partial(check_quarantine, ledger, catalog, config))
    check_policies(ledger, catalog, sound)
    check_states(ledger, catalog, sound)
    verifier = _RowVerifier(ledger, catalog, sound, outside)
    for index in [None, *run.iterations()]:
        progress("initial artifacts" if index is None else f"iteration {index}")
        verifier.check_iteration(index)
    progress("metrics")
    finished = [index for index in run.iterations() if (index, "policy") in catalog]
    due = partial(_check_due_evaluations, ledger, run, catalog, finished, config, is_being_written=is_being_written)
    ledger.attempt("evaluations", Where(run.resolved_config.name, "config"), due)
    intact = {index for index in finished if verifier.is_intact(index)}
    threshold = config.get("evaluate", {}).get("pass_threshold", 1.0)
    if noted_before is not None:
        check = partial(check_metrics, ledger, run, finished, intact, threshold, catalog, noted_before)
        ledger.attempt("metrics", metrics, check)
    return ledger


def _noted(run: RunDir) -> set[int]:
    """Return the iterations that have figures. Read-only."""
    return set(run.read_metrics()["iteration"]) if run.metrics.is_file() else set()


def _check_due_evaluations(
    ledger: Ledger,
    run: RunDir,
    catalog: Catalog,
    finished: list[int],
    config: Mapping[str, Any],
    *,
    is_being_written: bool,
) -> None:
    """Note evaluations that the config asks for and that are not there: a bad one could have been removed."""
    every, last = config.get("evaluate", {}).get("every", 0), config.get("iterations")
    if not finished or every <= 0:
        return
    for updates in [0, *(index + 1 for index in finished)]:
        index, name = (updates - 1, "evaluations") if updates else (None, "initial_evaluations")
        is_due = updates % every == 0 or updates == last
        may_be_coming = updates == len(finished) and (updates != last or is_being_written)
        if is_due and not may_be_coming and (index, name) not in catalog:
            where = Where(relative_path(run.place(updates - 1, "evaluations"), run.root), "evaluations", index)
            text = f"evaluate.every is {every}, but the policy after {updates} updates has no evaluation"
            ledger.wrong("evaluations", where, text)


class _RowVerifier:
    """Checks rows, of sound artifacts only: bytes that differ from their manifest are reported as that."""

    def __init__(self, ledger: Ledger, catalog: Catalog, sound: set[Path], outside: list[Located]) -> None:
        self.ledger, self.catalog, self.sound = ledger, catalog, sound
        self.by_digest = {item.artifact.digest: item.artifact for item in [*outside, *catalog.values()]}
        held_out = self.get(None, "held_out_prompts")
        self.held_out = None
        if held_out is not None:
            self.held_out = ledger.attempt("held out", held_out.where, partial(questions, held_out.artifact))

    def get(self, index: int | None, dataset: str) -> Located | None:
        """Return an artifact whose files are as the manifest says."""
        item = self.catalog.get((index, dataset))
        return item if item is not None and item.artifact.path in self.sound else None

    def is_intact(self, index: int) -> bool:
        """Return whether every artifact of the iteration that the metrics are made of can be read."""
        needed = ("completions", "rewards", "advantages", "batches", "training_records", "optimizer_steps")
        present = [name for i, name in self.catalog if i == index]
        return all(self.get(index, name) is not None for name in {*needed, *present})

    def check_iteration(self, index: int | None) -> None:
        """Check the rows of an iteration, or with None those of the artifacts before the first one."""
        for name in ("prompts", "held_out_prompts"):
            if item := self.get(index, name):
                self._prompts(item, is_training=name == "prompts")
        if item := self.get(index, "completions"):
            self._completions(item, self.get(index, "prompts"), "sampling plan", check_plan)
        for name in ("evaluations", "initial_evaluations"):
            if item := self.get(index, name):
                self._completions(item, self.get(None, "held_out_prompts"), "evaluations", check_evaluations)
        self._computed(index)

    def _prompts(self, item: Located, *, is_training: bool) -> None:
        ledger, where, artifact = self.ledger, item.where, item.artifact
        if self._can_derive("prompt ids", item):
            self.ledger.attempt("prompt ids", where, partial(check_prompts, ledger, where, artifact))
        held_out = self.held_out
        if is_training and held_out is not None:
            self.ledger.attempt("held out", where, partial(check_held_out, ledger, where, artifact, held_out))

    def _completions(self, item: Located, prompts_: Located | None, check: str, check_rows: CheckRows) -> None:
        """Check the rows of completions or evaluations, and with ``check_rows`` that they follow from the prompts."""
        ledger, where, artifact = self.ledger, item.where, item.artifact
        self.ledger.attempt(
            "text", where, partial(check_completions, ledger, where, artifact, self._policies(artifact))
        )
        if self._can_derive(check, item) and prompts_ is not None:
            self.ledger.attempt(check, where, partial(check_rows, ledger, where, artifact, prompts_.artifact))

    def _computed(self, index: int | None) -> None:
        ledger = self.ledger
        completions, rewards = self.get(index, "completions"), self.get(index, "rewards")
        advantages, batches = self.get(index, "advantages"), self.get(index, "batches")
        records, steps = self.get(index, "training_records"), self.get(index, "optimizer_steps")
        logprobs = self.get(index, "logprobs")
        if rewards and completions and self._can_derive("rewards", rewards):
            ledger.attempt("rewards", rewards.where, partial(check_rewards, ledger, rewards, completions))
        if advantages and rewards and self._can_derive("advantages", advantages):
            read = {"completions": completions, "logprobs": logprobs}
            more = {name: of for name, of in read.items() if of and name in advantages.artifact.manifest.inputs}
            ledger.attempt("advantages", advantages.where, partial(check_advantages, ledger, advantages, rewards, more))
        checks = self.get(index, "checks")
        sources = self._inputs(checks, index) if checks else {}
        if checks and sources and self._can_derive("checks", checks):
            has_trained = (index, "policy") in self.catalog
            check = partial(check_checks, ledger, checks, sources, has_trained=has_trained)
            ledger.attempt("checks", checks.where, check)
        if batches and completions and advantages and self._can_derive("batches", batches):
            used = checks if "checks" in batches.artifact.manifest.inputs else None
            check = partial(check_batches, ledger, batches, completions, advantages, used)
            ledger.attempt("batches", batches.where, check)
        if logprobs and completions and rewards and self._can_derive("records", logprobs):
            check = partial(check_logprobs_rows, ledger, logprobs, completions, rewards)
            ledger.attempt("records", logprobs.where, check)
        if records and steps and batches and self._can_derive("records", records):
            ledger.attempt("records", records.where, partial(check_records, ledger, records, steps, batches))
            ledger.attempt("records", records.where, partial(check_tokens, ledger, records, batches))

    def _inputs(self, item: Located, index: int | None) -> dict[str, Located]:
        """Return the rows that checks were made of: those of the iteration, and the records of the one before.

        None of them where one cannot be read.
        """
        before = None if index is None else index - 1
        keys = {name: before if name == "training_records" else index for name in item.artifact.manifest.inputs}
        found = {name: self.get(key, name) for name, key in keys.items()}
        whole = {name: source for name, source in found.items() if source is not None}
        return whole if len(whole) == len(found) else {}

    def _policies(self, artifact: Artifact) -> dict[str, Artifact]:
        """Return the policies among the inputs of an artifact, by digest."""
        digests = [f["digest"] for name, f in artifact.manifest.inputs.items() if name.split(":")[0] == "policy"]
        return {digest: self.by_digest[digest] for digest in digests if digest in self.by_digest}

    def _can_derive(self, check: str, item: Located) -> bool:
        """Return whether this program's own stage has made the rows: only those can it derive again."""
        where, manifest = item.where, item.artifact.manifest
        stage = load_stage(STEPS[manifest.stage]) if manifest.stage in STEPS else None
        if stage is not None and stage.version == manifest.stage_version:
            return True
        if stage is not None and not 1 <= manifest.stage_version < stage.version:
            found = (
                f"made by stage {stage.name} {manifest.stage_version}, this program knows versions to {stage.version}"
            )
            self.ledger.wrong("manifests", where, f"{found}: audit it with the program that made it")
            return False
        self.ledger.skipped(check, f"made by stage {manifest.stage} {manifest.stage_version}")
        return False
