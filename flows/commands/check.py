"""`grpo check`: the checks of a config over the rows of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Output, Run, answer
from flows.printing import Format, print_rows, say
from pipeline.chain import STEPS
from pipeline.errors import ArtifactMissing, ConfigError
from pipeline.files import user_path
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

if TYPE_CHECKING:
    import polars as pl

    from stages.checks.config import CheckStageConfig

WRITES = False
COLUMNS = ("iteration", "severity", "name", "num_rows", "num_failed", "passed", "note")
NEEDED = tuple(name for name in STEPS["check"].reads if name != "training_records")


def check(
    run: Run,
    checks: Annotated[
        Path | None,
        typer.Option("--checks", help="TOML file with [[checks]]; default: the run's own.", parser=user_path),
    ] = None,
    format_: Output = Format.table,
) -> None:
    """Make checks over every scored iteration of a run; exit code 1 when one of severity block fails. Read-only.

    Example: grpo check runs/demo --checks checks.toml
    """
    from stages.checks.outcome import blocking

    run_dir = open_run(run)
    found = check_run(run_dir, load_checks(run_dir, checks))
    if format_ is Format.table:
        failed = found.filter(~found["passed"])
        print_rows(failed.to_dicts(), format_, columns=COLUMNS)
        say(f"{found.height:,} checks of {found['iteration'].n_unique():,} iterations, {failed.height:,} failed")
    else:
        print_rows(found.to_dicts(), format_, columns=found.columns)
    answer(blocking(found).is_empty())


def load_checks(run: RunDir, file: Path | None) -> "CheckStageConfig":
    """Return the checks of a file, or those of the run's own config. Read-only.

    Raises:
        ConfigError: when there are none, or one of them is none.
    """
    from pipeline.config import validate
    from stages.checks.config import CheckStageConfig, expanded
    from stages.inspect.audit.by_name import check_audits

    if file is None:
        tables, source = {"checks": run.settings().get("checks", [])}, str(run.resolved_config)
    else:
        tables, source = expanded({"checks": str(file)}), str(file)
    config = validate(CheckStageConfig, tables, source)
    check_audits(config.checks, of_a_run=True)
    if not config.checks:
        raise ConfigError(f"{source} has no [[checks]]: name a file that has some (--checks)")
    return config


def check_run(run: RunDir, config: "CheckStageConfig") -> "pl.DataFrame":
    """Return a row for each check and scored iteration, and one for each check of the audit over the whole run.

    The columns are those of the dataset `checks`, behind that of the iteration; null = the whole run. Read-only.

    Raises:
        ArtifactMissing: when no iteration is scored.
    """
    import polars as pl

    from stages.check import audit_row, check_rows
    from stages.checks.config import AuditCheck, CheckStageConfig
    from stages.config import recorded_config
    from stages.inspect.audit.audit import CHECKS
    from stages.inspect.audit.by_name import outcome_of, thresholds_of
    from stages.inspect.audit.run_rows import load_run_rows

    scored = [index for index in run.iterations() if all(run.has(index, name) for name in NEEDED)]
    if not scored:
        raise ArtifactMissing(f"{run.name} has no scored iteration yet: run it, or name another run")
    settings = recorded_config(run)
    per_iteration = CheckStageConfig(checks=[c for c in config.checks if not isinstance(c, AuditCheck)])
    frames = []
    for index in scored:
        inputs = {name: run.open(index, name).scan() for name in NEEDED}
        if index and run.has(index - 1, "training_records"):
            inputs["training_records"] = run.open(index - 1, "training_records").scan()
        facts: dict[str, Any] = {"iteration": index, "is_offline": settings.stored(index) is not None}
        frames.append(_at(index, check_rows(per_iteration, inputs, facts, None)))
    for check in config.checks:
        if isinstance(check, AuditCheck):
            rows = load_run_rows(run, thresholds := thresholds_of(check))
            found = outcome_of(CHECKS[check.check](rows, thresholds), rows.completions)
            frames.append(_at(None, audit_row(check, found)))
    return pl.concat(frames)


def _at(index: int | None, rows: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    return rows.select(pl.lit(index, pl.Int32).alias("iteration"), pl.all())
