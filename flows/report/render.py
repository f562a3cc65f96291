"""`grpo report`: one HTML page about a run, which as a file opens anywhere, without a network.

The page is data plus fixed scripts and a style sheet, whose hashes are in its Content-Security-Policy: nothing that a
model wrote can run, be loaded, or change how the page looks. Completions are stored as JSON and become text nodes. What
steers text is an escape everywhere: the template and the script make every text visible.
"""

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import jinja2
import polars as pl
from markupsafe import Markup

from flows.report.figures import Drawn, FigureSpec, draw, figure_specs
from pipeline.errors import OutOfSpace, SchemaError, UsageError
from pipeline.files import atomic_write
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from pipeline.text import STEERING, json_text, visible
from stages.checks.outcome import counted
from stages.inspect.report_data import FINDING_ROWS, Finding, Report, collect, read_findings
from stages.inspect.report_groups import TAIL_TOKENS, number

Where = TypeVar("Where")
PAGE = Path(__file__).parent / "page"
TABLE_ROWS = 40
MOST_FINDINGS = 200
BYTES_PER_MEGABYTE = 1_000_000

GLANCE = {
    "reward_mean": ("mean reward", False),
    "pass_rate": ("pass rate, training", True),
    "eval_pass_at_1": ("pass rate, held-out, greedy", True),
    "zero_variance_share": ("groups that told nothing", True),
    "unscored_share": ("answers without a reward", True),
    "completion_tokens_mean": ("tokens of an answer, mean", False),
    "truncated_share": ("answers cut at max_tokens", True),
    "entropy": ("entropy, nats", False),
    "kl_to_sampler": ("KL to the sampler, nats", False),
    "clip_high_share": ("tokens clipped, A > 0", True),
    "clip_low_share": ("tokens clipped, A < 0", True),
    "age_mean": ("updates behind, mean", False),
    "ess_rows": ("effective sample size", True),
    "grad_norm": ("gradient norm", False),
}
"""Measure -> its label, and whether it is a share."""


def write_report(
    run: str | Path,
    output: Path | None = None,
    *,
    findings: Path | None = None,
    groups: int = 12,
    megabytes: float = 10.0,
    seed: int = 0,
) -> tuple[Path, Report]:
    """Write the report of a run, by default next to its iterations as `report.html`; return its path and contents.

    ``findings`` is a file that `stages.inspect.report_data.read_findings` reads. The run itself is only read.

    Raises:
        UsageError: when an argument is invalid, or the findings cannot be read.
        ArtifactMissing: when there is no run.
        ArtifactDamaged: when a file of the run differs from its manifest.
        SchemaError: when rows lack a column that the report needs.
    """
    contents = collector(findings, groups=groups, megabytes=megabytes, seed=seed)
    directory = open_run(run)
    report = contents(directory)
    place = output or directory.root / "report.html"
    try:
        with atomic_write(place) as temporary:
            temporary.write_text(render(report), encoding="utf-8", newline="\n")
    except OutOfSpace:
        raise
    except OSError as error:
        raise UsageError(f"{place} cannot be written ({error.strerror}): name another file with --output") from error
    return place, report


def collector(
    findings: Path | None = None, *, groups: int = 12, megabytes: float = 10.0, seed: int = 0
) -> Callable[[RunDir], Report]:
    """Return what collects the report of a run, after checking its arguments; see `write_report`."""
    if groups < 1 or not 0 < megabytes < float("inf"):
        raise UsageError(f"groups is {groups} and megabytes {megabytes:g}: give at least one group and some room")
    found: list[Finding] | None = None
    if findings is not None:
        try:
            found = read_findings(findings.read_text(encoding="utf-8"), findings)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{findings} cannot be read ({error}): name a file of an audit's findings") from error

    def contents(run: RunDir) -> Report:
        try:
            return collect(run, found, groups=groups, most_bytes=int(megabytes * BYTES_PER_MEGABYTE), seed=seed)
        except pl.exceptions.PolarsError as error:
            raise SchemaError(
                f"{run.name} lacks what a report needs ({str(error).splitlines()[0]}): expected the columns of `grpo "
                "schema`; make the run's datasets again with this version, or convert them"
            ) from error

    return contents


class Following(NamedTuple):
    """What a page that is served says of itself."""

    state: str
    """What `/state` answers as long as this page is the last one."""
    text: str
    """Of which iteration it is."""


