"""The reward of a program: it is run against tests in a sandbox.

The tests are metadata of the prompt, in one of two forms:

    tests       a list of {"input": ..., "output": ...}: the program gets the input on standard input and must print the
                output. Compared here, outside of the sandbox: the program can neither read nor forge the verdict.
    test_code   Python asserts that call the program's functions. They run in a process of their own beside the
                program, see `harness` and docs/sandbox.md.

A test that fails by itself is no wrong answer: the reward is null, with the error. Where the sandbox cannot be had,
every completion gets a null reward with the reason, never an unprotected run.
"""

import ast
import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline import clock
from pipeline.errors import RewardError
from stages.rewards.base import Score
from stages.rewards.code.sandbox import Isolation, Limits, Run, Sandbox, python

FLAGS = ("-s", "-P", "-B")
"""Of the default command: nothing of the user's, nothing imported from the working directory, no byte code written."""
EXCERPT_LENGTH = 200
MAX_TESTS_IN_DETAIL = 50
LANGUAGES = {"python": ("python", "py", "python3")}
END_OF_THOUGHTS = re.compile(r"</think>[ \t]*$", re.MULTILINE)
HARNESS = Path(__file__).with_name("harness.py")


def code(
    completion: str,
    tests: Any = None,
    test_code: str | Sequence[str] | None = None,
    test_setup_code: str | Sequence[str] | None = None,
    entry_point: str | None = None,
    solution_module: str = "solution",
    score: Literal["share", "all"] = "share",
    language: str = "python",
    command: Sequence[str] | None = None,
    seconds: float = 5.0,
    total_seconds: float = 30.0,
    memory_mb: int = 512,
    processes: int = 16,
    disk_mb: int = 16,
    output_kb: int = 1024,
    isolation: Isolation = "full",
    readable: Sequence[str] = (),
) -> Score:
    """Return the share of the tests that the program in the completion passes (or, "all": 1 when it passes each).

    The program is the last fenced block of the language, else the last one without a language, else the whole text;
    what follows ``</think>`` goes first.

    Args:
        completion: the answer.
        tests: from the metadata: inputs and outputs, as a list of {"input", "output"} or as {"inputs": [...],
            "outputs": [...]}; white space at the end of lines and text is not compared.
        test_code: from the metadata: Python asserts, for a Python program; a text or a list of texts.
        test_setup_code: from the metadata: Python that the asserts need.
        entry_point: from the metadata: the function that ``test_code``'s ``check(candidate)`` is called with.
        solution_module: the name under which ``test_code`` imports the program, if it does.
        score: "share" or "all", which ends at the first test that is not passed.
        language: of the fenced block.
        command: how the file ``program`` is run, for instance ["bash", "program"]; Python when left out.
        seconds: of work, see `pipeline.clock`, for one input, or for the whole of ``test_code``.
        total_seconds: of work for one completion; below the time limit that the worker has for a call.
        memory_mb: address space of each process.
        processes: processes and threads at one time.
        disk_mb: what the program can write, and how large it may be.
        output_kb: what the program can print.
        isolation: "full", or "process" to permit less where the machine allows no namespaces.
        readable: further absolute paths that the program may read.

    Raises:
        RewardError: when the tests are not usable, or the sandbox is not to be had.
    """
    if score not in ("share", "all"):
        raise RewardError(f'score is {score!r}: give "share" or "all"')
    if (tests is None) == (test_code is None):
        found = "neither" if tests is None else "both"
        raise RewardError(f"found {found} of tests and test_code in the metadata: expected one of them")
    if test_code is not None and (command is not None or language != "python"):
        raise RewardError("test_code is Python that calls the program's functions: leave out language and command")
    if command is None and language != "python":
        raise RewardError(f'no command for {language}: give one, for instance command = ["bash", "program"]')
    program = extract_program(completion, language)
    if test_code is None and len(program.encode(errors="replace")) > disk_mb << 20:
        verdict = {"verdict": "not run", "text": f"the program is larger than {disk_mb} MB (disk_mb)"}
        return _score([verdict] * len(_pairs(tests)), score)
    limits = Limits(seconds, memory_mb, processes, disk_mb, output_bytes=output_kb << 10)
    with Sandbox(limits, isolation, tuple(readable)) as sandbox:
        if test_code is not None:
            steps = _steps(_python("test_setup_code", test_setup_code) + _python("test_code", test_code), entry_point)
            job = {"program": program, "steps": steps, "entry_point": entry_point, "solution_module": solution_module}
            verdicts = _run_asserts(sandbox, job, total_seconds)
        else:
            run = list(command) if command is not None else [python(), *FLAGS, "program"]
            verdicts = _run_inputs(sandbox, run, program, _pairs(tests), total_seconds, score == "all")
    return _score(verdicts, score)


