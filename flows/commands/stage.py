"""`grpo stage`: one stage of one iteration."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import Run, start_working
from pipeline.errors import UsageError

WRITES = True


def stage(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="prompts, generate, score, normalize, batch, update, optimizer or evaluate."
        ),
    ],
    run: Run,
    iteration: Annotated[int, typer.Option("--iteration", "-i", min=0, help="Which iteration.")],
) -> None:
    """Run one stage of one iteration with the run's own config; a finished one is found, not made again.

    Example: grpo stage score runs/demo --iteration 3
    """
    from flows.progress import TerminalReporter
    from flows.session import open_session
    from pipeline.manifest import is_finished
    from pipeline.runs import open_run
    from stages.config import recorded_config

    names = ("prompts", "generate", "score", "normalize", "batch", "update", "optimizer", "evaluate")
    if name not in names:
        raise UsageError(f"there is no stage {name!r}: choose one of {', '.join(names)}")
    run_dir = open_run(run)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown(), open_session(recorded_config(run_dir), run_dir, reporter) as session:
        is_new = name == "update" and not is_finished(run_dir.place(iteration, "policy"))
        path = getattr(session, name)(iteration + 1 if name == "evaluate" else iteration)
        if is_new:
            session.optimizer(iteration)  # else the next update would have to train on these rows once more
    print(run_dir.shown(Path(path)))
