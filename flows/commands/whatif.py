"""`grpo whatif`: what another normalization would have changed in every stored iteration."""

from typing import Any

from flows.commands.options import Output, Overrides, Run, permit_named
from flows.printing import Format, print_rows, say
from pipeline.errors import ArtifactMissing, UsageError
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

WRITES = False


def whatif(
    run: Run,
    overrides: Overrides = None,
    format_: Output = Format.table,
) -> None:
    """Recompute the advantages of every stored iteration under another normalization; print what changes. Read-only.

    Example: grpo whatif runs/demo --set normalize.scale=none --set normalize.baseline=leave_one_out
    """
    import polars as pl

    from flows.comparison import print_comparison
    from pipeline.config import apply_overrides, validate
    from stages.config import recorded_config
    from stages.inspect.scoring_diff import compare
    from stages.normalize import NormalizeConfig, normalize_rows

    settings = overrides or []
    run_dir = open_run(run)
    config = recorded_config(run_dir).normalize
    foreign = [o for o in settings if not o.startswith("normalize.")]
    if foreign or not settings:
        raise UsageError(
            f"--set {' '.join(foreign) or '(nothing)'}: give settings of [normalize], for example "
            "--set normalize.scale=none"
        )
    permit_named({}, settings, is_trusted=False)
    tables = apply_overrides({"normalize": config.model_dump(mode="json")}, settings)
    wanted = validate(NormalizeConfig, tables["normalize"], "normalize")
    indices = [i for i in run_dir.iterations() if run_dir.has(i, "rewards") and run_dir.has(i, "advantages")]
    if not indices:
        raise ArtifactMissing(f"{run} has no scored iteration yet: run it, or score it with `grpo rescore`")
    before, after, per_iteration = [], [], []
    for index in indices:
        stored = run_dir.open(index, "advantages").read().with_columns(pl.lit(index).alias("iteration"))
        # one iteration is one batch: scale = batch_std must not see other iterations
        if lacking := sorted(name for name in wanted.reads if not _has(run_dir, index, name)):
            raise UsageError(
                f"normalize.baseline {wanted.baseline} reads {lacking[0]}, which iteration {index} of {run} does not "
                "have of the policy that trains: train with it (grpo fork)"
            )
        read = {name: run_dir.open(index, name).scan() for name in wanted.reads}
        fresh = normalize_rows(run_dir.open(index, "rewards").scan(), wanted, **read)
        per_iteration.append({"iteration": index, **compare(None, (stored, fresh)).advantages})
        before.append(stored)
        after.append(fresh)
    if format_ is not Format.table:
        print_rows(per_iteration, format_)
        return
    found = compare(None, (pl.concat(before), pl.concat(after)))
    say(config.model_dump())
    say(f"-> {wanted.model_dump()}")
    say()
    columns = ("iteration", "completions", "sign_changes", "groups", "gain_signal", "lose_signal", "mean_size_a",
               "mean_size_b", "rank_correlation")  # fmt: skip
    print_rows(_thinned(per_iteration), format_, columns=columns)
    print_comparison(found, run_dir, indices, format_)


def _has(run: RunDir, iteration: int, dataset: str) -> bool:
    """Return whether an iteration has what baselines read; logprobs may be those of a reference alone. Read-only."""
    from stages.logprobs import CURRENT

    if not run.has(iteration, dataset):
        return False
    return dataset != "logprobs" or f"policy:{CURRENT}" in run.open(iteration, dataset).manifest.inputs


def _thinned(rows: list[dict[str, Any]], most: int = 20) -> list[dict[str, Any]]:
    """Return some rows evenly spread, the last one among them."""
    step = max(-(-len(rows) // most), 1)
    return [row for i, row in enumerate(rows) if i % step == 0 or i == len(rows) - 1]