code.only_from_config = ("isolation", "readable")  # type: ignore[attr-defined]


def code_identity(**arguments: Any) -> dict[str, Any]:
    """Return what decides the reward: the arguments, the interpreter, and the files that carry out the tests."""
    folder = Path(__file__).parent
    names = ("code.py", "harness.py", "sandbox.py", "sandbox_init.py", "sandbox_root.py", "sandbox_kernel.py")
    files = [*(folder / name for name in names), Path(clock.__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {**arguments, "python": platform.python_version(), "files": digest}


def extract_program(completion: str, language: str) -> str:
    """Return the last fenced block of the language, else the last one that names none, else the whole text.

    What follows the thoughts (a line that ends in ``</think>``) goes first: they count where it has no block. A block
    that is not closed, as in an answer that was cut, counts to the end, or to the next fence that names a language.
    """
    *thoughts, answer = END_OF_THOUGHTS.split(completion)
    for text in (answer, "\n".join(thoughts)):
        blocks = _blocks(text)
        for wanted in (LANGUAGES.get(language, (language,)), ("",)):
            found = [lines for name, lines in blocks if name in wanted]
            if found:
                return "\n".join(found[-1]) + "\n"
    return answer


def _blocks(text: str) -> list[tuple[str, list[str]]]:
    """Return language and lines of each fenced block."""
    blocks: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)", line)
        is_fence = mark is not None and mark[1].startswith(fence)
        if mark and is_fence and (not fence or mark[2]):
            fence = mark[1]
            blocks.append((mark[2].lower(), []))
        elif fence and mark and is_fence and line.strip() == mark[1]:
            fence = ""
        elif fence:
            blocks[-1][1].append(line)
    return blocks


def _score(verdicts: list[dict[str, Any]], score: str) -> Score:
    passed = sum(verdict["verdict"] == "passed" for verdict in verdicts)
    share = passed / len(verdicts)
    detail = {"passed": passed, "tests": len(verdicts), "verdicts": verdicts[:MAX_TESTS_IN_DETAIL]}
    return Score(share if score == "share" else float(passed == len(verdicts)), detail)


def _pairs(tests: Any) -> list[tuple[str, str]]:
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise RewardError(f"tests is {tests[:80]!r}, which is no JSON ({error}): correct the metadata") from error
    if isinstance(tests, Mapping):
        tests = _rows_of(tests)
    if not isinstance(tests, list) or not tests:
        raise RewardError(f"tests is {str(tests)[:80]!r}: expected a list, not empty, of input and output")
    for test in tests:
        if not isinstance(test, Mapping) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
            raise RewardError(f"a test is {str(test)[:80]!r}: expected the texts input and output")
        if test.get("testtype", "stdin") != "stdin":
            raise RewardError(
                f"a test is of the type {test['testtype']!r}: expected standard input and output; write calls of a "
                "function as asserts, in test_code"
            )
    return [(test["input"], test["output"]) for test in tests]


def _rows_of(tests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tests of one list of inputs and one of outputs."""
    given, expected = (tests.get(key, tests.get(f"{key}s")) for key in ("input", "output"))
    if not isinstance(given, list) or not isinstance(expected, list) or len(given) != len(expected):
        raise RewardError(f"tests is {str(tests)[:80]!r}: expected as many inputs as outputs, in two lists")
    if tests.get("fn_name"):
        raise RewardError(
            f"tests calls the function {tests['fn_name']!r}: expected standard input and output; write the calls as "
            "asserts, in test_code"
        )
    return [{"input": one, "output": other} for one, other in zip(given, expected, strict=True)]


def _python(name: str, code: str | Sequence[str] | None) -> str:
    """Return Python of the metadata as one text."""
    lines = [code] if isinstance(code, str) else list(code or ())
    if not all(isinstance(line, str) for line in lines):
        raise RewardError(f"{name} is {str(code)[:80]!r}: expected a text or a list of texts, each of them Python")
    return "".join(line.rstrip() + "\n" for line in lines)


def _run_inputs(
    sandbox: Sandbox,
    command: list[str],
    program: str,
    pairs: list[tuple[str, str]],
    total_seconds: float,
    is_first_failure_the_end: bool,
) -> list[dict[str, Any]]:
    left = total_seconds
    verdicts: list[dict[str, Any]] = []
    ended = ""
    for given, expected in pairs:
        seconds = min(sandbox.limits.seconds, left)
        if not ended and seconds <= 0:
            ended = "no time was left (total_seconds)"
        if ended:
            verdicts.append({"verdict": "not run", "text": ended})
            continue
        run = sandbox.run(command, {"program": program}, given, seconds)
        left -= run.seconds
        verdicts.append(_judge(run, expected))
        if is_first_failure_the_end and verdicts[-1]["verdict"] != "passed":
            ended = "another test was not passed"
    return verdicts


def _judge(run: Run, expected: str) -> dict[str, Any]:
    if run.ended == "exit" and run.exit_code == 0 and _lines(run.stdout) == _lines(expected):
        return {"verdict": "passed"}
    seen = {"exit_code": run.exit_code, "output": _excerpt(run.stdout), "error": _excerpt(run.stderr, last=True)}
    if run.ended == "timeout":
        return {"verdict": "timeout", **seen}
    if run.ended == "output":
        return {"verdict": "crash", "text": "too much output", **seen}
    if run.exit_code != 0:
        return {"verdict": "crash", **seen}
    return {"verdict": "failed", "expected": _excerpt(expected), **seen}


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _excerpt(text: str, last: bool = False) -> str:
    text = text.strip()
    if len(text) <= EXCERPT_LENGTH:
        return text
    return "..." + text[-EXCERPT_LENGTH:] if last else text[:EXCERPT_LENGTH] + "..."


@lru_cache(maxsize=256)
def _steps(test_code: str, entry_point: str | None) -> list[tuple[str, bool, list[str]]]:
    """Return the statements of the test code, each with whether it counts as a test, and the names in it.

    Tests are the asserts at the top level and the functions ``test_...`` without parameters; where there are none, the
    calls at the top level; where there are none either, ``check`` with the entry point.
    """
    try:
        tree = ast.parse(test_code)
    except (SyntaxError, ValueError) as error:
        raise RewardError(f"test_code is not Python ({error}): correct the metadata") from error
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.args.defaults]
    own = [name for name in functions if name.startswith("test_")]
    has_asserts = bool(own) or any(isinstance(node, ast.Assert) for node in tree.body)
    steps = []
    for node in tree.body:
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        is_test = isinstance(node, ast.Assert) or (is_call and not has_asserts)
        steps.append((ast.unparse(node), is_test, sorted(_names(node))))
    steps += [(f"{name}()", True, [name]) for name in own]
    if entry_point is not None and "check" in functions and not any(is_test for _, is_test, _ in steps):
        steps.append((f"check({entry_point})", True, ["check", entry_point]))
    if not any(is_test for _, is_test, _ in steps):
        raise RewardError(
            "test_code holds no test: expected asserts or calls at the top level, functions test_..., or "
            "check(candidate) with an entry_point beside it in the metadata"
        )
    return steps


def _names(node: ast.stmt) -> set[str]:
    """Return the names that a statement reads or makes."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(part.name)
        elif isinstance(part, ast.alias):
            found.add((part.asname or part.name).partition(".")[0])
    return found


def _run_asserts(sandbox: Sandbox, job: dict[str, Any], total_seconds: float) -> list[dict[str, Any]]:
    steps = job["steps"]
    seconds = min(sandbox.limits.seconds, total_seconds)
    run = sandbox.run(
        [python(), *FLAGS, "harness.py"],
        {"harness.py": HARNESS.read_text(encoding="utf-8")},
        json.dumps(job),
        seconds,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.endswith("}")]
    for line in lines:
        if line["verdict"] == "unsupported":
            raise RewardError(
                f"{line['text']}, which only data may be ({steps[line['step']][0][:80]!r}): rewrite the test, or give "
                "inputs and outputs instead"
            )
        if line["verdict"] == "broken":
            raise RewardError(
                f"test_code fails by itself, whatever the program does: {line['text']} "
                f"({steps[line['step']][0][:80]!r}): correct it; what it imports must be installed for {python()}"
            )
    told = {line["step"]: line for line in lines}
    why = _why_the_rest_failed(run, lines)
    verdicts = []
    for step, (source, is_test, _) in enumerate(steps):
        if is_test:
            line = told.get(step)
            verdict = why if line is None else {key: line[key] for key in ("verdict", "text") if line[key]}
            verdicts.append({"test": _excerpt(source), **verdict})
    return verdicts


def _why_the_rest_failed(run: Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the verdict of the tests that have none of their own."""
    error = _excerpt(run.stderr, last=True)
    if run.ended == "timeout":
        return {"verdict": "timeout", "error": error}
    if run.ended == "output":
        return {"verdict": "crash", "text": "too much output", "error": error}
    if run.exit_code != 0:
        return {"verdict": "crash", "exit_code": run.exit_code, "error": error}
    if lines and lines[-1]["verdict"] != "passed":
        return {"verdict": "not run", "text": lines[-1]["text"], "error": error}
    return {"verdict": "not run", "text": "the tests ended early", "error": error}
