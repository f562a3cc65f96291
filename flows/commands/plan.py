"""`grpo plan`: what a run would do, before it does it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Config, Overrides, answer, named_after
from flows.printing import Format, print_json, print_rows, say
from pipeline.errors import GrpoError
from pipeline.run_dir import RunDir
from pipeline.runs import open_run, run_at

if TYPE_CHECKING:
    from flows.planning.estimate import Estimator, Total
    from flows.planning.plan import Plan, Way
    from flows.planning.rehearsal import Rehearsal
    from stages.config import RunConfig

WRITES = False
RESCORED = ("score", "normalize")
"""Steps that `grpo rescore` runs again; also the tables whose changes it is made for."""
FORKED = (*RESCORED, "batch", "update")
"""Tables whose changes leave the stored completions of use to a fork."""


def plan(
    config: Config,
    run: Annotated[
        str | None, typer.Option("--run", help="Run directory or URL; default: runs/<name of the config>.")
    ] = None,
    overrides: Overrides = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="RUN", help="A run that says what steps take that RUN has not made.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Print what `grpo run` would reuse, compute or refuse, and why. Read-only; exit code 1 when the run is refused.

    Example: grpo plan configs/demo.toml --run runs/demo --set iterations=120
    """
    from flows.environment import set_defaults
    from pipeline.functions import permit

    set_defaults()
    permit(None)  # the config is the user's
    from flows.planning.estimate import Estimator
    from flows.planning.plan import document, make_plan
    from pipeline.config import parse_toml, read_toml
    from stages.config import parse_config

    toml = read_toml(config)
    settings = parse_config(toml, str(config), overrides)
    run_dir = run_at(run or f"runs/{config.stem}")
    estimator = Estimator([run_dir, *([open_run(like)] if like else [])])
    made = make_plan(settings, run_dir, estimator, str(config))
    own = parse_toml(toml, str(config))
    ways = other_ways(config, settings, run_dir, own, overrides or [], estimator) if made.is_of_other_recipe else []
    if as_json:
        print_json(document(made, ways))
    else:
        print_plan(made, ways)
    answer(not made.refusals)


def other_ways(
    config: Path,
    settings: "RunConfig",
    run: RunDir,
    own: Mapping[str, Any],
    overrides: Sequence[str],
    estimator: "Estimator",
) -> "list[Way]":
    """Return what can be done instead of a refused run: a new directory, then what stored completions save. Read-only.

    Args:
        config: path of the config, for the commands.
        settings: the config with its overrides.
        run: the run that is refused.
        own: the tables of the config's file.
        overrides: ``key=value`` settings.
        estimator: knows what the steps take.
    """
    from flows.commands.fork import fork_tables
    from flows.planning.estimate import Total
    from flows.planning.plan import Way
    from flows.planning.rehearsal import rehearse
    from pipeline.config import validate
    from stages.config import changed_rewards, changed_settings, config_class

    sets = "".join(f" --set {quote(override)}" for override in overrides)
    place = named_after(run.name, "new")
    command = f"grpo run {quote(str(config))} --run {quote(place)}{sets}"
    fresh = _total(rehearse(settings, run_at(place)), estimator)
    ways = [Way(command, "everything, in a new run directory", fresh)]
    changed = {change.setting.partition(".")[0] for change in changed_settings(run, settings)}
    if changed_rewards(run, settings) is not None:
        changed.add("score")
    stored = [index for index in run.iterations() if run.has(index, "completions")]
    if not (changed and stored):
        return ways
    arguments = f"{quote(run.name)} {quote(str(config))}"
    if changed <= {*RESCORED}:
        total = Total()
        for cost in (estimator.of_key(name) for name in RESCORED for _ in stored):
            total.add(cost, 1)
        does = f"rewards and advantages of the stored completions of {len(stored)} iterations; trains nothing"
        ways.append(Way(f"grpo rescore {arguments}{sets}", does, total))
    if changed <= {*FORKED}:
        try:
            tables = fork_tables(run, 0, own, None, list(overrides))
            forked = validate(config_class(), tables, str(config))
            fork = rehearse(forked, run_at(named_after(run.name, f"{config.stem}-0")))
        except GrpoError:
            return ways  # the initial policy was pruned, for example
        num = min(len(stored), forked.iterations)
        does = f"trains from the initial policy on the stored completions of {num} iterations, then generates"
        ways.append(Way(f"grpo fork {arguments} --at 0{sets}", does, _total(fork, estimator)))
    return ways


def _total(rehearsal: "Rehearsal", estimator: "Estimator") -> "Total":
    from flows.planning.estimate import Total
    from flows.planning.planned import Verdict

    total = Total()
    for planned in rehearsal.planned.values():
        if planned.verdict is Verdict.compute:
            total.add(estimator.of(planned, rehearsal.run), len(planned.places))
    return total


def print_plan(plan: "Plan", ways: "Sequence[Way]") -> None:
    """Print a plan for people: a line for each range of iterations with the same verdicts, then what it comes to."""
    from flows.planning.ranges import COLUMNS, lines

    rows = [line.row() for line in lines(plan)]
    columns = COLUMNS if any(row["unknown"] for row in rows) else COLUMNS[:-1]
    print_rows(rows, Format.table, columns=columns)
    for verdict, total in plan.totals().items():
        if total.artifacts:
            say(f"{verdict.name}: {total.artifacts:,} artifacts, {_told(total)}")
    say("seconds: stages of an iteration that run side by side are added up; starting the engine is not in them")
    for note in plan.notes:
        say(note)
    for refusal in plan.refusals[:1]:
        say(f"the run would be refused: {refusal}")
    if (more := len(plan.refusals) - 1) > 0:
        say(f"and {more} more reasons: see --json" if more > 1 else "and one more reason: see --json")
    for way in ways:
        say(f"instead: {way.command}")
        say(f"    {way.does}: {way.total.artifacts:,} artifacts, {_told(way.total)}")


def _told(total: "Total") -> str:
    if total.unknown == total.artifacts:
        return "seconds and bytes unknown"
    text = f"about {total.seconds:,.0f} s and {total.num_bytes:,} bytes"
    return f"{text}, without {total.unknown:,} that no run has made yet" if total.unknown else text
