"""Prepares a run for training: loads its config, compares it with the run's own, and checks it, once."""

from dataclasses import dataclass, field
from pathlib import Path

from flows.reporter import Reporter, SilentReporter
from pipeline.config import read_toml
from pipeline.run_dir import RunDir
from pipeline.runs import check_unlocked, run_at
from stages.config import RunConfig, check_unchanged, parse_config
from stages.disk import disk_use
from stages.inspect.audit.by_name import check_audits
from stages.preflight import preflight
from stages.tracking import check_installed


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run whose config is loaded and checked."""

    settings: RunConfig
    run: RunDir
    toml: str
    """The config file as the user wrote it."""
    reporter: Reporter = field(default_factory=SilentReporter)
    records_diff: bool = False
    """Keep this program's uncommitted changes in full, which may hold a secret, and not only their hash."""
    remarks: tuple[str, ...] = ()
    """What a user should know before the run begins."""


def prepare(config: Path, run: str, overrides: list[str] | None = None) -> Prepared:
    """Return the run of a config file, checked as far as possible before anything is written. Read-only.

    Raises:
        GrpoError: of the class that fits, with one message.
    """
    toml = read_toml(config)  # once: the run keeps what was parsed, whatever an editor does meanwhile
    return check(parse_config(toml, str(config), overrides), run_at(run), toml)


def check(settings: RunConfig, run: RunDir, toml: str) -> Prepared:
    """Return the run of a loaded config, checked in the same way. Read-only.

    Raises:
        GrpoError: of the class that fits, with one message.
    """
    check_unlocked(run)
    check_unchanged(run, settings)
    check_audits(settings.checks)
    preflight(settings, run)
    if settings.tracking is not None:
        check_installed(settings.tracking)
    disk = disk_use(settings, run)
    disk.check(run, settings)
    return Prepared(settings, run, toml, remarks=(disk.line(),))
