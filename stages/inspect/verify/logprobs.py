"""verify --deep: the sampler's log probabilities computed again, by the trainer's model, from the weights that wrote.

The other checks must take on trust which tokens were sampled with which probability. Here every row, or a sample of
them, goes through the policy whose digest it carries, with the trainer's own forward. What remains between the two
is the engine mismatch: kernels, precision, batch shapes - or a row whose numbers are not those of its policy.

torch is imported when the first model is loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from grpo.batching import cut_microbatches, full_vocabulary_logprobs
from pipeline.artifact import Artifact, open_artifact, pruned_files
from pipeline.errors import ArtifactError
from pipeline.files import identity
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from stages.batch import IMPORTED
from stages.checkpoints import weight_names
from stages.config import RunConfig, recorded_config
from stages.inspect.verify.files import open_all, relative_path
from stages.inspect.verify.ledger import Ledger, Tally, Where, WrongRow, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECK = "engine mismatch"
PROVES = "the trainer's model gives the sampled tokens the stored log probabilities, within the threshold"

READ = (
    "completion_id",
    "policy_name",
    "policy_digest",
    "prompt_token_ids",
    "completion_token_ids",
    "loss_mask",
    "temperature",
)

MEASURED = pl.Schema(
    {
        "iteration": pl.Int64,
        "completion_id": pl.String,
        "policy_name": pl.String,
        "tokens": pl.Int64,
        "difference_sum": pl.Float64,
        "difference_max": pl.Float64,
        "position": pl.Int64,
        "kl_sum": pl.Float64,
    }
)
"""One row per completion. ``position`` is that of the token with the largest |trainer - sampler|."""


@dataclass(frozen=True, slots=True)
class DeepSettings:
    """Which rows are computed again, and how far they may be off."""

    rows: int = 64
    """Of each iteration, chosen by a hash of seed and id; 0 = all."""
    seed: int = 0
    threshold: float = 0.1
    """A row is wrong when a token's |trainer - sampler| is larger, in nats. Engines in float32 stay below 0.001;
    bfloat16 moves single tokens by more than 0.1, so that a run sampled in it wants a higher threshold."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What lies between sampler and trainer in one iteration; the differences are in nats per token."""

    iteration: int
    rows: int
    of_rows: int
    """Rows that a policy has sampled."""
    tokens: int
    """Trainable ones with a known sampling logprob."""
    difference_mean: float | None
    difference_max: float | None
    kl_to_sampler: float | None
    """Mean of the k3 estimate of KL(sampler || trainer)."""
    beyond: int
    """Rows over the threshold."""


def check_logprobs(
    run: RunDir, ledger: Ledger, settings: DeepSettings, progress: Callable[[str], None] = lambda _: None
) -> list[Mismatch]:
    """Return the mismatch of each iteration that has completions; rows over the threshold are wrong. Read-only."""
    ledger.tallies[CHECK] = Tally()
    # what cannot be opened is noted by the check of files
    artifacts = [item.artifact for item in open_all(run, Ledger()).values()]
    known = {artifact.digest: artifact for artifact in artifacts if artifact.manifest.dataset == "policy"}
    samples: list[pl.DataFrame] = []
    counts: dict[int, tuple[Where, int]] = {}
    for index in run.iterations():
        if not run.has(index, "completions"):
            continue
        where = Where(relative_path(run.place(index, "completions"), run.root), "completions", index)
        completions = ledger.attempt(CHECK, where, partial(run.open, index, "completions"))
        if completions is None:
            continue
        found = ledger.attempt(CHECK, where, partial(sample_rows, completions, index, settings))
        if found is None:
            continue
        sample, count = found
        known |= {artifact.digest: artifact for artifact in _authors(completions)}
        counts[index] = (where, count)
        if count == 0:
            ledger.skipped(CHECK, "no policy of this program has sampled the answers")
        samples.append(sample)
    measured = _measure(run, ledger, pl.concat(samples), known, counts, progress) if samples else []
    frame = pl.concat([pl.DataFrame(schema=MEASURED), *measured])
    return [_report(ledger, settings, frame, index, *counts[index]) for index in counts]


