"""The commands that only look: they read artifacts and print. None of them imports torch, vllm or prefect."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.printing import Format, console, print_rows
from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHECKPOINTS, DATASETS, INITIAL
from pipeline.errors import ArtifactMissing, UsageError
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import is_run, open_run, runs_in

if TYPE_CHECKING:
    import polars as pl


def list_runs(where: str | Path, format_: Format) -> None:
    """Print the runs in a directory or below a URL, or the artifacts of one run. Read-only."""
    if is_run(where):
        run = open_run(where)
        print_rows([_artifact_row(run.root, a) for a in run.artifacts()], format_, columns=ARTIFACT_COLUMNS)
        return
    print_rows([_run_row(run) for run in runs_in(where)], format_, columns=RUN_COLUMNS)


LONG_ANSWER = 60
"""Characters from which answers get lines of their own instead of a cell in a table."""
RUN_COLUMNS = ("run", "iterations", "finished", "digest")
ARTIFACT_COLUMNS = ("artifact", "stage", "rows", "dropped", "bytes", "seconds", "digest")


def _run_row(run: RunDir) -> dict[str, Any]:
    finished = [k for k in run.iterations() if is_finished(run.place(k, "policy"))]
    last = run.policy_before(len(finished))
    return {
        "run": run.name,
        "iterations": len(run.iterations()),
        "finished": len(finished),
        "digest": open_artifact(last).digest[:16] if is_finished(last) else None,
    }


def _artifact_row(root: Path, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "artifact": Path(os.path.relpath(artifact.path, root)).as_posix(),
        "stage": manifest.stage,
        "rows": manifest.rows,
        "dropped": " ".join(f"{reason}:{count}" for reason, count in manifest.drops.items()) or None,
        "bytes": sum(facts["bytes"] for facts in manifest.files.values()),
        "seconds": manifest.seconds,
        "digest": artifact.digest[:16],
    }


def last_iteration(run: RunDir, dataset: str) -> int:
    """Return the last iteration that has this dataset. Read-only.

    Raises:
        ArtifactMissing: when none has.
    """
    for iteration in reversed(run.iterations()):
        if run.has(iteration, dataset):
            return iteration
    raise ArtifactMissing(
        f"{run.name} has no finished {dataset} yet: run it, or look at another dataset with `grpo ls`"
    )


def open_dataset(path: str | Path, dataset: str, iteration: int | None) -> Artifact:
    """Return a dataset of a run: of the given iteration, else of the last one that has it. Read-only."""
    run = open_run(path)
    if dataset == "held_out_prompts":
        return open_artifact(run.held_out_prompts)
    if dataset == "evaluations" and iteration == -1:
        return open_artifact(run.place(INITIAL, "evaluations"))
    known = [name for name in DATASETS if name not in CHECKPOINTS]
    if dataset not in known:
        raise UsageError(f"there is no dataset {dataset!r}: choose one of {', '.join([*known, 'held_out_prompts'])}")
    return run.open(last_iteration(run, dataset) if iteration is None else iteration, dataset)


def print_dataset(
    path: str | Path,
    dataset: str,
    iteration: int | None,
    columns: str | None,
    where: str | None,
    limit: int,
    format_: Format,
) -> None:
    """Print rows of a dataset; ``where`` is an SQL condition over its columns. Read-only."""

    frame = open_dataset(path, dataset, iteration).scan()
    names = list(dict.fromkeys(columns.split(","))) if columns else frame.collect_schema().names()
    unknown = [name for name in names if name not in frame.collect_schema()]
    if unknown:
        raise UsageError(f"{dataset} has no columns {unknown}: see `grpo schema {dataset}`")
    if where:
        frame = _filtered(frame, where, dataset)
    if limit > 0:
        frame = frame.head(limit)
    print_rows(frame.select(names).collect().to_dicts(), format_, columns=names)


def _filtered(frame: "pl.LazyFrame", where: str, dataset: str) -> "pl.LazyFrame":
    import polars as pl

    try:
        filtered = frame.filter(pl.sql_expr(where))
        filtered.head(1).collect()
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"--where {where!r} is not an SQL condition over {dataset}: {error}") from error
    return filtered


def print_metrics(path: str | Path, format_: Format) -> None:
    """Print one row per iteration. Read-only."""
    run = open_run(path)
    if not run.metrics.is_file():
        raise ArtifactMissing(f"{run.name} has no finished iteration yet: run it")
    frame = run.read_metrics()
    if format_ is Format.table:
        frame = frame.select(
            "iteration", "reward_mean", "pass_rate", "eval_pass_at_1", "eval_pass_rate", "completion_tokens_mean",
            "truncated_share", "zero_variance_share", "num_trained", "entropy", "kl_to_sampler", "clip_low_share",
            "clip_high_share", "grad_norm", "generate_tokens_per_second",
        ).rename({"completion_tokens_mean": "length", "generate_tokens_per_second": "tok/s", "truncated_share": "cut",
                  "zero_variance_share": "flat", "clip_low_share": "clip-", "clip_high_share": "clip+"})  # fmt: skip
    print_rows(frame.to_dicts(), format_, columns=frame.columns)


def print_schema(dataset: str | None, format_: Format) -> None:
    """Print the datasets, or the columns of one, with their documentation. Read-only."""
    from pipeline.schema import SCHEMAS

    if dataset is None:
        print_rows([{"dataset": name, "doc": _doc(schema)} for name, schema in SCHEMAS.items()], format_)
        return
    if dataset not in SCHEMAS:
        raise UsageError(f"there is no dataset {dataset!r}: choose one of {', '.join(SCHEMAS)}")
    rows = [
        {"column": field.name, "type": type_name(field.type), "nullable": field.nullable, "doc": _doc(field)}
        for field in SCHEMAS[dataset]
    ]
    print_rows(rows, format_)


def schema_markdown() -> str:
    """Return `docs/datasets.md`'s tables: every dataset and column with its documentation. Read-only."""
    from pipeline.schema import SCHEMAS

    lines: list[str] = []
    for name, schema in SCHEMAS.items():
        lines += [f"## {name}", "", _doc(schema), "", "| column | type | null | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {field.name} | {type_name(field.type)} | {'yes' if field.nullable else ''} | {_markdown(_doc(field))} |"
            for field in schema
        ]
        lines.append("")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    return text.replace("|", "\\|")


