"""A small run with checks: eight answers of 1 to 4 tokens an iteration, half of them 3."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from flows.reporter import SilentReporter
from flows.session import Session
from pipeline.run_dir import RunDir
from stages.config import RunConfig, check_unchanged, load_config
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from stages.inspect.metrics import append_metrics, iteration_metrics
from tests.policies import EOS
from tests.small_run import CONFIG, DIGIT_0, EXACT

STEPS = ("prompts", "generate", "score", "logprobs", "normalize", "check", "batch", "update", "optimizer")
BY_LENGTH, HALF_NULL = "tests.rewards:eighths", "tests.rewards:only_threes"
ANSWERED = '[[checks]]\ncheck = "judge_answered"\nseverity = "block"\n'
NOT_BY_LENGTH = """[[checks]]
name = "not paid by length"
check = "reward_length"
severity = "block"
thresholds = {data = {min_answers = 8}}
"""
LONG_ONES = '[[checks]]\nname = "long"\nwhere = "num_tokens > 4"\nseverity = "quarantine"\n'
PASSES = '[[checks]]\nname = "passes"\nwhere = "1 = 0"\n'
NEVER = '[[checks]]\nname = "never"\nwhere = "1 = 1"\nseverity = "block"\n'


class Notes(SilentReporter):
    """Keeps the lines that a user would see, and which checks have failed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: list[tuple[int, str]] = []

    def check(self, iteration: int, row: dict[str, Any]) -> None:
        self.failed.append((iteration, row["name"]))

    def note(self, text: str) -> None:
        self.lines.append(text)


class Place:
    """A run of one folder: eight answers of 1 to 4 tokens an iteration, half of them 3."""

    def __init__(self, folder: Path, policy: Path, source: Path | None = None) -> None:
        self.folder, self.policy, self.source = folder, policy, source or folder / "rows.jsonl"
        self.run = RunDir(folder / "runs" / "small")
        self.notes = Notes()
        self.calls = 0

    def config(self, checks: str, function: str = EXACT, iterations: int = 1) -> RunConfig:
        self.source.write_text('{"question": "1 + 2 =", "answer": "3"}\n{"question": "[red]0 + 3 =", "answer": "3"}\n')
        text = CONFIG.format(policy=self.policy, source=self.source, iterations=iterations, function=function)
        text = text.replace("group_size = 2", "group_size = 4").replace(
            "[[score.rewards]]", "[score]\nmax_failed_share = 1.0\n[[score.rewards]]"
        )
        (self.folder / "config.toml").write_text(text + checks)
        return load_config(self.folder / "config.toml")

    def answer(self, request: Request) -> list[int]:
        self.calls += 1
        number = self.calls % 4
        return [*[DIGIT_0 + 3] * (number + 1), EOS] if self.calls % 8 < 4 or number else [DIGIT_0 + 2, EOS]

    def open(self, config: RunConfig) -> "closing[Session]":
        """Return a session that has not looked whether the run belongs to the config."""
        return closing(Session(config, self.run, self.notes, _engine=ScriptedEngine(self.answer)))

    @contextmanager
    def session(self, config: RunConfig) -> Iterator[Session]:
        """Open the run as the next start of the same command does."""
        check_unchanged(self.run, config)
        self.run.record_config("", config.model_dump(mode="json"))
        with self.open(config) as session:
            session.initial_policy()
            yield session

    def go(self, config: RunConfig, steps: tuple[str, ...] = STEPS, iterations: int = 1) -> None:
        with self.session(config) as session:
            for iteration in range(iterations):
                if session.is_done(iteration):
                    continue
                for step in steps:
                    if config.executes(step, iteration):
                        session.perform(step, iteration)
                if "update" in steps:
                    append_metrics(self.run, iteration_metrics(self.run, iteration, pass_threshold=1.0))

    def files(self, *datasets: str) -> dict[str, bytes]:
        return {name: (self.run.open(0, name).files()[0]).read_bytes() for name in datasets}
