"""`grpo schedule`: training, re-scoring and audits at set times, or when data has changed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Config, Limit, Output, Overrides, answer, server_client
from flows.printing import Format, complain, print_rows, say, show_progress
from pipeline.errors import UsageError
from pipeline.files import user_path

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

WRITES = True
CANCEL_SECONDS = 60.0
"""How long `cancel` waits until what it cancels has ended."""

schedule = typer.Typer(
    help="Run a config at set times, or when its data has changed.", no_args_is_help=True, rich_markup_mode=None
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the schedule: see grpo schedule list.")]
File = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="TOML file with tables [schedules.NAME] and [alerts.NAME].", parser=user_path),
]


@schedule.command()
def add(
    config: Config,
    cron: Annotated[str | None, typer.Option(help='Minute, hour, day, month, weekday: "0 3 * * *".')] = None,
    every: Annotated[str | None, typer.Option(help="An interval: 15m, 6h, 1d.")] = None,
    timezone: Annotated[str, typer.Option(help="Of --cron: Europe/Berlin.")] = "UTC",
    name: Annotated[str | None, typer.Option(help="Default: the config's.")] = None,
    run: Annotated[str | None, typer.Option(help="Run directory or URL; default: runs/<name of the config>.")] = None,
    overrides: Overrides = None,
    action: Annotated[str, typer.Option(help="continue, fresh, rescore, audit or verify.")] = "continue",
    iterations: Annotated[
        int | None, typer.Option(help="How many more at each firing (continue); default: the config's.")
    ] = None,
    on_overlap: Annotated[str, typer.Option(help="While the last firing still runs: queue or skip.")] = "queue",
    changed: Annotated[
        list[str] | None, typer.Option("--when-changed", metavar="FILE", help="Only if its content changed.")
    ] = None,
    new_rows: Annotated[
        list[str] | None, typer.Option("--when-new-rows", metavar="FILES", help="Only if there is a new one.")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(help="A command that takes longer is ended: 8h.")] = None,
) -> None:
    """Add a schedule. What a firing does: continue the run, start a fresh one with a dated name, or the command named.

    Example: grpo schedule add configs/demo.toml --cron "0 3 * * *" --iterations 10
    """
    from flows.schedule.spec import Schedule
    from pipeline.config import validate

    when = {key: value for key, value in (("changed", changed), ("new_rows", new_rows)) if value}
    tables: dict[str, Any] = {
        "name": name or config.stem,
        "folder": str(Path.cwd()),
        "config": str(config),
        "run": run,
        "action": action,
        "iterations": iterations,
        "overrides": overrides or [],
        "cron": cron,
        "every": every,
        "timezone": timezone,
        "on_overlap": on_overlap,
        "when": when or None,
        "time_limit": time_limit,
    }
    wanted = validate(Schedule, tables, "the schedule")
    _check_config(wanted)
    with server_client() as client:
        from flows.schedule import deployments

        if wanted.name in (there.name for there in deployments.read_all(client)):
            raise UsageError(
                f"there is a schedule {wanted.name!r} already: name this one (--name), or remove that one first (grpo "
                f"schedule remove {wanted.name})"
            )
        deployments.put(client, wanted)
        say(f"{wanted.name}: {wanted.summary}")
        _mind_worker(client)


@schedule.command("list")
def list_(format_: Output = Format.table) -> None:
    """Show the schedules of the server, and how their last firings ended. Read-only."""
    with server_client() as client:
        from flows.schedule import deployments

        rows = []
        for there in deployments.read_all(client):
            last = next(iter(deployments.runs_of(client, there, 1)), None)
            own = {key: there.settings[key] for key in ("action", "run", "config")}
            times = there.settings["every"] or f"{there.settings['cron']} {there.settings['timezone']}"
            rows.append(
                {
                    "name": there.name,
                    **own,
                    "times": times,
                    "when": there.settings["when"],
                    "paused": there.is_paused,
                    "last": _state(last) if last else None,
                    "file": there.file,
                }
            )
        columns = ("name", "action", "run", "config", "times", "when", "paused", "last", "file")
        print_rows(rows, format_, columns=columns)


@schedule.command()
def pause(name: Name) -> None:
    """Let a schedule fire no more until `resume`. What runs goes on: see `cancel`."""
    with server_client() as client:
        from flows.schedule import deployments

        client.pause_deployment(deployments.read(client, name).id)
    say(f"{name} is paused: grpo schedule resume {name}")


@schedule.command()
def resume(name: Name) -> None:
    """Let a paused schedule fire again. What it missed meanwhile is not made up for."""
    with server_client() as client:
        from flows.schedule import deployments

        client.resume_deployment(deployments.read(client, name).id)
    say(f"{name} fires again")


@schedule.command("run-now")
def run_now(name: Name) -> None:
    """Let a schedule fire now, with its condition on data; a worker takes it."""
    with server_client() as client:
        from flows.schedule import deployments

        run = deployments.run_now(client, deployments.read(client, name))
        say(f"{name} fires: grpo schedule history {name} (flow run {run.id})")
        _mind_worker(client)


@schedule.command()
def cancel(name: Name) -> None:
    """End what a schedule runs now, and what waits behind it; later firings stay. Exit code 1 if it goes on."""
    import time

    with server_client() as client:
        from flows.schedule import deployments

        asked = deployments.cancel(client, deployments.read(client, name))
        if not asked:
            say(f"nothing of {name} runs or waits")
            return
        deadline = time.monotonic() + CANCEL_SECONDS
        runs = asked
        while not all(map(deployments.is_over, runs)) and time.monotonic() < deadline:
            time.sleep(0.5)
            runs = [client.read_flow_run(run.id) for run in asked]
        for run in runs:
            say(f"{run.name} of {_time(run)}: {_state(run)}")
        if not all(map(deployments.is_over, runs)):
            complain(f"it has not ended within {CANCEL_SECONDS:.0f} s: is its worker alive? (grpo worker)")
            answer(False)


@schedule.command()
def remove(name: Name) -> None:
    """Remove a schedule. Its runs, and what it remembers of its data, stay on disk."""
    with server_client() as client:
        from flows.schedule import deployments

        there = deployments.read(client, name)
        if any(not deployments.is_over(run) for run in deployments.runs_of(client, there)):
            raise UsageError(f"{name} runs, or waits to: cancel it first (grpo schedule cancel {name})")
        client.delete_deployment(there.id)
    say(f"{name} is removed")


@schedule.command()
def history(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Default: all schedules.")] = None,
    limit: Limit = 20,
    format_: Output = Format.table,
) -> None:
    """Show the firings, the latest first: when, how each ended, and why it ran or did not. Read-only."""
    with server_client() as client:
        from flows.schedule import deployments

        there = deployments.read(client, name) if name else None
        rows = [
            {
                "due": _time(run),
                "name": run.parameters.get("name"),
                "state": _state(run),
                "seconds": round(run.estimated_run_time.total_seconds(), 1) if run.start_time else None,
                "why": run.state.message if run.state else None,
                "flow_run": str(run.id),
            }
            for run in deployments.runs_of(client, there, limit or None)
        ]
    columns = ("due", "name", "state", "seconds", "why", "flow_run")
    print_rows(rows, format_, columns=columns[:-1] if format_ is Format.table else columns)


@schedule.command()
def apply(
    file: File = Path("schedules.toml"),
    yes: Annotated[bool, typer.Option("--yes", help="Change it without a question.")] = False,
) -> None:
    """Make the server's schedules and alerts those of a file; say first what will change. Exit code 1 if declined.

    Those that another file or `add` has made stay as they are, and what is paused stays paused.
    """
    import os
    import sys

    from flows.schedule.alerts import load_alerts
    from flows.schedule.spec import load_schedules

    wanted, alerts = load_schedules(file), load_alerts(file)
    for each in wanted:
        _check_config(each)
    with server_client() as client:
        from flows.schedule import automations, deployments
        from flows.schedule.diff import changes

        for each in wanted:
            deployments.times_of(each)
        source = os.path.abspath(file)  # noqa: PTH100 (a link is a name of its own)
        found = changes(wanted, deployments.read_all(client), source)
        about_alerts = changes(alerts, automations.read_all(client), source, "alert")
        if not found and not about_alerts:
            say(f"nothing to change: the server has what {file} says")
            return
        for line in (*(change.line for change in found), *(change.line for change in about_alerts)):
            say(line)
        if not yes and not (sys.stdin.isatty() and typer.confirm("change this?")):
            say("nothing was changed: --yes changes it")
            answer(False)
        for number, change in enumerate(found, 1):
            show_progress(f"{number} of {len(found)}")
            if change.wanted is not None:
                deployments.put(client, change.wanted, file=source, replaced=change.there)
            elif change.there is not None:
                client.delete_deployment(change.there.id)
        for about in about_alerts:
            if about.wanted is not None:
                automations.put(client, about.wanted, file=source, replaced=about.there)
            elif about.there is not None:
                automations.remove(client, about.there)
        complain("")
        if wanted:
            _mind_worker(client)


@schedule.command()
def export(file: File = Path("schedules.toml")) -> None:
    """Print the schedules of a file as a prefect.yaml, for `prefect deploy --all` on a server of your own. Read-only.

    Example: grpo schedule export schedules.toml > prefect.yaml
    """
    from flows.schedule.export import prefect_yaml
    from flows.schedule.spec import load_schedules

    for line in prefect_yaml(load_schedules(file)).splitlines():
        say(line)


def _check_config(wanted: Any) -> None:
    """Check the config of a schedule now, not at night.

    Raises:
        ConfigError: when it is missing or wrong.
    """
    from pipeline.config import load_toml
    from pipeline.functions import permit
    from stages.config import load_config

    permit(None)  # the config is the user's
    path = Path(wanted.folder) / user_path(wanted.config)
    if wanted.action in ("continue", "fresh"):
        load_config(path, wanted.overrides)
    else:
        load_toml(path)
    if wanted.action == "continue" and wanted.when is not None:
        say(
            f"note: {wanted.name} continues a run, which refuses another source or other rewards than it began with: "
            "if those are what changes, take the action fresh or rescore"
        )


def _mind_worker(client: "SyncPrefectClient") -> None:
    from flows.schedule.client import has_worker

    if not has_worker(client):
        say("no worker is there to run it: start one with `grpo worker`")


def _time(run: "FlowRun") -> str:
    due = run.expected_start_time
    return "" if due is None else f"{due:%Y-%m-%d %H:%M:%S}Z"


def _state(run: "FlowRun") -> str:
    return run.state.name or run.state.type.value if run.state else "unknown"
