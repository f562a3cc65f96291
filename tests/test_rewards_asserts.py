"""The reward of a program by Python asserts: what passes, whose fault a failure is, and what cannot be forged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.code.code import HARNESS, _steps, code


def verdicts(program: str, test_code: str, **arguments: Any) -> list[str]:
    """Return the verdict of each assert."""
    score = code(program, test_code=test_code, **arguments)
    return [verdict["verdict"] for verdict in score.detail["verdicts"]]


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


@pytest.mark.parametrize(
    "test_code",
    [
        "from solution import f\n\ndef test_a():\n    assert f(3) == 6\n",
        "from solution import f as g\nassert g(3) == 6",
        "import solution\nassert solution.f(3) == 6",
        "from solution import *\nassert f(3) == 6",
        ["assert f(3) == 6", "assert f(0) == 0"],
        ["from solution import f\n", "assert f(3) == 6\n"],
    ],
)
def test_the_tests_of_public_data_find_the_program(test_code: str | list[str]) -> None:
    assert code("def f(x): return 2 * x", test_code=test_code).reward == 1.0


def test_what_the_asserts_need_comes_first() -> None:
    setup, asserts = "import math\nroot = math.isqrt(49)", ["assert f(root) == 14", "assert math.pi > f(1)"]
    assert code("def f(x): return 2 * x", test_code=asserts, test_setup_code=setup).reward == 1.0


def test_the_module_that_is_the_program_may_have_another_name() -> None:
    asserts = "from main import f\nassert f(3) == 6"
    assert code("def f(x): return 2 * x", test_code=asserts, solution_module="main").reward == 1.0
    with pytest.raises(RewardError, match="No module named 'main'"):
        code("def f(x): return 2 * x", test_code=asserts)


@pytest.mark.parametrize(
    ("test_code", "message"),
    [
        ("import no_such_module\nassert f(3) == 6", "No module named 'no_such_module'"),
        ("assert f(3) == 6\nimport no_such_module", "No module named"),
        ("def test_a():\n    assert f(3) == 6\n    import no_such_module", "No module named"),
        ("import json\ndata = json.loads('{')\nassert f(3) == 6", "JSONDecodeError"),
        ("def test_a():\n    assert int('x') == f(3)", "ValueError: invalid literal"),
        ("assert f(3) == 6\nassert 1 == 2", "AssertionError"),
        ("def test_a(value):\n    assert f(value) == 6", "missing 1 required positional argument"),
        ("x = [1]\nassert f(3) == 6\nassert x[3] == 1", "IndexError"),
        ("import sys\nsys.exit(3)\nassert f(3) == 6", "SystemExit: 3"),
    ],
)
def test_a_test_that_fails_by_itself_is_an_error_and_no_zero(test_code: str, message: str) -> None:
    with pytest.raises(RewardError, match=rf"test_code fails by itself.*{message}"):
        code("def f(x): return 2 * x", test_code=test_code)


FILLED_DISK = """
try:
    with open("big", "wb", buffering=0) as file:
        while True: file.write(bytes(4096))
except OSError: pass
def f(x): return 7
"""
FAKE_ARRAY = """
class ndarray:
    __module__ = "numpy"
    shape = (1,)
    dtype = type("dtype", (), {"kind": "i", "str": "i8"})
    def ravel(self): return self
    def tolist(self): return [6]
