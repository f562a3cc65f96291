"""Finished runs with scripted answers, and ways to forge copies of them."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from flows.session import Session
from pipeline.conformance import conform
from pipeline.run_dir import RunDir
from stages.config import load_config
from stages.engines.base import Engine, Request
from stages.engines.scripted import ScriptedEngine
from stages.inspect.metrics import append_metrics, iteration_metrics
from stages.inspect.verify.ledger import Problem
from stages.inspect.verify.verify import verify_run
from stages.wiring import outside_members
from tests.manifests import fix_chain, fix_hashes, manifest_of
from tests.policies import EOS
from tests.small_run import perform_iteration

CONFIG = """
iterations = 2
[policy]
model = "{policy}"
[prompts]
source = "{source}"
prompts_per_iteration = 4
[generate]
group_size = 4
max_tokens = 8
groups_per_part = 2
{generate}
[[score.rewards]]
name = "exact"
function = "stages.rewards.answers.matching:exact_match"
[update]
num_threads = 1
learning_rate = {learning_rate}
{update}
[evaluate]
every = 2
num_prompts = 2
num_samples = 2
held_out_share = 0.3
"""
DIGIT_0 = 19
BLANK = 3

AUDITED = """
iterations = 4
[policy]
model = "{policy}"
[prompts]
source = "{source}"
prompts_per_iteration = 6
[generate]
max_tokens = 8
[[generate.members]]
name = "current"
count = 4
[[generate.members]]
name = "older"
policy = "age:1"
count = 2
[[score.rewards]]
name = "exact"
function = "stages.rewards.answers.matching:exact_match"
[[score.rewards]]
name = "brevity"
function = "stages.rewards.answers.format:soft_overlong"
arguments = {{ max_tokens = 7, buffer_tokens = 4 }}
[score]
max_failed_share = 0.5
[normalize]
scale = "group_std"
weights = {{ brevity = 0.5 }}
[batch]
optimizer_steps = 2
drop_truncated = true
[update]
num_threads = 1
learning_rate = 3e-2
[evaluate]
every = 2
num_prompts = 5
num_samples = 2
held_out_share = 0.3
"""


def answer(request: Request) -> list[int]:
    """Answer 2 or 3, as the seed says."""
    return [DIGIT_0 + 2 + request.seed % 2, EOS]


def finished_run(
    folder: Path,
    policy: Path,
    *,
    name: str = "run",
    learning_rate: float = 1e-3,
    generate: str = "",
    update: str = "",
    engine: Engine | None = None,
) -> RunDir:
    """Make a run of two iterations: 4 groups of 4 answers each, evaluated at both ends.

    ``generate`` and ``update`` hold more lines of the tables of that name; without an engine the answers are scripted.
    """
    rows = [{"question": f"{i} + {2 - i} =", "answer": "2"} for i in range(20)]
    source = _write_source(folder, rows)
    text = CONFIG.format(policy=policy, source=source, learning_rate=learning_rate, generate=generate, update=update)
    return _run(folder, text, name, engine or ScriptedEngine(answer))


def varied_answer(request: Request) -> list[int]:
    """Answer 2 where the question has a 9; else, as the seed says, 2, 3, 2 with blanks, or 2s without an end."""
    two = DIGIT_0 + 2
    if DIGIT_0 + 9 in request.prompt_token_ids:
        return [two, EOS]
    return [[two, EOS], [DIGIT_0 + 3, EOS], [two, *[BLANK] * 4, EOS], [two] * 9][request.seed % 4]


def audited_run(folder: Path, policy: Path, *, name: str = "demo") -> RunDir:
    """Make a run in which an auditor's questions have answers: 4 iterations of 6 groups of 6, evaluated 3 times.

    Two policies write each group, two rewards score it. Each of 12 questions is asked twice; two of them, and one of
    the 5 held-out ones, have no reference answer and cannot be scored; two are always answered right. Some answers are
    cut, and two optimizer steps clip. The path of the source is part of every prompt's identity: stand in one folder
    and give a relative path to get the same prompts in every folder.
    """
    rows = [{"question": f"{i} + {2 - i} =", "answer": None if i in (3, 4, 7) else "2"} for i in range(17)]
    text = AUDITED.format(policy=policy, source=_write_source(folder, rows))
    return _run(folder, text, name, ScriptedEngine(varied_answer))


def _write_source(folder: Path, rows: list[dict[str, Any]]) -> Path:
    source = folder / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    return source


def _run(folder: Path, text: str, name: str, engine: Engine) -> RunDir:
    """Run all stages of all iterations of a config, with the evaluations that it asks for."""
    (folder / f"{name}.toml").write_text(text)
    config = load_config(folder / f"{name}.toml")
    run = RunDir(folder / "runs" / name)
    run.record_config(text, config.model_dump(mode="json"))
    with closing(Session(config, run, _engine=engine)) as session:
        session.initial_policy()
        for member in outside_members(config):
            session.member_policy(member.name)
        session.held_out_prompts()
        session.perform("evaluate", -1)
        for k in range(config.iterations):
            perform_iteration(session, k)
            if (k + 1) % config.evaluate.every == 0:
                session.perform("evaluate", k)
            append_metrics(run, iteration_metrics(run, k, pass_threshold=1.0))
    return run


def forge(run: RunDir, place: Path, change: Callable[[pl.DataFrame], pl.DataFrame], *, part: int = 0) -> None:
    """Change the rows of a part, then make every hash of the run fit."""
    path = place / f"part-{part:05d}.parquet"
    pq.write_table(conform(change(pl.read_parquet(path)), manifest_of(place)["dataset"]), path)
    order = [artifact.path for artifact in run.artifacts()]
    fix_hashes(place)
    fix_chain(order)


def replace_value(column: str, row: int, value: Any) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Return a change of one value."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        values = frame[column].to_list()
        values[row] = value(values[row]) if callable(value) else value
        return frame.with_columns(pl.Series(column, values, dtype=frame[column].dtype))

    return change


def problems_of(run: RunDir, check: str) -> list[Problem]:
    """Return what one check of the audit finds."""
    return [p for p in verify_run(run).problems if p.check == check]