def render(report: Report, following: Following | None = None) -> str:
    """Return the page, or one that follows the run. The same report gives the same bytes."""
    style, script, live = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "live.js"))
    scripts = [script] if following is None else [script, live]
    sections: dict[str, list[Drawn]] = {}
    missing: list[FigureSpec] = []
    for spec in figure_specs():
        figure = draw(spec, report)
        if figure is None:
            missing.append(spec)
        else:
            sections.setdefault(spec.section, []).append(figure)
    shown = {k: {view["group_id"] for view in views} for k, views in report.groups.items() if views}
    data = {
        "iterations": report.iterations,
        "charts": {
            figure.spec.name: {"box": figure.box, "limits": figure.limits, "series": _rounded(figure.series)}
            for figures in sections.values()
            for figure in figures
            if figure.series and figure.svg
        },
        "shown": {k: len(groups) for k, groups in shown.items()},
        "tail_tokens": TAIL_TOKENS,
        "steering": re.sub(r"\\U0*([0-9a-f]+)", r"\\u{\1}", STEERING.pattern),  # as JavaScript writes it
    }
    ranked = sorted(report.findings or [], key=lambda f: {"error": 0, "warning": 1}.get(f.severity, 2))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        report=report,
        policy=content_security_policy(style, *scripts, connects=following is not None),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        following=following,
        num_iterations=count(len(report.iterations), "iteration"),
        count=count,
        glance=_glance(report),
        sections={title: [_figure(report, figure) for figure in figures] for title, figures in sections.items()},
        findings=[_finding(finding, shown) for finding in ranked[:MOST_FINDINGS]],
        num_more_findings=max(0, len(ranked) - MOST_FINDINGS),
        severities=Counter(finding.severity for finding in ranked),
        checks=_checks(report),
        selection=_selection(report),
        left_out=_left_out(report, missing),
        page_data=for_script(data),
        group_data={k: for_script(views) for k, views in report.groups.items() if views},
    )


def _shown(value: Any) -> Any:
    """Return what the template puts on the page: text made visible, our own markup as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def content_security_policy(style: str, *scripts: str, connects: bool = False) -> str:
    """Return a policy that loads nothing, and permits only this style sheet and these scripts.

    ``connects`` lets the scripts ask the server that the page came from.
    """
    hashes = " ".join(f"'{_hash(script)}'" for script in scripts)
    own = "connect-src 'self'; " if connects else ""
    return (
        f"default-src 'none'; script-src {hashes}; style-src '{_hash(style)}'; {own}base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def for_script(value: Any) -> Markup:
    """Return JSON that cannot end the script element around it."""
    text = json_text(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def count(times: int, noun: str) -> str:
    """Return "1 group", "2 groups"."""
    return f"{times:,} {noun}{'' if times == 1 else 's'}"


def say(value: float | None, *, is_share: bool = False) -> str:
    """Return a number as text: four digits, shares in percent, nothing for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value).replace("-", "\u2212")
    if is_share:
        return f"{value:.1%}" if abs(value) >= 0.001 else "0" if value == 0 else f"{100 * value:.1g}%"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return text.replace("-", "\u2212")


def _rounded(series: dict[str, list[float | None]]) -> dict[str, list[float | str | None]]:
    return {label: [number(v, 5) for v in values] for label, values in series.items()}


def _known(report: Report, values: list[float | None]) -> list[tuple[int, float]]:
    return [(k, v) for k, v in zip(report.iterations, values, strict=True) if v is not None]


def _glance(report: Report) -> list[dict[str, Any]]:
    rows = []
    for name, (label, is_share) in GLANCE.items():
        known = _known(report, report.series.get(name, []) or [None] * len(report.iterations))
        if not known:
            continue
        points: list[tuple[int | str, float]] = [*known]
        if (initial := report.initial.get(name)) is not None:
            points.insert(0, ("the start", initial))
        ends = (points[0], points[-1], *_extremes(points))
        texts = [say(value, is_share=is_share) for _, value in ends]
        is_constant = len(set(texts)) == 1
        wheres = [None if is_constant else where for where, _ in ends]
        rows.append({"label": label, "cells": list(zip(texts, wheres, strict=True))})
    return rows


def _extremes(points: Sequence[tuple[Where, float]]) -> tuple[tuple[Where, float], tuple[Where, float]]:
    """Return the points with the lowest and the highest value; NaN is neither unless there is nothing else."""
    numbers = [point for point in points if not math.isnan(point[1])] or points
    return min(numbers, key=lambda p: p[1]), max(numbers, key=lambda p: p[1])


def _figure(report: Report, drawn: Drawn) -> dict[str, Any]:
    spec = drawn.spec
    return {
        "name": spec.name,
        "title": spec.title,
        "svg": Markup(drawn.svg),
        "caption": drawn.note + spec.caption + _limit(report, spec.name),
        "summary": [_summary(report, label, values, spec.is_share) for label, values in drawn.series.items()],
        "table": _table(report, drawn) if drawn.series and drawn.svg else None,
        "has_cursor": bool(drawn.series and drawn.svg),
    }


def _limit(report: Report, name: str) -> str:
    if name == "length" and report.max_tokens is not None:
        return f" The limit is {report.max_tokens:,}."
    if name == "pass-rate" and report.pass_threshold is not None:
        text = f" The threshold is {report.pass_threshold:g}."
        if (initial := report.initial.get("eval_pass_at_1")) is not None:
            text += f" Before training the held-out greedy rate was {say(initial, is_share=True)}."
        return text
    return ""


