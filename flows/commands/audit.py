"""`grpo audit`: what a run's rows say about reward hacking. Read-only; imports no torch."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Output, Run
from flows.printing import Format, print_rows, say
from pipeline.files import user_path
from pipeline.runs import open_run

if TYPE_CHECKING:
    from stages.inspect.audit.findings import AuditReport, Finding, RowRef

WRITES = False
COLUMNS = ("check", "severity", "message", "value", "threshold", "rows")
ROWS_SHOWN = 3


def audit(
    run: Run,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Thresholds; default: configs/audit.toml's.", parser=user_path, metavar="PATH"),
    ] = None,
    format_: Output = Format.table,
) -> None:
    """Look for reward hacking, leaks and broken training; exit code 1 when there is a warning. Read-only.

    Example: grpo audit runs/demo
    """
    raise typer.Exit(audit_run(run, config, format_))


def audit_run(path: str | Path, config_path: Path | None, format_: Format) -> int:
    """Print the findings of a run; return the exit code: 1 when one is a warning, else 0. Read-only.

    A table also shows which checks found nothing and which lack their data; jsonl and csv print only findings.
    """
    from stages.inspect.audit import audit as checks

    report = checks.audit(open_run(path), checks.load_audit_config(config_path))
    if format_ is Format.table:
        print_report(report, path)
    else:
        rows: list[dict[str, Any]] = [finding.to_dict() for finding in report.findings]
        print_rows(rows, format_, columns=COLUMNS)
    return 1 if report.has_warnings else 0


def print_report(report: "AuditReport", path: str | Path) -> None:
    """Print a report as a table; ``path`` is the run in the commands that it names."""
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    say(
        f"{report.run}: {report.num_answers:,} answers of {report.num_iterations} iterations; "
        f"{_count(warnings, 'warning')}, {len(report.findings) - warnings} for information"
    )
    say()
    for finding in report.findings:
        say(f"{finding.severity}: {finding.check}", _style(finding))
        say(f"    {finding.message}")
        if finding.rows:
            say(f"    see {_see(finding.rows[0], path)}")
            more = ", ".join(_name(row) for row in finding.rows[1 : 1 + ROWS_SHOWN])
            if more:
                say(f"    also {more}")
    if report.findings:
        say()
    for status in ("clear", "not applicable"):
        for outcome in report.outcomes:
            if outcome.status == status:
                say(f"{status}: {outcome.check} ({outcome.note})", "dim")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _style(finding: "Finding") -> str:
    return "bold yellow" if finding.severity == "warning" else "bold"


def _see(row: "RowRef", path: str | Path) -> str:
    if row.group_id is None:
        return f"iteration {row.iteration}: grpo groups {quote(str(path))} -i {row.iteration}"
    # ids are data: what a reader pastes into a shell must be one word
    return f"{_name(row)}: grpo show {quote(str(path))} -i {row.iteration} -g {quote(row.group_id)}"


def _name(row: "RowRef") -> str:
    return f"iteration {row.iteration}" + ("" if row.group_id is None else f" {row.completion_id or row.group_id}")
