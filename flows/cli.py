"""The command line: `grpo`. It imports only the module of the given command."""

import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from keyword import iskeyword
from types import ModuleType

import typer

from flows.printing import complain, print_anything
from pipeline.errors import GrpoError

COMMANDS = (
    "verify",
    "lineage",
    "tokens",
    "prune",
    "replay",
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
    "fork",
    "stage",
    "starter",
    "reward",
)
"""In the order of `grpo --help`."""
INTERRUPTED = 130
"""Exit code of Ctrl-C and SIGTERM."""


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 the answer is no, 2 wrong usage or unusable data."""
    print_anything()
    sys.path.insert(0, "")  # reward functions are found in the current directory
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    if sys.argv[1:2] and not any(module_of(name).WRITES for name in asked):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a read-only command silently
    try:
        build_app(asked or COMMANDS)()
    except GrpoError as error:
        complain(f"error: {error}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            complain("stopped; the same command continues")
        raise


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


if __name__ == "__main__":
    main()