def type_name(type_: Any) -> str:
    """Return an Arrow type without the names of list elements."""
    return str(type_).replace("element: ", "").replace("item: ", "").replace(" not null", "")


def _doc(carrier: Any) -> str:
    return str(carrier.metadata[b"doc"].decode())


def group_table(run: RunDir, iteration: int) -> "pl.DataFrame":
    """Return one row per group of an iteration, in the order of the prompts. Read-only."""
    import polars as pl

    prompts = (
        run.open(iteration, "prompts")
        .scan()
        .select("prompt_id", prompt=_question(), reference_answer="reference_answer")
    )
    completions = run.open(iteration, "completions").scan()
    advantages = run.open(iteration, "advantages").scan().drop("group_id")
    per_group = completions.join(advantages, on="completion_id", maintain_order="left").group_by(
        "group_id", maintain_order=True
    )
    groups = per_group.agg(
        pl.col("prompt_id").first(),
        pl.len().alias("members"),
        pl.col("reward").count().alias("scored"),
        pl.col("group_reward_mean").first().alias("mean"),
        pl.col("group_reward_std").first().alias("std"),
        pl.col("reward").max().alias("best"),
        pl.col("completion_token_ids").list.len().mean().alias("tokens"),
        pl.col("policy_name").unique(maintain_order=True).str.join("+").alias("policies"),
        pl.col("drop_reason").drop_nulls().first().alias("drop_reason"),
    )
    columns = (
        "group_id",
        "prompt",
        "reference_answer",
        "members",
        "scored",
        "mean",
        "std",
        "best",
        "tokens",
        "policies",
        "drop_reason",
    )
    return groups.join(prompts, on="prompt_id", maintain_order="left").select(columns).collect()


def print_groups(path: str | Path, iteration: int | None, sort: str | None, limit: int, format_: Format) -> None:
    """Print one row per group. Read-only."""
    run = open_run(path)
    frame = group_table(run, last_iteration(run, "advantages") if iteration is None else iteration)
    if sort is not None:
        name = sort.removeprefix("-")
        if name not in frame.columns:
            raise UsageError(f"groups have no column {name!r} to sort by: choose one of {', '.join(frame.columns)}")
        frame = frame.sort(name, descending=sort.startswith("-"), nulls_last=True, maintain_order=True)
    print_rows((frame.head(limit) if limit > 0 else frame).to_dicts(), format_, columns=frame.columns)


