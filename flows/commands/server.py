"""`grpo server`: the Prefect server of this machine, for schedules."""

import os
from typing import Annotated

import typer

from flows.commands.options import answer
from flows.printing import say

WRITES = True

server = typer.Typer(help="Start and stop Prefect's server, which keeps the schedules.", no_args_is_help=True)


@server.command()
def start(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 4200,
    database_url: Annotated[
        str | None,
        typer.Option(
            "--database-url",
            metavar="URL",
            help="postgresql://USER:PASSWORD@HOST/DATABASE; default: Prefect's own setting, else SQLite.",
        ),
    ] = None,
) -> None:
    """Start the server in the background. It listens on this machine alone, and shows its page there.

    Example: grpo server start --port 4200
    """
    from flows.environment import set_defaults
    from flows.schedule import local

    set_defaults()
    there = local.start(port, database_url)
    os.environ[local.URL_VARIABLE] = there.url
    from flows.schedule.automations import have_the_dead_ended
    from flows.schedule.client import connected

    with connected() as client:
        have_the_dead_ended(client)
    say(f"the server runs: {there.ui} ({there.database}; process {there.pid}; log {local.log_path()})")
    say("next: grpo worker, and grpo schedule add CONFIG --every 1d")
    say(f"for Prefect's own commands: export {local.URL_VARIABLE}={there.url}")


@server.command()
def stop() -> None:
    """End the server of this machine. Schedules stay in its database; nothing fires until it runs again."""
    from flows.schedule import local

    there = local.stop()
    say("no server runs here" if there is None else f"the server at {there.ui} has ended")


@server.command()
def status() -> None:
    """Say where the server runs; exit code 1 when none answers."""
    from flows.environment import answers
    from flows.schedule import local

    there = local.running()
    if there is None:
        say("no server runs here: grpo server start")
        answer(False)
    elif not answers(there.url):
        say(f"the server (process {there.pid}) does not answer at {there.ui}: see {local.log_path()}")
        answer(False)
    else:
        say(f"the server runs: {there.ui} ({there.database}; process {there.pid}; log {local.log_path()})")
