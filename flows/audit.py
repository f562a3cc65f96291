"""The flow audit: what `grpo audit` does, as a Prefect flow that fails where there is a warning."""

from pathlib import PurePosixPath

from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.watching import alive
from pipeline.files import user_path
from pipeline.runs import open_run
from stages.inspect.audit import audit as checks


def flow_run_name() -> str:
    """Return the name of the current flow run: ``audit of demo``."""
    return f"audit of {PurePosixPath(runtime.flow_run.parameters['run']).name}"


@flow(name="audit", flow_run_name=flow_run_name, persist_result=False)
def audit(run: str, config: str | None = None, fail: bool = True) -> int | State[int]:
    """Look for reward hacking, leaks and broken training; return the number of warnings. Writes nothing.

    Args:
        run: the run directory or URL.
        config: path of a TOML file with thresholds; default: those of configs/audit.toml.
        fail: end as Failed when there is a warning.
    """
    log = get_run_logger().info
    with alive():
        report = checks.audit(open_run(run), checks.load_audit_config(user_path(config) if config else None))
    for finding in report.findings:
        log(f"{finding.severity}: {finding.check}: {finding.message}")
    warnings = [finding.check for finding in report.findings if finding.severity == "warning"]
    log(f"{len(warnings)} warnings, {len(report.findings) - len(warnings)} for information")
    if warnings and fail:
        return Failed(message=f"{len(warnings)} warnings: {', '.join(warnings)}; see `grpo audit {run}`")
    return len(warnings)
