"""The command line: `grpo`."""

import signal
import sys

from flows.commands import auditing, looking, rewards, training  # noqa: F401 (each adds its commands)
from flows.commands.common import app
from pipeline.errors import GrpoError

WRITING = ("run", "fork", "stage", "starter", "rescore", "import", "reward-model", "prune", "replay", "report")
INTERRUPTED = 130
"""Exit code of Ctrl-C and SIGTERM."""


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 the answer is no, 2 wrong usage or unusable data."""
    sys.path.insert(0, "")  # reward functions are found in the current directory
    if sys.argv[1:2] and sys.argv[1] not in WRITING:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a looking command, and is no answer
    try:
        app()
    except GrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("stopped; the same command continues", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
