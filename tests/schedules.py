"""Schedules for tests."""

from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from flows.schedule.deployments import Deployed
from flows.schedule.spec import Job, Schedule
from pipeline.config import validate

DUE = datetime(2026, 11, 28, 3, 0, 5, tzinfo=UTC)
FILE = "/project/schedules.toml"


def schedule(**settings: object) -> Schedule:
    tables = {"name": "nightly", "folder": "/project", "config": "configs/demo.toml", "cron": "0 3 * * *"}
    return validate(Schedule, {**tables, **settings}, "the schedule")


def job(folder: Path, **settings: object) -> Job:
    return validate(Job, {"name": "a", "folder": str(folder), "config": "config.toml", "run": "run", **settings}, "a")


def deployed(wanted: Schedule, file: str | None = FILE, **settings: object) -> Deployed:
    return Deployed(uuid4(), {**wanted.model_dump(mode="json"), **settings}, is_paused=False, file=file)