def sample_rows(completions: Artifact, iteration: int, settings: DeepSettings) -> tuple[pl.DataFrame, int]:
    """Return rows as ``collate`` takes them, chosen by the seed, and how many there are to choose from. Read-only.

    Their sampling logprobs are over the full vocabulary, as the trainer's are.
    """
    frame = completions.scan().filter(
        (pl.col("engine") != IMPORTED) & (pl.col("temperature") > 0) & (pl.col("prompt_token_ids").list.len() > 0)
    )
    ids = frame.select("completion_id").collect()["completion_id"].to_list()
    ranked = sorted(ids, key=lambda name: identity(settings.seed, iteration, name))
    chosen = ranked[: settings.rows] if settings.rows > 0 else ranked
    rows = frame.filter(pl.col("completion_id").is_in(chosen)).collect()
    has_mass = rows["kept_mass"].null_count() < rows.height
    rows = rows.with_columns(sampling_logprobs=full_vocabulary_logprobs(has_kept_mass=has_mass))
    is_raw = pl.col("logprobs_mode") == "raw"  # before the temperature
    return rows.with_columns(temperature=pl.when(is_raw).then(1.0).otherwise("temperature").cast(pl.Float32)).select(
        pl.lit(iteration, pl.Int64).alias("iteration"),
        *READ,
        "sampling_logprobs",
        advantage=pl.lit(0.0),
        loss_denominator=pl.lit(1.0),
    ), len(ids)


def _authors(completions: Artifact) -> Iterator[Artifact]:
    """Yield the policies that the completions were sampled from: those of another run lie there."""
    for name, facts in completions.manifest.inputs.items():
        place = completions.path / facts["path"]
        if name.startswith("policy:") and is_finished(place):
            with suppress(ArtifactError):  # the check of files says so
                yield open_artifact(place)


def _measure(
    run: RunDir,
    ledger: Ledger,
    rows: pl.DataFrame,
    policies: dict[str, Artifact],
    counts: dict[int, tuple[Where, int]],
    progress: Callable[[str], None],
) -> list[pl.DataFrame]:
    """Return a row of ``MEASURED`` for each row whose policy is there; one model is in memory at a time."""
    measured = []
    config: RunConfig | None = None
    for (digest,), written in rows.group_by("policy_digest", maintain_order=True):
        policy = policies.get(str(digest))
        if policy is None or _is_pruned(policy):
            reason = "the policy that wrote the answers is not there" if policy is None else "its weights are pruned"
            for _ in written["iteration"].unique():
                ledger.skipped(CHECK, reason)
            continue
        config = config or recorded_config(run)
        progress(f"log probabilities of {written.height} rows by {relative_path(policy.path, run.root)}")
        try:
            measured += list(_logprob_rows(policy.path, written, config))
        except (Exception, pl.exceptions.PanicException) as error:  # what is looked at may be anything
            for index in written["iteration"].unique(maintain_order=True):
                if _is_pruned(policy):  # just now: the run goes on
                    ledger.skipped(CHECK, "its weights are pruned")
                    continue
                ledger.wrong(
                    CHECK, counts[index][0], f"cannot be checked with policy {policy.digest[:16]}: {describe(error)}"
                )
    return measured


def _is_pruned(policy: Artifact) -> bool:
    """Return whether weights were dropped on purpose; the optimizer's state of a fork is not needed here."""
    return any(not (policy.path / name).is_file() for name in weight_names(pruned_files(policy)))


def _logprob_rows(path: Path, rows: pl.DataFrame, config: RunConfig) -> Iterator[pl.DataFrame]:
    """Yield what lies between sampler and trainer, microbatch by microbatch."""
    from grpo.optimizer import deterministic
    from grpo.policy import load_policy
    from stages.trainers.local import resolve_device

    deterministic(config.update.num_threads)
    model = load_policy(path, device=resolve_device(config.resources.device))
    length = pl.col("prompt_token_ids").list.len() + pl.col("completion_token_ids").list.len()
    ordered = rows.with_columns(_length=length).sort("_length", "iteration", "completion_id")
    cut = cut_microbatches(ordered["_length"].to_list(), config.batch.microbatch_tokens)
    for part in ordered.with_columns(_cut=pl.Series(cut, dtype=pl.Int32)).partition_by("_cut", maintain_order=True):
        yield _measure_microbatch(model, part, config)


