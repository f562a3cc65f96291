"""`grpo metrics`: one row per iteration."""

from flows.commands.options import Output, Run
from flows.printing import Format, print_rows
from pipeline.errors import ArtifactMissing
from pipeline.runs import open_run

WRITES = False


def metrics(run: Run, format_: Output = Format.table) -> None:
    """Print one row per iteration; jsonl and csv have every column. Read-only.

    Example: grpo metrics runs/demo --format csv
    """
    run_dir = open_run(run)
    if not run_dir.metrics.is_file():
        raise ArtifactMissing(f"{run_dir.name} has no finished iteration yet: run it")
    frame = run_dir.read_metrics()
    if format_ is Format.table:
        checked = [name for name in ("num_failed_checks",) if name in frame.columns and frame[name].count()]
        frame = frame.select(
            "iteration", "reward_mean", "pass_rate", "eval_pass_at_1", "eval_pass_rate", "completion_tokens_mean",
            "truncated_share", "zero_variance_share", "num_trained", *checked, "entropy", "kl_to_sampler",
            "clip_low_share", "clip_high_share", "grad_norm", "generate_tokens_per_second",
        ).rename({"completion_tokens_mean": "length", "generate_tokens_per_second": "tok/s", "truncated_share": "cut",
                  "zero_variance_share": "flat", "clip_low_share": "clip-", "clip_high_share": "clip+",
                  "num_failed_checks": "failed checks"}, strict=False)  # fmt: skip
    print_rows(frame.to_dicts(), format_, columns=frame.columns)
