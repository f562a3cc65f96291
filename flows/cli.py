"""The command line: `grpo`."""

import sys

from flows.commands import auditing, looking, rewards, training  # noqa: F401 (each adds its commands)
from flows.commands.common import app
from pipeline.errors import GrpoError


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 the answer is no, 2 wrong usage or unusable data."""
    sys.path.insert(0, "")  # reward functions are found in the current directory
    try:
        app()
    except GrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