def f(x): return ndarray()
"""


@pytest.mark.parametrize(
    ("program", "test_code"),
    [
        ("def f(x): pass", "assert f(3)[0] == 6"),  # a wrong type is a wrong answer
        ("def f(x): pass", "x = f(3)\ny = x[0]\nassert y == 6"),
        ("def f(x): x.clear()", "x = [1]\nf(x)\nassert x[0] == 1"),
        ("def g(x): pass", "assert f(3) == 6"),
        ("def g(x): pass", "from solution import f\nassert f(3) == 6"),
        ("def f(x): pass", "from solution import f\nassert f(3) == 6"),
        ("import no_such_module", "assert f(3) == 6"),
        ("def f(x): import no_such_module", "assert f(3) == 6"),
        ("def f(x): import solution", "assert f(3) == 6"),
        ("def f(x): return []", "def first(x):\n    return f(x)[0]\nassert first(3) == 6"),
        (FILLED_DISK, "with open('x', 'w') as file:\n    file.write('x' * 100000)\nassert f(3) == 6"),
        (FAKE_ARRAY, "assert f(3) == 7"),
        ("f = 5", "def check(candidate):\n    assert candidate + '1' == 6"),
    ],
)
def test_a_failure_that_the_program_may_have_caused_is_a_zero(program: str, test_code: str) -> None:
    assert code(program, test_code=test_code, entry_point="f" if "check" in test_code else None).reward == 0.0


def test_functions_named_test_are_tests() -> None:
    asserts = "def test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(1) == 2"
    assert verdicts("def f(x): return x", asserts) == ["passed", "failed"]


def test_a_failed_preparation_fails_what_follows() -> None:
    assert verdicts("def f(x): return 1 / x", "assert f(1) == 1\nx = f(0)\nassert f(1) == 1") == ["passed", "not run"]


def test_an_endless_call_loses_what_follows_and_keeps_what_was_passed() -> None:
    program = "def f(x):\n    while x: pass\n    return 1"
    found = verdicts(program, "assert f(0) == 1\nassert f(1) == 1\nassert f(0) == 1", seconds=1.0)
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


# --- numpy's values, which need an interpreter that has numpy: the harness by itself


def harness_verdicts(program: str, test_code: str, place: Path) -> list[str]:
    """Return the verdicts of the harness, without a sandbox around it."""
    harness = place / "harness.py"
    harness.write_text(HARNESS.read_text(encoding="utf-8"), encoding="utf-8")
    job = {"program": program, "steps": _steps(test_code, None), "entry_point": None, "solution_module": "solution"}
    done = subprocess.run([sys.executable, harness], input=json.dumps(job), capture_output=True, text=True, check=True)
    return [json.loads(line)["verdict"] for line in done.stdout.splitlines()]


def test_arrays_and_their_numbers_cross_as_data(tmp_path: Path) -> None:
    program = """
import numpy as np
def whole(): return np.int64(6)
def truth(): return np.bool_(True)
def single(): return np.float32(0.5)
def array(): return np.array([[1, 2], [3, 4]])
def empty(): return np.zeros((0, 3))
def texts(): return np.array(["a", "bc"])
def double(x): return 2 * x
def sort(x): x.sort()
def structured(): return np.zeros(1, dtype=[("a", "i4")])
"""
    asserts = """
import numpy as np
assert whole() == 6 and type(whole()) is int
assert truth() is True
assert single() == 0.5
assert (array() == np.array([[1, 2], [3, 4]])).all() and array().dtype == np.int64
assert empty().shape == (0, 3)
assert texts().tolist() == ["a", "bc"]
assert np.allclose(double(np.array([0.5, 1.5])), [1.0, 3.0])
x = np.array([3, 1, 2])
sort(x)
assert x.tolist() == [1, 2, 3]
assert whole() == 7
assert (array() == 1).all()
assert np.asarray(structured()).size == 1
"""
    verdicts = harness_verdicts(program, asserts, tmp_path)
    assert verdicts == ["passed"] * 8 + ["failed"] * 2 + ["passed"]


def test_what_numpy_asks_of_an_object_does_not_reach_the_program(tmp_path: Path) -> None:
    program = """
class Claims:
    def __getattr__(self, name):
        if name == "__array_interface__":
            return {"shape": (1,), "typestr": "<i8", "data": (4096, True), "version": 3}
        raise AttributeError(name)
def f(): return Claims()
"""
    asserts = "import numpy as np\nassert np.array(f()).dtype == object\nassert (np.array(f()) == 5).all()"
    assert harness_verdicts(program, asserts, tmp_path) == ["passed", "failed"]
