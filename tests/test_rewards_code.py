"""The reward of a program: what counts as the program, and what counts as passed."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.base import Score
from stages.rewards.code.code import code, code_identity, extract_program

CASES = json.loads((Path(__file__).parent / "reward_cases" / "code.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_hand_worked(case: dict[str, Any]) -> None:
    given = {**case["row"], **case["arguments"]}
    if case["error"] is not None:
        with pytest.raises(RewardError, match=case["error"]):
            code(**given)
        return
    score = code(**given)
    assert score.reward == pytest.approx(case["reward"], abs=1e-6)
    if case["detail"] is not None:
        assert json.loads(json.dumps(score.detail)) == case["detail"]


# --- what is the program


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("print(1)", "print(1)"),
        ("", ""),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```\na\n```\ntext\n```bash\nb\n```", "a\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```Python title=x\na\n```", "a\n"),
        ("````python\n```\na\n````", "```\na\n"),
        ("~~~py\na\n~~~", "a\n"),
        ("```python\na\nb", "a\nb\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("use `python` and ```inline``` so", "use `python` and ```inline``` so"),
        ("```python\n```", "\n"),
        ("<think>\n```python\na\n</think>\n```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n</think>\n```\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\n```\nb\n```", "b\n"),
        ("<think>\n```python\na\n</think>\nAs above.", "a\n"),
        ("Let me see.</think>\nprint(1)", "\nprint(1)"),
        ("```python\nprint('</think>')\n```", "print('</think>')\n"),
        ("<think>\n```python\na\n</think>\nSo:\n\n```py\nb\n", "b\n"),
        ("<think>\n```\na\n</think>\n```\nb\n```", "b\n"),
        ("```python\na\n~~~py\nb\n```", "a\n~~~py\nb\n"),
        ("````md\n```python\na\n```\n````\n```python\nb\n```", "b\n"),
    ],
)
def test_the_program_is_the_last_block_of_its_language(completion: str, program: str) -> None:
    assert extract_program(completion, "python") == program


def test_another_language_is_run_by_its_command() -> None:
    completion = "```python\nprint(1)\n```\n```bash\nread x; echo $((x + 1))\n```\n"
    tests = [{"input": "41\n", "output": "42\n"}]
    assert code(completion, tests, language="bash", command=["bash", "program"]).reward == 1.0


# --- inputs and outputs


def test_tests_may_be_json_text() -> None:
    assert code("print(input())", '[{"input": "a", "output": "a"}]').reward == 1.0


def test_a_program_does_not_find_the_tests_or_the_answers_of_other_runs() -> None:
    program = "import os\nprint(sorted(os.listdir('.')), sorted(os.listdir('/tmp')))\nopen('/tmp/left', 'w')"
    tests = [{"input": "secret", "output": "['program'] ['program']"}] * 2
    assert code(program, tests).reward == 1.0


def test_no_time_is_left_for_the_later_tests() -> None:
    program = "if input() == 'stay':\n    while True: pass\nprint(1)"
    tests = [{"input": "go\n", "output": "1"}, {"input": "stay", "output": "1"}, {"input": "go\n", "output": "1"}]
    score = code(program, tests, total_seconds=1.0)
    assert score.reward == pytest.approx(1 / 3)
    assert [verdict["verdict"] for verdict in score.detail["verdicts"]] == ["passed", "timeout", "not run"]


def test_the_detail_stays_small_whatever_the_program_prints() -> None:
    program = "head -c 100000 /dev/zero | tr '\\0' x\nhead -c 100000 /dev/zero | tr '\\0' y >&2"
    tests = [{"input": "", "output": "z" * 100000}] * 51
    score = code(program, tests, language="sh", command=["sh", "program"])
    assert score.detail["tests"] == 51
    assert len(score.detail["verdicts"]) == 50
    assert score.detail["verdicts"][0]["output"] == "x" * 200 + "..."
    assert len(json.dumps(score.detail)) < 50_000


def test_too_much_output_is_no_pass() -> None:
    score = code("print(1)\nwhile True: print()", [{"input": "", "output": "1"}], output_kb=1)
    assert (score.reward, score.detail["verdicts"][0]["text"]) == (0.0, "too much output")


def test_a_program_larger_than_what_it_may_write_is_a_wrong_program() -> None:
    program = f"print(1)\n# {'x' * (1 << 20)}"
    score = code(program, [{"input": "", "output": "1"}] * 2, disk_mb=1)
    assert score.reward == 0.0
    assert score.detail["verdicts"] == [{"verdict": "not run", "text": "the program is larger than 1 MB (disk_mb)"}] * 2
    assert code(program, [{"input": "", "output": "1"}], disk_mb=2).reward == 1.0


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]},
        {"input": ["1", "2"], "output": ["2", "4"]},
        '{"inputs": ["1", "2"], "outputs": ["2", "4"]}',
        [{"input": "1", "output": "2", "testtype": "stdin"}, {"input": "2", "output": "4", "testtype": "stdin"}],
    ],
)
def test_the_tests_may_have_the_forms_of_public_data(tests: Any) -> None:
    assert code("print(2 * int(input()))", tests).reward == 1.0
    assert code("print(2)", tests).reward == 0.5


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "best"}, "score is 'best'"),
        ({"language": "rust"}, "no command for rust"),
        ({"tests": [{"input": 1, "output": "1"}]}, "expected the texts input and output"),
        ({"tests": {"input": "1"}}, "as many inputs as outputs"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "as many inputs as outputs"),
        ({"tests": {"inputs": [[1]], "outputs": [[2]]}}, "expected the texts input and output"),
        ({"tests": {"inputs": ["1"], "outputs": ["2"], "fn_name": "f"}}, "calls the function 'f'"),
        ({"tests": [{"input": "1", "output": "2", "testtype": "functional"}]}, "of the type 'functional'"),
        ({"tests": "no JSON"}, "is no JSON"),
        ({"tests": None, "test_code": [1]}, "expected a text or a list of texts"),
        ({"test_code": "assert 1"}, "found both"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        code("print(1)", **{"tests": [{"input": "", "output": "1"}], **arguments})


def test_the_identity_holds_the_arguments_and_what_carries_out_the_tests() -> None:
    identity = code_identity(seconds=2.0)
    assert set(identity) == {"seconds", "python", "files"}
    assert identity == code_identity(seconds=2.0)
    assert isinstance(code("print(1)", [{"input": "", "output": "1"}]), Score)