def _measure_microbatch(model: "PreTrainedModel", rows: pl.DataFrame, config: RunConfig) -> pl.DataFrame:
    import torch

    from grpo.collate import collate
    from grpo.kl import kl_to_sampler
    from grpo.policy_logprobs import batch_logprobs

    batch = collate(rows).to(model.device)
    with torch.no_grad():
        trainer_N, _ = batch_logprobs(model, batch, config.update)
        kl_N = kl_to_sampler(trainer_N, batch.sampling_logprobs_N)
        difference_N = (trainer_N - batch.sampling_logprobs_N).abs()
    numbers = {
        "difference": difference_N.double().cpu().numpy(),
        "kl": kl_N.double().cpu().numpy(),
        "row": batch.row_N.cpu().numpy(),
        "token": batch.completion_token_N.cpu().numpy(),
    }
    known = batch.sampling_logprobs_N.isfinite().cpu().numpy()
    return _by_row(rows, {name: values[known] for name, values in numbers.items()})


def _by_row(rows: pl.DataFrame, token: dict[str, Any]) -> pl.DataFrame:
    """Return the sums of each row of the microbatch; one without a known sampling logprob has no tokens."""
    lengths = rows["completion_token_ids"].list.len().cast(pl.Int64).to_numpy()
    first = np.cumsum(lengths) - lengths
    facts = (
        pl.DataFrame({**token, "position": token["token"] - first[token["row"]]})
        .group_by("row")
        .agg(
            tokens=pl.len().cast(pl.Int64),
            difference_sum=pl.col("difference").sum(),
            # a NaN of the model is larger than any threshold
            difference_max=pl.col("difference").fill_nan(float("inf")).max(),
            position=pl.col("position").get(pl.col("difference").fill_nan(float("inf")).arg_max()),
            kl_sum=pl.col("kl").sum(),
        )
    )
    keyed = rows.select("iteration", "completion_id", "policy_name").with_row_index("row").cast({"row": pl.Int64})
    joined = keyed.join(facts.cast({"row": pl.Int64}), on="row", how="left", maintain_order="left")
    return joined.with_columns(pl.col("tokens", "difference_sum", "kl_sum").fill_null(0)).select(MEASURED.names())


def _report(
    ledger: Ledger, settings: DeepSettings, frame: pl.DataFrame, index: int, where: Where, of_rows: int
) -> Mismatch:
    rows = frame.filter(pl.col("iteration") == index).sort("difference_max", "completion_id", descending=[True, False])
    beyond = rows.filter(pl.col("difference_max") > settings.threshold)
    named = [
        WrongRow(
            row["completion_id"],
            None,
            f"the trainer's logprob of token {row['position']} lies {row['difference_max']:.4g} nats from the stored "
            f"one, more than {settings.threshold:g} (written by {row['policy_name']})",
        )
        for row in beyond.head(ledger.limit).to_dicts()
    ]
    ledger.checked(CHECK, rows.filter(pl.col("tokens") > 0).height)
    ledger.wrong_rows(CHECK, where, named, beyond.height)
    total = rows.select(pl.col("tokens", "difference_sum", "kl_sum").sum(), pl.col("difference_max").max())
    sums = total.row(0, named=True)
    tokens = sums["tokens"]
    return Mismatch(
        iteration=index,
        rows=rows.height,
        of_rows=of_rows,
        tokens=tokens,
        difference_mean=sums["difference_sum"] / tokens if tokens else None,
        difference_max=sums["difference_max"],
        kl_to_sampler=sums["kl_sum"] / tokens if tokens else None,
        beyond=beyond.height,
    )
