"""`grpo worker`: takes the firings of schedules and runs them on this machine."""

import os
from typing import Annotated

import typer

from flows.printing import say

WRITES = True


def worker(
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What one command at a time may use; default: this machine's name."),
    ] = None,
) -> None:
    """Run what the schedules of the server want, one command at a time per device, until Ctrl-C.

    Example: CUDA_VISIBLE_DEVICES=1 grpo worker --device gpu1
    """
    import platform
    import sys

    from flows.environment import set_defaults
    from flows.schedule.local import use_server

    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "INFO")
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "5")
    # what is taken before it is due fires though its schedule was paused meanwhile, and is skipped for what has ended
    os.environ.setdefault("PREFECT_WORKER_PREFETCH_SECONDS", "0")
    set_defaults()
    url = use_server()
    from flows.schedule.automations import have_the_dead_ended
    from flows.schedule.client import POOL, connected, have_limit, have_pool
    from flows.schedule.firings import end_lost
    from flows.schedule.scheduled import DEVICE, WORKER

    name = device or os.environ.get(DEVICE) or platform.node()
    os.environ[DEVICE] = name
    os.environ[WORKER] = str(os.getpid())  # execv keeps it
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)  # where flows is found
    with connected() as client:
        have_pool(client)
        have_the_dead_ended(client)
        for lost in end_lost(client):
            say(f"{lost}: its process was killed; it is marked as crashed")
    have_limit(name)
    say(f"taking the firings of {url}, one command at a time on {name}; Ctrl-C ends it")
    sys.stdout.flush()
    # Prefect's own command in place of this process: it knows how its signals are to be handled
    command = ["-P", "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    os.execv(sys.executable, [sys.executable, *command])
