"""A small finished run without an inference engine: answers are scripted, everything else is real."""

from contextlib import closing
from pathlib import Path

from flows.session import Session
from pipeline.chain import CHAIN, When
from pipeline.run_dir import RunDir
from stages.config import load_config
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from stages.inspect.metrics import append_metrics, iteration_metrics
from tests.policies import EOS

CONFIG = """
iterations = {iterations}
[policy]
model = "{policy}"
[prompts]
source = "{source}"
prompts_per_iteration = 2
[generate]
group_size = 2
max_tokens = 8
[[score.rewards]]
name = "exact"
function = "{function}"
[update]
num_threads = 1
[evaluate]
every = 0
held_out_share = 0.0
"""
DIGIT_0 = 19


EXACT = "stages.rewards.answers.matching:exact_match"


def perform_iteration(session: Session, iteration: int) -> None:
    """Perform every stage of an iteration but its evaluation."""
    for step in CHAIN:
        if step.when is not When.evaluation and session.config.executes(step.name, iteration):
            session.perform(step.name, iteration)


def make_small_run(folder: Path, policy: Path, iterations: int = 1, function: str = EXACT) -> Path:
    """Return a run of two groups an iteration: one has one right answer of two, the other has none.

    The first member of the first group answers 2, which is right; all others answer 3.
    """
    source = folder / "rows.jsonl"
    source.write_text('{"question": "1 + 1 =", "answer": "2"}\n{"question": "[red]0 + 2 =", "answer": "2"}\n')
    text = CONFIG.format(policy=policy, source=source, iterations=iterations, function=function)
    (folder / "config.toml").write_text(text)
    config = load_config(folder / "config.toml")
    run_dir = RunDir(folder / "runs" / "small")
    run_dir.record_config("", config.model_dump(mode="json"))
    calls = 0

    def answer(request: Request) -> list[int]:
        nonlocal calls
        calls += 1
        return [DIGIT_0 + (2 if calls % 4 == 1 else 3), EOS]

    with closing(Session(config, run_dir, _engine=ScriptedEngine(answer))) as session:
        session.initial_policy()
        for iteration in range(iterations):
            perform_iteration(session, iteration)
            append_metrics(run_dir, iteration_metrics(run_dir, iteration, pass_threshold=1.0))
    return run_dir.root
