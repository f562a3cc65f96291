"""`grpo replay`: compute stored artifacts again, and print how they compare. The run is only read."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Iteration, Output, Run, Trust, answer, last_iteration, start_working
from flows.printing import Format, print_rows, say
from pipeline.chain import INITIAL
from pipeline.errors import ArtifactError, GrpoError, UsageError
from pipeline.files import user_path
from pipeline.functions import permit
from pipeline.runs import open_run

if TYPE_CHECKING:
    from flows.replayer import Replayed
    from stages.engines.base import Engine
    from stages.inspect.artifact_diff import Deviation

WRITES = True  # into a scratch folder
COLUMNS = ("iteration", "stage", "dataset", "result", "stored", "computed", "seconds", "found")
MOST_DEVIATIONS = 20
"""Columns and tensors that the table shows, the largest differences first; jsonl and csv have all."""


def replay(
    run: Run,
    iteration: Iteration = None,
    stage: Annotated[str | None, typer.Option("--stage", help="One stage; default: all that are stored.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every iteration.")] = False,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="Keep what is computed in this folder.", parser=user_path, metavar="PATH"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Of floats, relative to the largest in their tensor or column.")
    ] = 1e-5,
    trust: Trust = False,
    format_: Output = Format.table,
) -> None:
    """Compute stored artifacts again: equal to the bit, close, or different (exit code 1)? The run is only read.

    Exit code 2 when nothing differs, but something could not be computed.

    Example: grpo replay runs/demo --iteration 3
    """
    from flows.replayer import DATASET_OF

    if all_ and iteration is not None:
        raise UsageError("--all and --iteration exclude each other: give one")
    last = last_iteration(open_run(run), DATASET_OF.get(stage or "", "completions")) if iteration is None else iteration
    if trust:
        permit(None)
    start_working()
    answer(print_replay(run, None if all_ else [last], stage, format_, scratch=scratch, tolerance=tolerance))


def print_replay(
    path: str | Path,
    iterations: Sequence[int] | None,
    stage: str | None,
    format_: Format,
    *,
    scratch: Path | None = None,
    engine: "Engine | None" = None,
    tolerance: float | None = None,
) -> bool:
    """Compute stages again, print a row per artifact, return whether all are equal or close. The run is only read.

    Args:
        path: the run.
        iterations: which ones; None = all.
        stage: one stage; None = all whose results are stored.
        format_: how to print.
        scratch: folder that keeps what is computed; None = a temporary one.
        engine: a running engine; None = one with the run's settings is started when it is needed.
        tolerance: largest difference of floats, relative to the largest in their tensor or column; None = TOLERANCE.

    Raises:
        ArtifactError: when nothing differs, but something could not be computed: that is no answer.
    """
    from flows.replayer import NOT_COMPUTED, Replayer, not_computed, wanted_stages
    from stages.inspect.artifact_diff import TOLERANCE

    tolerance = TOLERANCE if tolerance is None else tolerance
    run = open_run(path)
    folder = Path(tempfile.mkdtemp(prefix="grpo-replay-")) if scratch is None else scratch
    replayer = Replayer(run, folder, engine, tolerance)
    rows: list[Replayed] = []
    try:
        for iteration in [INITIAL, *run.iterations()] if iterations is None else iterations:
            for name in wanted_stages(run, iteration, stage):
                try:
                    rows += replayer.replay(name, iteration)
                except GrpoError as error:  # keep what was computed so far
                    rows.append(not_computed(iteration, name, str(error)))
            if scratch is None:
                shutil.rmtree(folder / f"{iteration:06d}", ignore_errors=True)
    finally:
        replayer.close()
        if scratch is None:
            shutil.rmtree(folder, ignore_errors=True)
    if not rows:
        raise UsageError(
            f"{run.name} has no stored results of {stage or 'any stage'} in the iterations asked for: see `grpo ls`"
        )
    _print(rows, format_, tolerance)
    bad = [row.result for row in rows if not row.is_fine]
    if bad and set(bad) == {NOT_COMPUTED}:
        raise ArtifactError(
            f"{len(bad)} of {len(rows)} artifacts could not be computed again, which is no proof against them: see why "
            "above, and replay them again"
        )
    return not bad


def _print(rows: "Sequence[Replayed]", format_: Format, tolerance: float) -> None:
    is_table = format_ is Format.table
    listed = [
        {
            **{name: getattr(row, name) for name in COLUMNS},
            "stored": row.stored[:16] if is_table else row.stored,
            "computed": row.computed and (row.computed[:16] if is_table else row.computed),
            "tolerance": tolerance,
            "deviations": [_plain(odd) for odd in row.deviations],
            "machine": list(row.machine),
        }
        for row in rows
    ]
    if not is_table:
        print_rows(listed, format_, columns=(*COLUMNS, "tolerance", "deviations", "machine"))
        return
    print_rows(listed, format_, columns=[name for name in COLUMNS if name != "found"])
    for row in rows:
        if row.found:
            text = f"iteration {row.iteration} {row.dataset} ({row.result}): {row.found}"
            say(text)
    odd = [{"iteration": r.iteration, "dataset": r.dataset, **_plain(d)} for r in rows for d in r.deviations]
    odd.sort(key=lambda d: (d["is_close"], -(float("inf") if d["relative"] is None else d["relative"])))
    if odd:
        columns = ("iteration", "dataset", "part", "name", "relative", "is_close", "where")
        print_rows(odd[:MOST_DEVIATIONS], format_, columns=columns)
    if len(odd) > MOST_DEVIATIONS:
        say(f"and {len(odd) - MOST_DEVIATIONS} more: see --format jsonl")
    for line in _verdict(rows, tolerance):
        say(line)


def _plain(odd: "Deviation") -> dict[str, Any]:
    return {name: getattr(odd, name) for name in ("part", "name", "relative", "is_close", "where")}


def _verdict(rows: "Sequence[Replayed]", tolerance: float) -> Iterator[str]:
    """Yield what the results mean, as text."""
    words = {
        "equal": "equal to the bit",
        "close": "close",
        "differs": "different",
        "timed out": "different where time ran out",
        "other recipe": "of another recipe",
        "not computed": "not computed",
    }
    counts = {word: sum(row.result == word for row in rows) for word in words}
    told = ", ".join(f"{counts[word]} {text}" for word, text in words.items() if counts[word])
    yield f"{len(rows)} artifacts: {told or 'nothing to compute'}"
    if counts["close"] or counts["differs"]:
        yield (
            f"close = every float within {tolerance:g} of the largest magnitude in its tensor or column, all else equal"
        )
        changes = dict.fromkeys(text for row in rows for text in row.machine)
        if changes:
            yield f"the machine is of another kind, so bits may differ: {'; '.join(changes)}"
        else:
            yield "the machine is of the same kind: equal bits were to be expected"
    if counts["timed out"]:
        yield (
            "timed out = rewards differ only where time ran out, then or now: neither is proof of the other; replay "
            "again on a machine that is no slower"
        )