def show_group(path: str | Path, iteration: int | None, group: str | None, format_: Format) -> None:
    """Print one group readably: prompt, members by advantage, reward parts, policy, finish reason. Read-only.

    ``group`` is a group_id or its beginning; without one the group of the widest reward spread is shown.
    """
    import polars as pl

    run = open_run(path)
    index = last_iteration(run, "advantages") if iteration is None else iteration
    members = _members(run, index, group)
    if format_ is not Format.table:
        print_rows(members.to_dicts(), format_, columns=members.columns)
        return
    first = members.row(0, named=True)
    prompt = (
        run.open(index, "prompts").scan().filter(pl.col("prompt_id") == first["prompt_id"]).collect().row(0, named=True)
    )
    screen = console()
    screen.print(
        f"iteration {index}, group {first['group_id']}, prompt {first['prompt_id']}, task {prompt['task']}",
        markup=False,
    )
    for message in prompt["messages"]:
        screen.print(f"  {message['role']}: {message['content']}", markup=False)
    screen.print(f"  reference answer: {prompt['reference_answer']}", markup=False)
    screen.print(
        f"  rewards: mean {_number(first['group_reward_mean'])}, std {_number(first['group_reward_std'])}\n",
        markup=False,
    )
    rows = members.to_dicts()
    if max(len(row["completion"]) for row in rows) > LONG_ANSWER:
        for row in rows:
            _print_member(row)
        return
    print_rows([_member_row(row) for row in rows], Format.table)


def _member_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "advantage": row["advantage"],
        "reward": row["reward"],
        **{part["reward_name"]: part["reward"] if part["error"] is None else part["error"] for part in row["parts"]},
        "completion": row["completion"],
        "finish": row["finish_reason"],
        "tokens": len(row["completion_token_ids"]),
        "logprob": sum(x for x in row["sampling_logprobs"] if x is not None),
        "policy": f"{row['policy_name']} {row['policy_digest'][:8]}",
        "dropped": row["drop_reason"],
    }


def _print_member(row: dict[str, Any]) -> None:
    """Print a member whose answer needs lines of its own."""
    from rich.padding import Padding
    from rich.text import Text

    screen = console()
    facts = _member_row(row)
    facts.pop("completion")
    line = "  ".join(
        f"{name} {_number(value) if isinstance(value, float) else value}"
        for name, value in facts.items()
        if value is not None
    )
    screen.print(Text(line, style="bold"))
    # Text, never markup: values come from a model
    screen.print(Padding(Text(row["completion"]), (0, 0, 0, 4)))
    for part in row["parts"]:
        if part["detail"] is not None:
            screen.print(Padding(Text(f"{part['reward_name']}: {part['detail']}", style="dim"), (0, 0, 0, 4)))
    screen.print()


def _members(run: RunDir, iteration: int, group: str | None) -> "pl.DataFrame":
    import polars as pl

    advantages = run.open(iteration, "advantages").scan()
    if group is None:
        spread = advantages.group_by("group_id", maintain_order=True).agg(pl.col("group_reward_std").first())
        chosen = (
            spread.sort("group_reward_std", descending=True, nulls_last=True, maintain_order=True).first().collect()
        )
    else:
        chosen = advantages.select("group_id").unique().filter(pl.col("group_id").str.starts_with(group)).collect()
    if len(chosen) != 1:
        raise UsageError(
            f"iteration {iteration} of {run.name} has {len(chosen)} groups whose id begins with {group!r}, expected "
            "one: see `grpo groups`"
        )
    group_id = chosen["group_id"].item()
    parts = (
        run.open(iteration, "rewards")
        .scan()
        .filter(pl.col("group_id") == group_id)
        .group_by("completion_id")
        .agg(pl.struct("reward_name", "reward", "error", "detail").alias("parts"))
    )
    return (
        run.open(iteration, "completions")
        .scan()
        .filter(pl.col("group_id") == group_id)
        .join(advantages.drop("group_id"), on="completion_id")
        .join(parts, on="completion_id", how="left")
        .sort("advantage", "completion_index", descending=[True, False])
        .collect()
    )


def _question() -> "pl.Expr":
    import polars as pl

    return pl.col("messages").list.last().struct.field("content")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
