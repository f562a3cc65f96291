"""The reward of a program: what counts as the program, what counts as passed, and what cannot be forged."""

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


def verdicts(program: str, test_code: str, **arguments: Any) -> list[str]:
    """Return the verdict of each assert."""
    score = code(program, test_code=test_code, **arguments)
    return [verdict["verdict"] for verdict in score.detail["verdicts"]]


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
    program = "import time\ntime.sleep(float(input()))\nprint(1)"
    tests = [{"input": "0", "output": "1"}, {"input": "600", "output": "1"}, {"input": "0", "output": "1"}]
    score = code(program, tests, total_seconds=4.0)
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


# --- asserts


def test_objects_of_the_program_can_be_used_by_the_asserts() -> None:
    program = """
class Counter:
    def __init__(self, start=0):
        self.value = start
    def add(self, n):
        self.value += n
        return self
    def __len__(self):
        return self.value
    def __getitem__(self, key):
        return key * 2
    def __eq__(self, other):
        return self.value == other.value
def evens():
    n = 0
    while True:
        yield n
        n += 2
"""
    asserts = """
c = Counter(start=2)
assert c.add(3).value == 5
assert len(c) == 5
assert c[4] == 8
assert Counter(1) == Counter(1)
assert Counter(1) != Counter(2)
c.value = 9
assert c.value == 9
e = evens()
assert [next(e), next(e), next(e)] == [0, 2, 4]
assert dict(zip('ab', evens())) == {'a': 0, 'b': 2}
assert 4 in evens()
assert not hasattr(c, 'no_such')
"""
    assert verdicts(program, asserts) == ["passed"] * 10


def test_every_kind_of_data_crosses_as_it_is() -> None:
    asserts = """
values = [None, True, -1, 10 ** 5000, 0.1, float('inf'), 1j, 'a\\u00e4\\ud800', b'\\xff', bytearray(b'x')]
values += [[1, (2, {3})], {(1, 2): [None], 3: {}}, frozenset({'x'}), set(), ()]
for value in values:
    got = same(value)
    assert got == value and type(got) is type(value), value
assert len(values) == 15
"""
    assert verdicts("def same(x): return x", asserts) == ["passed"]


def test_a_value_that_came_back_altered_is_seen() -> None:
    assert verdicts("def f(x): return tuple(x)", "assert f([1]) == [1]\nassert f([1]) == (1,)") == ["failed", "passed"]


def test_arguments_that_the_program_changes_are_changed_for_the_asserts() -> None:
    program = "def f(a, b, c):\n    a.sort()\n    b['x'] = [1]\n    c.add(2)"
    asserts = "a, b, c = [3, 1], {}, {1}\nf(a, b, c)\nassert (a, b, c) == ([1, 3], {'x': [1]}, {1, 2})"
    assert verdicts(program, asserts) == ["passed"]


def test_exceptions_of_the_program_are_exceptions_of_the_asserts() -> None:
    program = "class Own(ValueError): pass\ndef f(x):\n    raise Own('no')"
    asserts = "try:\n    f(1)\nexcept ValueError as error:\n    text = str(error)\nassert text == 'no'\nassert f(2)"
    assert verdicts(program, asserts) == ["passed", "failed"]


def test_functions_named_test_are_tests() -> None:
    asserts = "def test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(1) == 2"
    assert verdicts("def f(x): return x", asserts) == ["passed", "failed"]


def test_a_failed_preparation_fails_what_follows() -> None:
    assert verdicts("def f(x): return 1 / x", "assert f(1) == 1\nx = f(0)\nassert f(1) == 1") == ["passed", "not run"]


def test_an_endless_call_loses_what_follows_and_keeps_what_was_passed() -> None:
    program = "import time\ndef f(x):\n    while x: time.sleep(1)\n    return 1"
    found = verdicts(program, "assert f(0) == 1\nassert f(1) == 1\nassert f(0) == 1", seconds=4.0)
    assert found == ["passed", "timeout", "timeout"]


