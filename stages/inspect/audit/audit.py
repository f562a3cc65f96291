"""audit: what a run's own rows say about reward hacking, leaks and broken training. Read-only.

Every check is a function ``check(run, config) -> Outcome`` over the same run, described in
`docs/audit_checks.md`. A check that lacks its data says so and finds nothing.
"""

from collections.abc import Callable
from pathlib import Path

from pipeline.config import load_toml, validate
from pipeline.errors import ConfigError
from pipeline.run_dir import RunDir
from stages.inspect.audit.findings import AuditReport, Outcome
from stages.inspect.audit.leaks import held_out_leak, prompt_copy, reference_in_prompt, reference_verbatim
from stages.inspect.audit.outcomes import class_change, reward_against_reference, saturation
from stages.inspect.audit.phrases import rewarded_phrase
from stages.inspect.audit.rewards import dominant_part, policy_share, reward_length
from stages.inspect.audit.run_rows import RunRows, load_run_rows
from stages.inspect.audit.text import duplicates_across_prompts, duplicates_in_group, empty_format, repetition
from stages.inspect.audit.thresholds import AuditConfig
from stages.inspect.audit.training import evaluation_gap, jumps, timed_out, truncated

CHECKS: dict[str, Callable[[RunRows, AuditConfig], Outcome]] = {
    "reward_length": reward_length,
    "rewarded_phrase": rewarded_phrase,
    "reward_against_reference": reward_against_reference,
    "dominant_part": dominant_part,
    "policy_share": policy_share,
    "reference_in_prompt": reference_in_prompt,
    "reference_verbatim": reference_verbatim,
    "prompt_copy": prompt_copy,
    "held_out_leak": held_out_leak,
    "evaluation_gap": evaluation_gap,
    "saturation": saturation,
    "class_change": class_change,
    "jumps": jumps,
    "truncated": truncated,
    "timed_out": timed_out,
    "duplicates_in_group": duplicates_in_group,
    "duplicates_across_prompts": duplicates_across_prompts,
    "repetition": repetition,
    "empty_format": empty_format,
}
"""In the order of the report."""


def load_audit_config(path: Path | None) -> AuditConfig:
    """Return the thresholds of a TOML file, or the defaults.

    Raises:
        ConfigError: when the file has unknown keys or values, or disables a check that does not exist.
    """
    if path is None:
        return AuditConfig()
    config = validate(AuditConfig, load_toml(path), str(path))
    unknown = sorted(set(config.disabled) - set(CHECKS))
    if unknown:
        raise ConfigError(f"{path}: disabled names {unknown}, the checks are {', '.join(CHECKS)}: correct the names")
    return config


def audit(run: RunDir, config: AuditConfig) -> AuditReport:
    """Return the outcome of every check that is not disabled. Read-only.

    Raises:
        ArtifactMissing: when no iteration has completions.
    """
    rows = load_run_rows(run, config)
    outcomes = [check(rows, config) for name, check in CHECKS.items() if name not in config.disabled]
    return AuditReport(run.root.name, len(rows.iterations), len(rows.completions), outcomes)
