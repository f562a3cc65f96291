"""Schedules as a prefect.yaml, for people who run Prefect their own way."""

from collections.abc import Sequence
from typing import Any

from flows.schedule.client import POOL
from flows.schedule.deployments import ANCHOR, ENTRYPOINT, STRATEGIES, TAG
from flows.schedule.spec import Schedule, seconds_of

HEADER = """# Made by `grpo schedule export`: prefect deploy --all
# The worker needs this program: pip install it, or name its folder in PYTHONPATH.
"""


def prefect_yaml(schedules: Sequence[Schedule]) -> str:
    """Return the text of a prefect.yaml with a deployment for each schedule."""
    import yaml

    tables = {"name": "grpo", "deployments": [_deployment(schedule) for schedule in schedules]}
    return HEADER + str(yaml.safe_dump(tables, sort_keys=False, allow_unicode=True, width=120))


def _deployment(schedule: Schedule) -> dict[str, Any]:
    if schedule.every is not None:
        times: dict[str, Any] = {"interval": seconds_of(schedule.every), "anchor_date": ANCHOR.isoformat()}
    else:
        times = {"cron": schedule.cron, "timezone": schedule.timezone}
    return {
        "name": schedule.name,
        "entrypoint": ":".join(ENTRYPOINT.rsplit(".", 1)),  # `prefect deploy` wants a colon, and then a pull step
        "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": schedule.folder}}],
        "description": schedule.summary,
        "tags": [TAG],
        "parameters": {name: value for name, value in schedule.job.items() if value is not None},
        "schedules": [times],
        "concurrency_limit": {"limit": 1, "collision_strategy": STRATEGIES[schedule.on_overlap]},
        "work_pool": {"name": POOL},
    }
