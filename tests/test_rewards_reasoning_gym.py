"""The verifiers of reasoning-gym: an answer, or a row, that is a program is run by nobody but the sandbox."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.answers import reasoning_gym as rewards
from stages.rewards.answers.reasoning_gym import verify
from stages.rewards.answers.reasoning_gym_tasks import READ_TASKS, READ_VERSION, import_reasoning_gym, score
from stages.rewards.code.sandbox import PROJECT
from stages.rewards.functions import RewardConfig, find_reward

EVALUATED = {  # answers and rows that are right or half right, with the package's own score of them
    "countdown": [("1 + 2", {"numbers": [1, 2], "target": 3}, 1.0), ("3", {"numbers": [1, 2], "target": 3}, 0.05)],
    "puzzle24": [("4*(1 + 2 + 3)", {}, 1.0), ("1 + 2 + 3 + 4", {}, 0.01)],
    "simple_integration": [("x**2/2 + C", {"variable": "x", "integrand": "x"}, 1.0)],
    "intermediate_integration": [("sin(x) + C", {"variable": "x", "integrand": "cos(x)"}, 1.0)],
    "polynomial_multiplication": [("1 + x", {}, 1.0), ("x", {}, 0.0)],
    "binary_matrix": [("[[0, 1], [1, 0]]", {}, 0.1)],
    "spiral_matrix": [("[1, 2]", {}, 0.1)],
    "string_insertion": [("['A', 'B']", {}, 0.1)],
    "n_queens": [("[['Q', '_'], ['_', 'Q']]", {"valid_answers": ["Q _\n_ Q"]}, 0.5)],
    "bitwise_arithmetic": [("0x3", {"problem": "(0x1 + 0x2)"}, 1.0)],
    "number_sorting": [('["1", "2"]', {"direction": "ascending"}, 1.0)],
}
ANSWERS = {
    "polynomial_multiplication": "x + 1",
    "binary_matrix": "0 1\n1 0",
    "spiral_matrix": "1 2",
    "string_insertion": "AB",
    "number_sorting": "['1', '2']",
}


def entry_of(task: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"question": "?", "answer": ANSWERS.get(task, ""), "metadata": {"source_dataset": task, **metadata}}


def payloads(place: Path) -> list[str]:
    """Return answers that write a file where they are evaluated, in the forms that the verifiers take."""
    write = f"__import__('pathlib').Path({str(place)!r}).touch()"
    return [write, f"[{write}]", f"[[{write}]]", f"1 + {write}", f"x + {write}", f"{{'a': {write}}}", f"({write})"]


@pytest.mark.parametrize("task", EVALUATED)
def test_a_task_that_evaluates_gives_its_score_from_inside_the_sandbox(task: str) -> None:
    assert task not in READ_TASKS
    for answer, metadata, expected in EVALUATED[task]:
        entry = entry_of(task, metadata)
        assert verify(answer, entry).reward == score(task, "{}", answer, entry) == expected


@pytest.mark.parametrize("task", EVALUATED)
def test_a_hostile_answer_or_row_reaches_no_interpreter_of_this_machine(task: str, tmp_path: Path) -> None:
    place = tmp_path / "written"
    tmp_path.chmod(0o777)
    metadata = EVALUATED[task][0][1]
    for answer in payloads(place):
        assert verify(answer, entry_of(task, metadata)).reward in (0.0, 0.01, 0.05)
    hostile = payloads(place)[0]
    row = entry_of(task, {key: hostile if isinstance(value, str) else value for key, value in metadata.items()})
    verify("1", {**row, "answer": hostile})
    assert not place.exists()


HOOKED = """
import json, sys
from pathlib import Path
from stages.rewards.answers.reasoning_gym_tasks import READ_TASKS, import_reasoning_gym, score
from tests.test_rewards_reasoning_gym import payloads
package = import_reasoning_gym()
names = ("compile", "exec", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
watched, found = False, []
def hook(event, arguments):
    if watched and event in names or watched and event == "open" and arguments[1] not in ("r", "rb", None):
        found.append(f"{task}: {event} {str(arguments)[:200]}")
sys.addaudithook(hook)
place = Path(sys.argv[1])
rows = 0
for task in sorted(READ_TASKS):
    entry = json.loads(json.dumps(package.create_dataset(task, seed=1, size=1)[0], default=str))
    score(task, "{}", str(entry["answer"]), entry)  # what is imported at the first call
    hostile = payloads(place)
    texts = {key: hostile[0] for key, value in entry["metadata"].items() if isinstance(value, str)}
    changed = {**entry["metadata"], **texts, "source_dataset": task}
    watched = True
    for answer in [*hostile, str(entry["answer"]), "1", "[1, 2]", "", '"' * 3, "A & B"]:
        for row in (entry, {**entry, "answer": hostile[0]}, {**entry, "metadata": changed}):
            rows += 1
            try:
                score(task, "{}", answer, row)
            except Exception:
                continue
    watched = False
task, watched, num_found = "n_queens", True, len(found)
score(task, "{}", "[]", {"metadata": {"valid_answers": []}})
watched = False
print(json.dumps({"tasks": len(READ_TASKS), "rows": rows, "found": found[:num_found], "seen": found[num_found:]}))
"""


def test_the_tasks_that_are_scored_here_evaluate_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOOKED, str(tmp_path / "written")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["tasks"], told["found"]) == (94, [])
    assert told["rows"] == 94 * 13 * 3
    assert [line[:16] for line in told["seen"]] == [
        "n_queens: compil",
        "n_queens: exec (",
    ]  # it would have been noticed
    assert list(tmp_path.iterdir()) == []


def test_every_task_of_the_package_is_one_that_was_read() -> None:
    assert version("reasoning-gym") == READ_VERSION
    assert {*READ_TASKS, *EVALUATED, "composite"} == set(import_reasoning_gym().factory.DATASETS)


def test_another_version_of_the_package_is_scored_in_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"answer": "12", "metadata": {"source_dataset": "chain_sum"}}
    monkeypatch.setattr(rewards, "_version", lambda: "0.1.99")
    monkeypatch.setattr(rewards, "score", None)  # calling it here would fail
    assert verify("12", entry).reward == 1.0


def test_the_rows_after_one_that_breaks_the_scorer_are_scored() -> None:
    with pytest.raises(RewardError, match=r"gave no score for this answer \(exit status 7\)"):
        verify("__import__('os')._exit(7)", entry_of("n_queens", {"valid_answers": []}))
    verify("__import__('os').kill(-1, 9)", entry_of("n_queens", {"valid_answers": []}))
    verify("__import__('os').kill(__import__('os').getppid(), 9)", entry_of("n_queens", {"valid_answers": []}))
    forged = "[__import__('os').write(1, b'{\"score\": 5}'), __import__('os')._exit(0)]"
    with pytest.raises(RewardError, match="no score from 0 to 1"):
        verify(forged, entry_of("n_queens", {"valid_answers": []}))
    assert verify("1 + 2", entry_of("countdown", EVALUATED["countdown"][0][1])).reward == 1.0


def test_where_there_is_no_sandbox_an_evaluating_task_is_refused_and_others_are_scored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rewards._sandbox.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RewardError, match="this machine does not allow the sandbox"):
        verify(payloads(tmp_path / "written")[0], entry_of("countdown", {}))
    assert verify("12", {"answer": "12", "metadata": {"source_dataset": "chain_sum"}}).reward == 1.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["answers.reasoning_gym:verify", "code.code:code"])
def test_a_row_cannot_choose_the_isolation(function: str) -> None:
    reward = find_reward(RewardConfig(name="r", function=f"stages.rewards.{function}"))
    assert not {"isolation", "readable"} & {*reward.parameters, *reward.metadata_keys()}
    chosen = find_reward(
        RewardConfig(name="r", function=f"stages.rewards.{function}", arguments={"isolation": "process"})
    )
    assert chosen.arguments == {"isolation": "process"}
