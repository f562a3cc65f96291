"""The entry of the command line: `grpo`, or `python -m flows.cli`.

A run that was handed over may hold files with the names of modules. The current directory is therefore taken off the
path before anything is imported; `pipeline.functions` puts it at the end when a function of the user's is wanted.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120 (only what Python itself imports)
"""Where the packages of this program lie."""


def main() -> None:
    """Run the command line; `flows.app` says with which exit codes."""
    leave_current_directory()
    try:
        from flows.app import run
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # nothing of ours is there yet that could explain it
        found = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"error: the program cannot be loaded ({found}): install it anew, see README.md\n")
        sys.exit(2)
    run()


def leave_current_directory() -> None:
    """Take the current directory off the path, unless this program lies there or PYTHONPATH names it in full."""
    try:
        here = os.path.realpath(os.getcwd())  # noqa: PTH109
    except OSError:  # it was deleted
        here = ""
    if here == ROOT:
        return
    # the first entry is Python's own, then come those of PYTHONPATH, where an empty one means the current directory
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    is_wanted = any(os.path.isabs(entry) and os.path.realpath(entry) == here for entry in given)  # noqa: PTH117
    own = 0 if sys.flags.safe_path else 1
    head = list(enumerate(sys.path[: own + len(given)]))
    kept = [e for i, e in head if e and (os.path.realpath(e) != here or (is_wanted and i >= own))]
    sys.path[: len(head)] = kept


if __name__ == "__main__":
    main()
