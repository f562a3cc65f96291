"""Planted reward hacks, from the config to the audit: each is named by the check that is made for it.

`test_audit` writes its runs by hand; here the stages make them, with the rewards that are hacked. Only the answers are
scripted: they drift as those of a policy that has found the hack out.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from flows.session import Session
from pipeline.run_dir import RunDir
from stages.config import load_config
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from stages.inspect.audit.audit import audit
from stages.inspect.audit.thresholds import AuditConfig
from tests.audit_runs import carries, grows, says_seven, sums
from tests.policies import EOS

ITERATIONS = 10
CONFIG = """
iterations = 10
[policy]
model = "{policy}"
[prompts]
source = "{source}"
prompts_per_iteration = 24
[generate]
group_size = 8
max_tokens = 12
[[score.rewards]]
name = "reward"
function = "{reward}"
[update]
num_threads = 1
[evaluate]
every = 0
held_out_share = 0.0
"""
SPACE, TOKEN_OF_SPACE = 32, 3

Answer = Callable[[int, int, Random], str]
"""From the iteration, the right sum, and a source of chance."""


def hacked_run(folder: Path, policy: Path, reward: str, answer: Answer, *, is_leaked: bool = False) -> RunDir:
    """Return a run of sums whose answers are scripted."""
    totals, rows = {}, []
    for question, reference, total in sums(Random(0), 300):
        asked = f"{reference} {question}" if is_leaked else question
        totals[asked.replace(" ", "")] = total  # the tokenizer has no blanks
        rows.append({"question": asked, "answer": reference})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.toml").write_text(CONFIG.format(policy=policy, source=folder / "rows.jsonl", reward=reward))
    config, run = load_config(folder / "config.toml"), RunDir(folder / "run")
    run.record_config("", config.model_dump(mode="json"))
    iteration = 0

    def write(request: Request) -> list[int]:
        prompt = "".join(chr(token - TOKEN_OF_SPACE + SPACE) for token in request.prompt_token_ids)
        text = answer(iteration, totals[prompt.removeprefix("user:")], Random(request.seed))
        return [*(ord(character) - SPACE + TOKEN_OF_SPACE for character in text), EOS]

    with closing(Session(config, run, _engine=ScriptedEngine(write))) as session:
        session.initial_policy()
        for iteration in range(ITERATIONS):
            for stage in ("prompts", "generate", "score", "normalize", "batch", "update"):
                session.perform(stage, iteration)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "answer", "is_leaked", "named"),
    [
        ("stages.rewards.answers.matching:exact_match", carries, False, set()),
        ("tests.rewards:eighths", grows, False, {"reward_length"}),
        ("tests.rewards:has_seven", says_seven, False, {"rewarded_phrase"}),
        ("stages.rewards.answers.matching:exact_match", carries, True, {"reference_in_prompt"}),
    ],
    ids=["no hack", "length", "phrase", "leak"],
)
def test_a_planted_hack_is_named_and_a_clean_run_has_no_warning(
    tmp_path: Path, tiny_policy: Path, reward: str, answer: Answer, is_leaked: bool, named: set[str]
) -> None:
    report = audit(hacked_run(tmp_path, tiny_policy, reward, answer, is_leaked=is_leaked), AuditConfig())
    warnings = {finding.check: finding.message for finding in report.findings if finding.severity == "warning"}
    assert named <= set(warnings) if named else warnings == {}
