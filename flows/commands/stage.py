"""`grpo stage`: one stage of one iteration."""

from typing import Annotated

import typer

from flows.commands.options import Run, Trust, start_working
from flows.printing import say
from pipeline.chain import STEPS
from pipeline.errors import UsageError

WRITES = True


def stage(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help=f"{', '.join(list(STEPS)[:-1])} or {list(STEPS)[-1]}."),
    ],
    run: Run,
    iteration: Annotated[int, typer.Option("--iteration", "-i", min=0, help="Which iteration.")],
    trust: Trust = False,
) -> None:
    """Run one stage of one iteration with the run's own config; a finished one is found, not made again.

    Example: grpo stage score runs/demo --iteration 3
    """
    from flows.one_stage import check_stage, perform_stage
    from flows.progress import TerminalReporter
    from pipeline.functions import permit
    from pipeline.runs import open_run

    if name not in STEPS:
        raise UsageError(f"there is no stage {name!r}: choose one of {', '.join(STEPS)}")
    run_dir = open_run(run)
    if trust:
        permit(None)
    config = check_stage(run_dir, name, iteration)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        made = perform_stage(config, run_dir, name, iteration, reporter)
    say(run_dir.shown(made))
