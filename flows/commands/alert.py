"""`grpo alert`: webhooks that are called when a run needs somebody."""

from typing import Annotated

import typer

from flows.commands.options import Output, answer, server_client
from flows.printing import Format, print_rows, say
from pipeline.errors import UsageError

WRITES = True
ANSWER_SECONDS = 60.0
"""How long `test` waits for the server to call the webhook."""

alert = typer.Typer(
    help="Call a webhook when a check fails, rewards collapse or a flow run dies.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the alert: see grpo alert list.")]


@alert.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Webhook that takes JSON: https://hooks.slack.com/...")],
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EVENT",
            help="iteration.finished, check.failed, reward.collapsed, verify.failed, flow.failed, flow.crashed; "
            "several times; default: all but the first.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Default: the URL's host.")] = None,
) -> None:
    """Add an alert: Prefect's server posts JSON with a text to the URL whenever one of the events happens.

    Example: grpo alert add https://hooks.slack.com/services/... --on check.failed --on flow.crashed
    """
    from flows.schedule.alerts import Alert, named_after_host
    from pipeline.config import validate

    chosen = {"on": on} if on else {}
    wanted = validate(Alert, {"name": name or named_after_host(url), "webhook": url, **chosen}, "the alert")
    with server_client() as client:
        from flows.schedule import automations

        if wanted.name in (there.name for there in automations.read_all(client)):
            raise UsageError(
                f"there is an alert {wanted.name!r} already: name this one (--name), or remove that one first (grpo "
                f"alert remove {wanted.name})"
            )
        automations.put(client, wanted)
    say(f"{wanted.name}: {wanted.summary}; try it: grpo alert test {wanted.name}")


@alert.command("list")
def list_(format_: Output = Format.table) -> None:
    """Show the alerts of the server, of each address the host alone. Read-only."""
    from flows.schedule.alerts import shown

    with server_client() as client:
        from flows.schedule import automations

        rows = [
            {
                "name": there.name,
                "webhook": shown(there.settings["webhook"]) if there.settings["webhook"] else None,
                "on": there.settings["on"],
                "enabled": there.is_enabled,
                "file": there.file,
            }
            for there in automations.read_all(client)
        ]
    print_rows(rows, format_, columns=("name", "webhook", "on", "enabled", "file"))


@alert.command()
def remove(name: Name) -> None:
    """Remove an alert."""
    with server_client() as client:
        from flows.schedule import automations

        automations.remove(client, automations.read(client, name))
    say(f"{name} is removed")


@alert.command()
def test(name: Name) -> None:
    """Send the webhook of an alert a test; say what it answered. Exit code 1 unless it took it."""
    import time

    with server_client() as client:
        from flows.schedule import automations

        there = automations.read(client, name)
        since = automations.send_test(client, there)
        deadline = time.monotonic() + ANSWER_SECONDS
        while (found := automations.answer_since(client, there, since)) is None and time.monotonic() < deadline:
            time.sleep(0.5)
    has_taken, said = found or (False, f"the server has not called it within {ANSWER_SECONDS:.0f} s: see its log")
    say(f"{name}: {said}")
    answer(has_taken)
