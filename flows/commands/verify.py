"""`grpo verify`: checks files, chain and meaning of a run. Only `--deep` imports torch."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Output, Run, Trust, answer
from flows.printing import Format, print_rows, say, show_progress, spans
from pipeline.functions import permit
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

if TYPE_CHECKING:
    from stages.inspect.verify.ledger import Ledger
    from stages.inspect.verify.logprobs import DeepSettings

WRITES = False
PROBLEM_COLUMNS = ("check", "artifact", "dataset", "iteration", "part", "row", "rows", "found")
FIGURE_COLUMNS = ("of_rows", "tokens", "difference_mean", "difference_max", "kl_to_sampler", "beyond")


def verify(
    run: Run,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Wrong rows named of each check.")] = 20,
    deep: Annotated[bool, typer.Option("--deep", help="Compute the sampler's logprobs with the trainer's model.")] = (
        False
    ),
    deep_rows: Annotated[int, typer.Option("--deep-rows", min=0, help="Rows of each iteration; 0 = all.")] = 64,
    deep_threshold: Annotated[
        float, typer.Option("--deep-threshold", min=0, help="Largest |trainer - sampler| of a token, nats.")
    ] = 0.1,
    deep_seed: Annotated[int, typer.Option("--deep-seed", help="Chooses the rows.")] = 0,
    trust: Trust = False,
    format_: Output = Format.table,
) -> None:
    """Audit a run: files, chain and meaning; exit code 1 when something is wrong. Read-only.

    Example: grpo verify runs/demo --deep
    """
    settings = None
    if deep:
        from stages.inspect.verify.logprobs import DeepSettings

        settings = DeepSettings(deep_rows, deep_seed, deep_threshold)
    if trust:
        permit(None)
    answer(print_verification(run, limit, format_, deep=settings))


def print_verification(path: str | Path, limit: int, format_: Format, *, deep: "DeepSettings | None" = None) -> bool:
    """Verify a run; print the checks and what is wrong; return whether nothing is. Read-only.

    A table of checks comes first, then the wrong rows; jsonl and csv print only the wrong rows. With ``deep`` the
    sampler's log probabilities are computed again, and the mismatch of each iteration is printed too: in
    jsonl and csv as rows whose ``kind`` is mismatch.
    """
    from stages.inspect.verify.ledger import CHECKS
    from stages.inspect.verify.verify import verify_run

    run = open_run(path)
    is_shown = sys.stderr.isatty()
    progress = show_progress if is_shown else _ignore
    findings = verify_run(run, limit=limit, progress=progress)
    checks = dict(CHECKS)
    figures: list[dict[str, Any]] = []
    if deep is not None:
        from stages.inspect.verify.logprobs import CHECK, PROVES, check_logprobs

        checks[CHECK] = PROVES
        figures = [asdict(found) for found in check_logprobs(run, findings, deep, progress)]
    if is_shown:
        show_progress("")
    problems = [
        {
            "check": problem.check,
            "artifact": problem.where.path,
            "dataset": problem.where.dataset,
            "iteration": problem.where.iteration,
            "part": problem.part,
            "row": problem.row,
            "rows": problem.num_rows,
            "found": problem.found,
        }
        for problem in findings.problems
    ]
    if format_ is not Format.table:
        _print_machine_readable(problems, figures, format_, is_deep=deep is not None)
        return findings.is_fine
    tallies = [{"check": name, **_tally(findings.tallies[name]), "proves": checks[name]} for name in checks]
    print_rows(tallies, format_)
    if figures:
        say("log probabilities, trainer against sampler, in nats per token:")
        print_rows(figures, format_)
    for (check, reason), count in findings.notes.items():
        say(f"not checked: {check} of {count} artifacts: {reason}")
    for line in _pruned(run, findings):
        say(line)
    for problem in problems:
        place = " ".join(str(problem[key]) for key in ("artifact", "part", "row") if problem[key] is not None)
        say(f"{problem['check']}: {place}: {problem['found']}")
    verdict = "nothing is wrong" if findings.is_fine else f"{_count_wrong(findings.tallies)} things are wrong"
    if findings.notes:
        verdict += f"; {sum(findings.notes.values())} checks could not be made"
    say(f"{run.root}: {verdict}")
    return findings.is_fine


def _pruned(run: RunDir, findings: "Ledger") -> Iterator[str]:
    """Yield what was dropped on purpose, and whether it can be made again."""
    if not findings.pruned:
        return
    from pipeline.prune import can_be_made_again

    places = dict.fromkeys(run.root / where.path for where, _ in findings.pruned)
    yield f"pruned: {len(findings.pruned)} files of {len(places)} checkpoints, dropped on purpose"
    counts = {place: count for place in places if (count := run.num_updates(place)) is not None}
    states = {count for place, count in counts.items() if place.name == "optimizer"}
    policies = {count for place, count in counts.items() if place.name != "optimizer"}
    for name, found in (("policies", policies), ("optimizer states", states)):
        if found:
            yield f"  {name} after {spans(found)} updates"
    lost = {n for n in policies | states if not n or not can_be_made_again(run, n)}
    if again := (policies | states) - lost:
        yield (
            f"  `grpo replay {quote(run.name)} --iteration N --stage update --scratch FOLDER` makes again what is "
            f"dropped after N + 1 updates, for N + 1 = {spans(again)}"
        )
    if lost:
        yield f"  nothing makes again what is dropped after {spans(lost)} updates: no policy before is there"


def _print_machine_readable(
    problems: list[dict[str, Any]], figures: list[dict[str, Any]], format_: Format, *, is_deep: bool
) -> None:
    if not is_deep:
        print_rows(problems, format_, columns=PROBLEM_COLUMNS)
        return
    columns = ("kind", *PROBLEM_COLUMNS, *FIGURE_COLUMNS)
    blank = dict.fromkeys(columns)
    rows = [{**blank, "kind": "mismatch", **figure} for figure in figures]
    print_rows([*rows, *({**blank, "kind": "problem", **problem} for problem in problems)], format_, columns=columns)


def _tally(tally: Any) -> dict[str, Any]:
    return {
        "checked": tally.checked,
        "wrong": tally.wrong,
        "pruned": tally.pruned or None,
        "skipped": tally.skipped or None,
    }


def _count_wrong(tallies: dict[str, Any]) -> int:
    return sum(tally.wrong for tally in tallies.values())


def _ignore(_: str) -> None: ...
