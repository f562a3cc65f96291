"""What a run will take of the disk, known before anything is written: measured where it can be, else estimated.

Policies and optimizer states are exact: float32, and two moments of each weight. Rows are an estimate, as if the mean
completion had half of max_tokens; once an iteration is finished, its own bytes are used instead. What is said of rows
includes all that is no tensor: manifests, and the tokenizer beside each policy.
"""

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import WEIGHTS, Artifact, open_artifact
from pipeline.chain import CHECKPOINTS, DATASETS, INITIAL
from pipeline.errors import OutOfSpace
from pipeline.manifest import is_finished
from pipeline.prune import num_finished
from pipeline.retention import RetentionConfig, kept_policies
from pipeline.run_dir import RunDir
from stages.checkpoints import (
    TOKENIZER_FILES,
    checkpoint_path,
    holds_tensors,
    hub_config,
    looks_local,
    read_layout,
    weight_names,
)
from stages.config import RunConfig
from stages.starter.starter import StarterConfig
from stages.wiring import outside_members, policy_of_run

FLOAT32 = 4
STARTER_TOKENS = 512
"""Vocabulary of a starter: digits, bytes, and the words of a task that has few."""
STARTER_SIZES = {"hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_context"}
STATE_OF_WEIGHTS = 2
"""Bytes of an AdamW state for each byte of weights: two moments."""
COMPLETION_BYTES = 60
"""Of a completion in all datasets together, compressed, besides its tokens."""
TOKEN_BYTES = 16
"""Of a token: ids, log probabilities and text, in completions and batches; the same again for ``record_tokens``."""
EVALUATED_TOKEN_BYTES = 8
MANIFEST_BYTES = 20_000
"""Of the manifests of an iteration."""
FOOTER_BYTES = 30_000
"""Of what Parquet files hold besides values, of an iteration."""
VOCABULARY_BYTES = 100
"""Of a token in the files of a tokenizer."""
MEASURED = 8
"""The last finished iterations, whose rows are measured."""
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes of a run at its end, and what it takes until then."""

    now: int
    """Bytes that are there."""
    num_policies: int
    """At the end, besides the initial one."""
    num_states: int
    checkpoints: int | None
    """Bytes of all policies and states at the end; None = the size of the policy is not known before it is loaded."""
    rows: int
    """Bytes of everything else at the end: rows, manifests, tokenizers."""
    more: int
    """Most bytes that the run takes beyond ``now`` at any time, as far as they are known."""
    free: int
    device: Path
    """The folder whose device has ``free`` bytes."""

    def line(self) -> str:
        """Return the figures as one line for the user."""
        kept = f"{self.num_policies} policies and {self.num_states} optimizer states"
        rows = f"rows and tokenizers about {size(self.rows)}"
        if self.checkpoints is None:
            parts = f"{rows}, {kept} whose size is not known before the model is loaded"
        else:
            parts = f"about {size(self.checkpoints + self.rows)} at the end: {kept} {size(self.checkpoints)}, {rows}"
        return f"disk: {parts}; {size(self.now)} are there, {size(self.free)} are free"

    def check(self, run: RunDir, config: RunConfig) -> None:
        """Check that the run fits on its device. Read-only.

        Raises:
            OutOfSpace: when it does not.
        """
        if self.more <= self.free:
            return
        raise OutOfSpace(
            f"{run.name} takes up to {size(self.more)} more than is there ({self.line().removeprefix('disk: ')}): "
            f"expected room for it on the device of {self.device}; {_remedy(self, run, config)}"
        )


def _remedy(use: DiskUse, run: RunDir, config: RunConfig) -> str:
    elsewhere = "make room, or name a directory on another device (--run)"
    if config.retention is not None:
        return f"{elsewhere}, or keep fewer policies ([retention])"
    smaller = disk_use(config.model_copy(update={"retention": RetentionConfig()}), run)
    if smaller.more > use.free:
        return elsewhere
    kept = RetentionConfig().keep_last
    return f"keep fewer policies ([retention] keep_last = {kept} takes {size(smaller.more)}), {elsewhere}"


def size(num_bytes: int) -> str:
    """Return a number of bytes for people, in decimal units with three digits."""
    for unit, name in UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}" if num_bytes < 1000 * unit else f"{num_bytes / unit:,.0f} {name}"
    return f"{num_bytes} bytes"


def disk_use(config: RunConfig, run: RunDir) -> DiskUse:
    """Return what the run takes of its disk, from what is there and what its config asks for. Read-only."""
    done = min(num_finished(run), config.iterations)
    coming = range(done, config.iterations)
    there = {n: _checkpoint_bytes(run, n) for n in range(1, done + 1)}
    num_policies, num_states = _kept(config, run, [n for n, found in there.items() if found[0]], done)
    weights, state = _weights(config, run), _state(there)
    if state is None and weights is not None:
        state = STATE_OF_WEIGHTS * weights
    begin = _begin(config, run, weights or 0)
    now = sum(path.stat().st_size for path in run.root.rglob("*") if path.is_file() and not path.is_symlink())
    rows_now = now - sum(map(sum, there.values())) - sum(_tensor_bytes(place) for place in _outside(run))
    evaluations = sum(config.is_to_be_evaluated(iteration + 1) for iteration in coming)
    if config.evaluate.every and not is_finished(run.place(INITIAL, "evaluations")):
        evaluations += 1
    iteration = _rows(config, run, done)
    iteration += _tokenizer_bytes(config, run)
    rows = max(rows_now, 0) + len(coming) * iteration + evaluations * _evaluation(config, run, done)
    pair = (weights or 0) + (state or 0)
    checkpoints = num_policies * (weights or 0) + num_states * (state or 0) + begin
    # a policy is dropped when the next one and its state are on disk
    ahead = pair if config.retention is not None else 0
    more = max(checkpoints + rows - now + ahead, pair + iteration) if coming else 0
    device = next(path for path in (run.root.absolute(), *run.root.absolute().parents) if path.exists())
    known = checkpoints if weights is not None else None
    return DiskUse(now, num_policies, num_states, known, rows, more, shutil.disk_usage(device).free, device)


def _kept(config: RunConfig, run: RunDir, there: Sequence[int], done: int) -> tuple[int, int]:
    """Return how many policies and optimizer states there are at the end, besides the initial policy.

    Which policies will be the best is not known: none of them is counted as kept by another rule too.
    """
    policies = [*there, *range(done + 1, config.iterations + 1)]
    rules = config.retention
    if rules is None:
        return len(policies), len(policies)
    stay = kept_policies(policies, rules, {}) | (config.needed_policies(config.iterations) & set(policies))
    evaluated = sum(config.is_to_be_evaluated(n) for n in policies if n not in stay)
    count = len(stay) + min(rules.keep_best, evaluated)
    return count, count if rules.states == "kept" else min(rules.keep_last, len(policies))


def _checkpoint_bytes(run: RunDir, num_updates: int) -> tuple[int, int]:
    """Return the bytes of the tensors after so many updates that are on disk: the policy's and its state's."""
    policy, state = (_tensor_bytes(run.place(num_updates - 1, name)) for name in CHECKPOINTS)
    return policy, state


def _tensor_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob(f"*{WEIGHTS}") if path.is_file())


def _outside(run: RunDir) -> list[Path]:
    return [run.initial_policy, *(run.root / "members").glob("*")]


def _state(there: dict[int, tuple[int, int]]) -> int | None:
    """Return the bytes of the last optimizer state on disk."""
    return next((found[1] for found in reversed(there.values()) if found[1]), None)


def _begin(config: RunConfig, run: RunDir, weights: int) -> int:
    """Return the bytes of the initial policy, and of members from outside the run."""
    total = 0
    if is_finished(run.initial_policy):
        total += _tensor_bytes(run.initial_policy)
    else:
        is_fork = looks_local(config.policy.model) and policy_of_run(checkpoint_path(config.policy.model)) is not None
        total += weights * (1 + STATE_OF_WEIGHTS * (is_fork and config.policy.keep_optimizer))
    for member in outside_members(config):
        place = run.member(member.name)
        total += _tensor_bytes(place) if is_finished(place) else weights
    return total


def _weights(config: RunConfig, run: RunDir) -> int | None:
    """Return the bytes of a policy in float32; None if they are known only when the model is loaded."""
    if is_finished(run.initial_policy):
        files = open_artifact(run.initial_policy).manifest.files
        return sum(int(files[name]["bytes"]) for name in weight_names(files))
    if config.starter is None and looks_local(config.policy.model):
        shapes: Iterable[list[int]] = read_layout(checkpoint_path(config.policy.model))["weights"].values()
        return FLOAT32 * sum(map(math.prod, shapes))
    if config.starter is not None:
        return FLOAT32 * _starter_parameters(config.starter)
    from grpo.policy import num_parameters

    try:
        return FLOAT32 * num_parameters(hub_config(config.policy.model, config.policy.revision))
    except (ValueError, RuntimeError, TypeError, AttributeError):  # what an unusual configuration raises
        return None


def _starter_parameters(starter: StarterConfig) -> int:
    """Return the number of weights of a starter, whose vocabulary is not known before its task is read."""
    import torch

    from stages.starter.warm_up import new_model

    sizes = starter.model_dump(exclude=set(StarterConfig.model_fields) - STARTER_SIZES)
    with torch.device("meta"):
        model = new_model(seed=0, vocab_size=STARTER_TOKENS, pad_token_id=0, eos_token_id=0, **sizes)
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer_bytes(config: RunConfig, run: RunDir) -> int:
    """Return the bytes of a policy without its weights: each iteration has a copy, and retention keeps all of them."""
    if is_finished(run.initial_policy):
        files = open_artifact(run.initial_policy).manifest.files
        return sum(int(facts["bytes"]) for name, facts in files.items() if not holds_tensors(name))
    if config.starter is not None:
        return VOCABULARY_BYTES * STARTER_TOKENS
    if looks_local(config.policy.model):
        path = checkpoint_path(config.policy.model)
        return sum((path / name).stat().st_size for name in TOKENIZER_FILES if (path / name).is_file())
    tokens = hub_config(config.policy.model, config.policy.revision).get("vocab_size")
    return VOCABULARY_BYTES * tokens if isinstance(tokens, int) else 0


def _rows(config: RunConfig, run: RunDir, done: int) -> int:
    """Return the bytes of an iteration's rows and manifests, without its evaluation."""
    names = [name for name in DATASETS if name not in CHECKPOINTS and name != "evaluations"]
    measured = [
        sum(_bytes(open_artifact(place)) for name in names if is_finished(place := run.place(iteration, name)))
        for iteration in range(max(done - MEASURED, 0), done)
    ]
    if measured:
        return sum(measured) // len(measured) + MANIFEST_BYTES
    num_completions = config.prompts.prompts_per_iteration * config.generate.size
    token = TOKEN_BYTES * (2 if config.update.record_tokens else 1)
    rows = num_completions * (COMPLETION_BYTES + config.generate.max_tokens * token // 2)
    return rows + MANIFEST_BYTES + FOOTER_BYTES


def _evaluation(config: RunConfig, run: RunDir, done: int) -> int:
    """Return the bytes of an evaluation: those of the last one, else an estimate."""
    for iteration in reversed(range(INITIAL, done)):
        if is_finished(place := run.place(iteration, "evaluations")):
            return _bytes(open_artifact(place))
    num_completions = config.evaluate.num_prompts * (1 + config.evaluate.num_samples)
    return num_completions * (COMPLETION_BYTES + config.generate.max_tokens * EVALUATED_TOKEN_BYTES // 2)


def _bytes(artifact: Artifact) -> int:
    return sum(facts["bytes"] for facts in artifact.manifest.files.values())