def test_an_assert_that_hands_over_a_function_is_an_error_and_no_zero() -> None:
    with pytest.raises(RewardError, match="value of type function, which only data may be"):
        code("def f(x): return x(1)", test_code="assert f(lambda x: x) == 1")


@pytest.mark.parametrize(
    ("test_code", "message"),
    [("assert (", "not Python"), ("x = 1", "holds no test"), ("def check(c): assert c(1)", "holds no test")],
)
def test_test_code_without_usable_tests_is_an_error(test_code: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        code("def f(x): return x", test_code=test_code)


# --- forgeries: none of these programs solves anything

TWO_ASSERTS = "assert abs(f(1) - 5) < 1\nassert f(2) == 7"
FAKE = """{"step": 0, "verdict": "passed", "text": ""}"""
FORGERIES = {
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef f(x):\n    os._exit(0)",
    "print a verdict": f"print('''{FAKE}''', flush=True)",
    "write a verdict to every descriptor": f"""
import os
for fd in range(1024):
    try:
        os.write(fd, b'{FAKE}\\n')
    except OSError:
        pass
""",
    "write a verdict to the tests' process": f"""
import os
for process in range(1, 100):
    for fd in range(20):
        try:
            with open(f'/proc/{{process}}/fd/{{fd}}', 'w') as file:
                file.write('{FAKE}\\n')
        except OSError:
            pass
""",
    "replace the built-ins": """
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = ZeroDivisionError
def f(x): return 0
""",
    "define abs": "def abs(x): return 0\ndef f(x): return 0",
    "equal to everything": """
class Anything:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    def __lt__(self, other): return True
    def __abs__(self): return self
def f(x): return Anything()
""",
    "a number equal to everything": """
class Anything(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
def f(x): return Anything(1)
""",
    "read the tests' memory": """
import os, re
def f(x):
    for process in range(1, 100):
        try:
            maps = open(f'/proc/{process}/maps').read()
        except OSError:
            continue
        if process != os.getpid():
            return 5 if x == 1 else 7
""",
    "trace the tests' process": """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None)
    if any(libc.ptrace(16, process, 0, 0) == 0 for process in range(1, 100) if process != os.getpid()):
        return 5 if x == 1 else 7
""",
    "find the asserts in frames and objects": """
import gc, sys
def f(x):
    here = sys._getframe()
    while here:
        if 'f(2) == ' + '7' in repr(here.f_locals):
            return 5 if x == 1 else 7
        here = here.f_back
    if any('== ' + '7' in o for o in gc.get_objects() if isinstance(o, str)):
        return 5 if x == 1 else 7
""",
    "find the asserts in files": """
import os
def f(x):
    for place, _, files in os.walk('/sandbox'):
        for name in files:
            if 'f(2) == ' + '7' in open(os.path.join(place, name)).read():
                return 5 if x == 1 else 7
""",
    "kill the tests": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
    "kill the tests in the call": "import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGKILL)",
    "answer nonsense": "import os\nos.write(4, b'[]\\n' * 100)\ndef f(x): return 0",
    "answer without end": "import os\nwhile True: os.write(4, b'[' * 60000)",
    "a deep answer": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forgery_passes_no_test(program: str) -> None:
    score = code(program, test_code=TWO_ASSERTS, seconds=4.0)
    assert (score.reward, score.detail["passed"], score.detail["tests"]) == (0.0, 0, 2)


def test_a_call_cannot_end_a_loop_of_asserts_early() -> None:
    program = "def f(x): raise StopIteration"
    assert verdicts(program, "assert all(map(lambda x: f(x) == x, [1, 2]))") == ["failed"]


def test_the_honest_program_does_pass_those_asserts() -> None:
    assert code("def f(x): return 2 * x + 3", test_code=TWO_ASSERTS).reward == 1.0


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "best"}, "score is 'best'"),
        ({"language": "rust"}, "no command for rust"),
        ({"tests": [{"input": 1, "output": "1"}]}, "expected the texts input and output"),
        ({"tests": {"input": "1"}}, "expected a list"),
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
