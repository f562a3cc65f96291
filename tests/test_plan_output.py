"""What a plan says of itself: lines, costs, the document for programs, cheaper ways."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.app import build_app
from flows.planning.estimate import Estimator
from flows.planning.plan import Plan, document, make_plan
from flows.planning.planned import Reason, Verdict
from flows.planning.ranges import lines
from pipeline.run_dir import RunDir
from stages.config import load_config
from tests.planned_run import drop, planned

CHAIN_OF_ITERATION = ("prompts", "generate", "score", "normalize", "batch", "update", "optimizer")


@pytest.fixture
def config(original: Path) -> Path:
    """Return the config of the finished run."""
    return original.parent.parent / "run.toml"


def ranges(plan: Plan) -> list[tuple[Any, ...]]:
    return [(row["iterations"], row["steps"], row["verdict"]) for row in (line.row() for line in lines(plan))]


def test_iterations_with_the_same_verdicts_stand_in_one_line(config: Path, run: RunDir) -> None:
    plan = planned(load_config(config, ["iterations=9"]), run)
    chain = " ".join(CHAIN_OF_ITERATION)
    rest = chain.removeprefix("prompts ")
    assert ranges(plan) == [
        ("", "initial_policy", "reuse"),
        ("", "held_out_prompts", "reuse"),
        ("initial to 1", "evaluate", "reuse"),
        ("3 to 8", "evaluate", "compute"),
        ("0 to 1", chain, "reuse"),
        ("2", "prompts", "compute"),
        ("2", rest, "compute"),
        ("3 to 8", "prompts", "compute"),
        ("3 to 8", rest, "compute"),
    ]
    found = lines(plan)
    assert found[6].because == "input prompts will be computed"
    assert found[8].because == "inputs prompts, policy:current, policy will be computed"
    seconds = {name: Estimator([run]).of_key(name).seconds or 0 for name in CHAIN_OF_ITERATION}
    assert found[7].total.seconds == pytest.approx(6 * seconds["prompts"])
    assert found[8].total.seconds == pytest.approx(6 * (sum(seconds.values()) - seconds["prompts"]))


def test_costs_are_taken_from_another_run_where_there_is_none(config: Path, run: RunDir, tmp_path: Path) -> None:
    settings = load_config(config, ["generate.max_tokens=9"])
    new = RunDir(tmp_path / "new")
    unknown = make_plan(settings, new, Estimator([new])).totals()[Verdict.compute]
    assert unknown.unknown == unknown.artifacts > 0
    plan = make_plan(settings, new, Estimator([new, run]))
    total = plan.totals()[Verdict.compute]
    assert total.unknown == 0
    manifests = [artifact.manifest for artifact in run.artifacts()]
    assert total.num_bytes == pytest.approx(
        sum(facts["bytes"] for manifest in manifests for facts in manifest.files.values()), rel=0.01
    )
    assert list(plan.notes) == [
        f"{run.name}, which says what steps take, was made with other settings: generate.max_tokens was 8, now 9"
    ]


def command(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(["plan"]), ["plan", *arguments])


FIELDS = {
    "": ["plan_version", "config", "run", "is_refused", "refusals", "notes", "artifacts", "totals", "ways"],
    "artifacts": [
        "step",
        "iteration",
        "datasets",
        "path",
        "verdict",
        "reason",
        "because",
        "inputs",
        "differences",
        "trained_again",
        "seconds",
        "bytes",
        "measured_in",
    ],
    "totals": ["artifacts", "seconds", "bytes", "unknown"],
    "ways": ["command", "does", "artifacts", "seconds", "bytes", "unknown"],
}
"""The fields of the document. A change of them is a change for every program that reads it."""


def test_the_document_has_the_fields_that_the_page_names(config: Path, run: RunDir) -> None:
    answered = command(str(config), "--run", str(run.root), "--set", "normalize.eps=0.5", "--json")
    assert answered.exit_code == 1
    found = json.loads(answered.stdout)
    assert list(found) == FIELDS[""]
    assert found["plan_version"] == 1
    assert [list(item) for item in found["artifacts"]] == [FIELDS["artifacts"]] * len(found["artifacts"])
    assert list(found["totals"]) == ["reuse", "compute", "refuse"]
    assert {tuple(total) for total in found["totals"].values()} == {tuple(FIELDS["totals"])}
    assert {tuple(way) for way in found["ways"]} == {tuple(FIELDS["ways"])}
    odd = next(item for item in found["artifacts"] if item["step"] == "normalize")
    assert odd["differences"] == [{"part": "config", "name": "eps", "was": 0.0001, "now": 0.5}]
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()
    names: Sequence[str] = [name for fields in FIELDS.values() for name in fields]
    assert [name for name in [*names, *map(str.lower, Reason.__members__)] if f"`{name}`" not in page] == []


def test_the_command_prints_lines_and_totals(config: Path, run: RunDir) -> None:
    drop(run, 1, "optimizer")
    answered = command(str(config), "--run", str(run.root))
    assert answered.exit_code == 0, answered.output
    assert "compute: 1 artifacts, about" in answered.stdout
    assert "the stored batches of iterations 1 to 1 are trained on again" in answered.stdout


def test_the_command_says_what_refuses_and_what_is_cheaper(config: Path, run: RunDir) -> None:
    answered = command(str(config), "--run", str(run.root), "--set", "update.learning_rate=0.5")
    assert answered.exit_code == 1
    assert "the run would be refused:" in answered.stdout
    fork = f"instead: grpo fork {run.name} {config} --at 0 --set update.learning_rate=0.5"
    assert fork in answered.stdout.splitlines()
    assert "grpo rescore" not in answered.stdout


def test_a_document_without_refusal_offers_nothing(config: Path, run: RunDir) -> None:
    found = document(planned(load_config(config), run))
    assert (found["is_refused"], found["refusals"], found["ways"]) == (False, [], [])
