"""The process's environment, set before torch and Prefect are imported: no telemetry, time for a slow machine.

Nothing here decides a result. Variables that the user has set are left alone.
"""

import os
import urllib.error
import urllib.request

from pipeline.errors import UsageError
from pipeline.text import without_login

DEFAULTS = {
    # threads that spin while they wait take the core from the engine; torch reads this when it is imported
    "OMP_WAIT_POLICY": "PASSIVE",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # the temporary server needs 17 to 36 seconds on a slow machine; Prefect's own limit is 20
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    # the command line shows progress and errors itself; the log goes to the server
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # else each event that a dead server misses fills the screen
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # its own seven retries of two minutes each would hold a run up for as long
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else each migration of its database is told
    "WANDB_ERROR_REPORTING": "false",
    # its own wait for an upload at the end, also at that of an interrupted program, has no limit
    "WANDB_FINISH_TIMEOUT": "30",
    "TOKENIZERS_PARALLELISM": "false",
}
PROBE_SECONDS = 30
"""A busy server answers late; where there is none, the connection is refused at once."""


def prepare_environment(*, with_prefect: bool = True) -> None:
    """Set the environment for this process and its children; call before the first import of prefect.

    ``with_prefect``: find out whether the server that PREFECT_API_URL names, if any, answers.

    Raises:
        UsageError: when PREFECT_API_URL names a server that does not answer.
    """
    set_defaults()
    url = os.environ.get("PREFECT_API_URL")
    if url and with_prefect:
        _probe(url)


def set_defaults() -> None:
    """Set what the user has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def is_started_by_prefect() -> bool:
    """Return whether a Prefect worker or `serve` started this process, and so handles its signals."""
    return "PREFECT__FLOW_RUN_ID" in os.environ


def answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Return whether a Prefect server answers in time at the URL of its API. Read-only."""
    return _why_silent(url, seconds) is None


def _why_silent(url: str, seconds: float) -> Exception | None:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None  # it wants credentials, which Prefect has
    except (OSError, ValueError) as error:
        return error


def _probe(url: str) -> None:
    if (error := _why_silent(url, PROBE_SECONDS)) is not None:
        raise UsageError(
            f"PREFECT_API_URL is {without_login(url)}, where no Prefect server answers ({error}): start it with "
            "`prefect server start`, or unset the variable to use a temporary one"
        ) from error
