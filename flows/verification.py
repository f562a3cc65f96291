"""The commands that audit: verify, lineage, diff and prune. None of them imports torch, vllm or prefect, but for
`verify --deep`, which imports torch.

Functions that answer a question return whether the answer is yes; the command line makes exit code 1 of no.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.printing import Format, console, print_rows
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import UsageError
from pipeline.manifest import MANIFEST, is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import lock, open_run

if TYPE_CHECKING:
    from stages.inspect.verify.logprobs import DeepSettings


def print_verification(path: str | Path, limit: int, format_: Format, *, deep: "DeepSettings | None" = None) -> bool:
    """Audit a run; print the table of checks and what is wrong; return whether nothing is. Read-only.

    A table goes on with the wrong rows; jsonl and csv print the wrong rows alone, and nothing when all is fine. With
    ``deep`` the sampler's log probabilities are computed again, and the mismatch of each iteration is printed too: in
    jsonl and csv as rows whose ``kind`` is mismatch.
    """
    from stages.inspect.verify.ledger import CHECKS
    from stages.inspect.verify.verify import verify_run

    run = open_run(path)
    is_shown = sys.stderr.isatty()
    findings = verify_run(run, limit=limit, progress=_show if is_shown else _ignore)
    checks = dict(CHECKS)
    figures: list[dict[str, Any]] = []
    if deep is not None:
        from stages.inspect.verify.logprobs import CHECK, PROVES, check_logprobs

        checks[CHECK] = PROVES
        figures = [asdict(found) for found in check_logprobs(run, findings, deep, _show if is_shown else _ignore)]
    if is_shown:
        _show("")
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
    screen = console()
    if figures:
        screen.print("log probabilities, trainer against sampler, in nats per token:", markup=False)
        print_rows(figures, format_)
    for (check, reason), count in findings.notes.items():
        screen.print(f"not checked: {check} of {count} artifacts: {reason}", markup=False)
    if findings.pruned:
        places = len({where.path for where, _ in findings.pruned})
        screen.print(f"pruned: {len(findings.pruned)} files of {places} checkpoints, dropped on purpose", markup=False)
    for problem in problems:
        place = " ".join(str(problem[key]) for key in ("artifact", "part", "row") if problem[key] is not None)
        screen.print(f"{problem['check']}: {place}: {problem['found']}", markup=False, soft_wrap=True)
    verdict = "nothing is wrong" if findings.is_fine else f"{_count_wrong(findings.tallies)} things are wrong"
    screen.print(f"{run.root}: {verdict}", markup=False)
    return findings.is_fine


PROBLEM_COLUMNS = ("check", "artifact", "dataset", "iteration", "part", "row", "rows", "found")
FIGURE_COLUMNS = ("of_rows", "tokens", "difference_mean", "difference_max", "kl_to_sampler", "beyond")


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


def _show(text: str) -> None:
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _ignore(_: str) -> None: ...


def print_lineage(path: Path, completion: str | None, depth: int | None, format_: Format) -> None:
    """Print what an artifact was made from, as a tree; of a policy also the rows of every update behind it.

    With ``completion`` the path is a run, and the way of that completion is printed: from its prompt to every policy
    that it helped to train. Read-only.
    """
    from pipeline.lineage import ancestry, trace, updates_of

    if completion is not None:
        run = open_run(path)
        steps = trace(run, completion)
        rows = [
            {
                "what": s.what,
                "artifact": _below(s.artifact, run.root),
                "digest": _digest(s.artifact, format_),
                "says": s.says,
            }
            for s in steps
        ]
        print_rows(rows, format_, columns=("what", "artifact", "digest", "says"))
        return
    if not is_finished(path):
        raise UsageError(
            f"{path} is no finished artifact (no {MANIFEST}): name one, for example "
            "runs/demo/iterations/000003/policy, or a run with --completion"
        )
    artifact = open_artifact(path)
    root = _root(path)
    tree: list[dict[str, Any]] = [
        {
            "artifact": ("  " * node.depth if format_ is Format.table else "") + _below(node.artifact, root),
            "depth": node.depth,
            "input": node.name,
            "stage": node.artifact.manifest.stage,
            "rows": node.artifact.manifest.rows,
            "digest": _digest(node.artifact, format_),
            "above": node.is_repeated,
        }
        for node in ancestry(artifact, depth)
    ]
    if format_ is not Format.table:
        print_rows(tree, format_, columns=("depth", "input", "artifact", "stage", "rows", "digest", "above"))
        return
    print_rows(tree, format_, columns=("artifact", "input", "stage", "rows", "digest", "above"))
    updates = [
        {
            "policy": _below(update.policy, root),
            "digest": _digest(update.policy, format_),
            "made of": _below(update.batches, root),
            "rows": update.num_rows,
            "dropped": update.num_dropped,
            "updated from": _digest(update.parent, format_),
        }
        for update in updates_of(artifact)
    ]
    if updates:
        print_rows(updates, format_)


def _root(path: Path) -> Path:
    """Return the run that the artifact lies in, else the folder around it."""
    return next((p for p in path.resolve().parents if RunDir(p).resolved_config.is_file()), path.parent)


def _below(artifact: Artifact, root: Path) -> str:
    """Return the path of an artifact as a reader of this run knows it."""
    return Path(os.path.relpath(artifact.path.resolve(), root.resolve())).as_posix()


def _digest(artifact: Artifact, format_: Format) -> str:
    return artifact.digest[:16] if format_ is Format.table else artifact.digest


def print_diff(a: str | Path, b: str | Path, format_: Format) -> bool:
    """Print how two runs differ: settings, first recipe, first row; return whether they are equal. Read-only."""
    from stages.inspect.run_diff import compare_runs

    differences = compare_runs(open_run(a), open_run(b))
    rows = [{"kind": d.kind, "where": d.where, "what": d.what, "a": d.a, "b": d.b} for d in differences]
    if format_ is Format.table and not rows:
        console().print(f"{a} and {b} are equal", markup=False)
    else:
        print_rows(rows, format_, columns=("kind", "where", "what", "a", "b"))
    return not rows


def prune_run(path: str | Path, keep_policies: int, *, initial: bool, dry_run: bool, format_: Format) -> None:
    """Drop the checkpoints of all but the last policies; rows and manifests stay. Print what went."""
    from pipeline.prune import Pruned, prunable, prune

    run = open_run(path)
    with lock(run):
        items = prunable(run, keep_policies, _needed(path), initial=initial)
        done: Sequence[Pruned] = items if dry_run else list(prune(items))
    rows = [
        {
            "checkpoint": _below(item.artifact, run.root),
            "updates": item.num_updates,
            "files": len(item.files),
            "bytes": item.num_bytes,
            "digest": _digest(item.artifact, format_),
        }
        for item in done
    ]
    print_rows(rows, format_, columns=("checkpoint", "updates", "files", "bytes", "digest"))
    if format_ is Format.table:
        verb = "would be dropped" if dry_run else "dropped"
        console().print(
            f"{sum(item.num_bytes for item in done):,} bytes of {len(done)} checkpoints {verb}", markup=False
        )


def _needed(path: str | Path) -> set[int]:
    """Return the policies, by number of updates, that write members of the run's coming groups."""
    from stages.config import recorded_config
    from stages.members import member_updates

    run = open_run(path)
    count = sum(is_finished(run.policy_before(index + 1)) for index in run.iterations())
    members = recorded_config(run).generate.plan()
    coming = range(count, 2 * count + 1)  # by then even the oldest age is past the policies that exist
    found = {member_updates(member, iteration) for member in members for iteration in coming}
    return {number for number in found if number is not None and number <= count}
