"""The commands of `grpo`. Only the module of the given command is imported."""

import atexit
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from keyword import iskeyword
from types import ModuleType

import typer

from flows.crash import INTERRUPTED, fail, flush, hidden_fault, is_interrupt, leave, spare_collection
from flows.printing import complain, print_anything
from pipeline.errors import UsageError
from pipeline.functions import permitting_only

COMMANDS = (
    "verify",
    "lineage",
    "tokens",
    "prune",
    "replay",
    "check",
    "audit",
    "report",
    "ls",
    "rows",
    "show",
    "groups",
    "metrics",
    "schema",
    "rescore",
    "import",
    "reward-model",
    "whatif",
    "diff",
    "run",
    "plan",
    "fork",
    "stage",
    "starter",
    "reward",
    "server",
    "worker",
    "schedule",
    "alert",
)
"""In the order of `grpo --help`."""


def run() -> None:
    """Run the command that is asked for, and exit.

    Exit codes: 0 fine, 1 the answer is no, 2 wrong usage or unusable data, 130 stopped by Ctrl-C or SIGTERM. However a
    command ends, a failure is one message and no traceback, see `flows.crash`.
    """
    atexit.register(spare_collection)
    print_anything()
    try:
        with permitting_only():  # each command permits what its user has named
            _run_command()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            complain("stopped; the same command continues")
        elif (fault := hidden_fault(end)) is not None:
            fail(fault)
        else:
            flush()
        leave(end.code if isinstance(end.code, int) else 2 if end.code else 0)
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except BaseException as error:
        if is_interrupt(error):
            leave(INTERRUPTED)
        fail(error)


def _run_command() -> None:
    if sys.flags.optimize > 1:
        raise UsageError(
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which torch and transformers need: use -O or 1, "
            "which give the same results"
        )
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    if sys.argv[1:2] and not any(module_of(name).WRITES for name in asked):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a read-only command silently
    build_app(asked or COMMANDS)()


def build_app(names: Iterable[str]) -> typer.Typer:
    """Return the application with these commands. Help and the error for an unknown name need all of them."""
    app = typer.Typer(
        help="Train language models with GRPO, with every step of it a dataset.",
        callback=lambda: None,  # else a single command would be the application itself
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name in names:
        module = module_of(name)
        command = getattr(module, module.__name__.rpartition(".")[2])
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def module_of(name: str) -> ModuleType:
    """Return the module of a command. It has a function, or an application of several, with the command's name."""
    return import_module(f"flows.commands.{name.replace('-', '_')}{'_' * iskeyword(name)}")