def _summary(report: Report, label: str, values: list[float | None], is_share: bool) -> str:
    known = _known(report, values)
    low, high = _extremes(known)
    first, last, least, most = (say(v, is_share=is_share) for v in (known[0][1], known[-1][1], low[1], high[1]))
    if least == most:
        return f"{label}: {first} throughout"
    return f"{label}: {first} \u2192 {last} (lowest {least} at {low[0]}, highest {most} at {high[0]})"


def _table(report: Report, drawn: Drawn) -> dict[str, Any]:
    """Return the rows under a figure: all iterations, or TABLE_ROWS spread evenly from the first to the last."""
    total = len(report.iterations)
    positions = range(total)
    shown = ""
    if total > TABLE_ROWS:
        positions = sorted({round(i * (total - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})  # type: ignore[assignment]
        shown = f" ({len(positions)} of {total:,} iterations; grpo metrics prints all)"
    rows = [
        [report.iterations[p], *(say(values[p], is_share=drawn.spec.is_share) for values in drawn.series.values())]
        for p in positions
    ]
    return {"labels": list(drawn.series), "rows": rows, "shown": shown}


def _finding(finding: Finding, shown: dict[int, set[str]]) -> dict[str, Any]:
    rows = []
    for row in finding.rows[:FINDING_ROWS]:
        names = [f"iteration {row.iteration}"]
        is_said = row.completion_id is not None and row.completion_id.startswith(row.group_id or "")
        names += [f"group {row.group_id}"] if row.group_id is not None and not is_said else []
        names += [f"answer {row.completion_id}"] if row.completion_id is not None else []
        link = None
        if row.group_id is not None and row.group_id in shown.get(row.iteration, set()):
            parts = [str(row.iteration), row.group_id, *([row.completion_id] if row.completion_id else [])]
            link = "#" + "/".join(["group", *(_component(part) for part in parts)])
        rows.append({"text": ", ".join(names), "link": link})
    kind = finding.severity if finding.severity in ("error", "warning") else "info"
    return {
        "check": finding.check,
        "severity": finding.severity,
        "kind": kind,
        "message": finding.message,
        "rows": rows,
        "num_more": max(0, len(finding.rows) - FINDING_ROWS),
    }


def _checks(report: Report) -> list[dict[str, Any]]:
    """Return the checks that failed, those that hold the run first, each with its last iterations."""
    by_check: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in report.failed_checks:
        by_check.setdefault((row["severity"], row["name"], row["condition"]), []).append(row)
    rank = {"block": 0, "quarantine": 1}
    return [
        {
            "severity": severity,
            "kind": "error" if severity == "block" else "warning",
            "name": name,
            "condition": condition,
            "rows": [_failure(row) for row in rows[: -FINDING_ROWS - 1 : -1]],
            "num_earlier": max(0, len(rows) - FINDING_ROWS),
        }
        for (severity, name, condition), rows in sorted(by_check.items(), key=lambda item: rank.get(item[0][0], 2))
    ]


def _failure(row: dict[str, Any]) -> str:
    numbers = counted(row["num_failed"], row["num_rows"])
    limit = "" if not row["max_share"] else f", at most {say(row['max_share'], is_share=True)} may"
    note = "" if row["note"] == numbers else f"; {row['note']}"
    return f"iteration {row['iteration']}: {numbers}{limit}{note}"


def _component(text: str) -> str:
    return quote(text, safe="")


def _selection(report: Report) -> str:
    counts = report.counts
    if not counts["shown_groups"]:
        return "No group can be shown: the run has neither answers nor advantages, or they do not fit on the page."
    if counts["shown_groups"] == counts["groups"]:
        return f"All {count(counts['groups'], 'group')} of the run."
    return (
        f"{counts['shown_groups']:,} of {count(counts['groups'], 'group')} are on the page, chosen within each "
        "iteration: those that an audit names, then by turns those with failed rewards, the widest spread of rewards, "
        "the largest advantage, answers cut at max_tokens, and a sample that the seed decides. This is no fair sample "
        "of the run; the curves are about all of it."
    )


def _left_out(report: Report, missing: list[FigureSpec]) -> list[str]:
    lines = [f"{spec.title}: {spec.needs} of this run does not hold it." for spec in missing]
    total = len(report.iterations)
    for dataset, times in report.absent.items():
        which = "any iteration" if times == total else f"{times:,} of {count(total, 'iteration')}"
        lines.append(f"{dataset}: not stored for {which}.")
    for dataset, times in report.elsewhere.items():
        where = f"read from another run for {count(times, 'iteration')}"
        lines.append(f"{dataset}: {where}; its seconds are not counted here.")
    recorded = any("ratio" in m for views in report.groups.values() for view in views for m in view["members"])
    if "training_records" not in report.absent and not recorded and report.counts["shown_groups"]:
        lines.append(
            "Importance ratios, correction weights and entropies by token: update.record_tokens is off, so that only "
            "their means by answer are stored."
        )
    if report.findings is None:
        lines.append("Findings of an audit: none were given.")
    return lines
