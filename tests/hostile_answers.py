"""Answers that would act if anything took them for code, and a watch over what the interpreter does with them."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

MARK, SUM = "hostile_marker", "31415926535"
"""What the payloads name, and a number that only an answer has: calculating with it counts as evaluating it."""
NOT_RUN = {
    "stages.rewards.code.code:code": "executes programs by design, in the sandbox (tests/test_sandbox.py)",
}
CALL = f"open('{MARK}', 'w').write('1')"
PAYLOADS = (
    CALL,
    f"__import__('os').system('echo 1 > {MARK}')",
    f"__import__('pathlib').Path('{MARK}').write_text('1')",
    f'exec("{CALL}")',
    f"(lambda: {CALL})()",
    f"[{CALL} for _ in (1,)][0]",
    f"().__class__.__base__.__subclasses__()[0]({CALL})",
    f"1 if {CALL} else 2",
    f"{SUM} + 2*({SUM} - 1)**2",
    f"Function('{MARK}')({SUM})",
    f"cos\nsystem\n(S'echo 1 > {MARK}'\ntR.",
    f"!!python/object/apply:os.system ['echo 1 > {MARK}']",
    f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}} {{% {CALL} %}} {{{MARK}}} {{0.__class__}} %({MARK})s",
    f"$(echo 1 > {MARK}) `echo 1 > {MARK}` ; echo 1 > {MARK}",
    f"'; copy (select 1) to '{MARK}' --",
    f"\\input{{|echo 1 > {MARK}}} \\immediate\\write18{{echo 1 > {MARK}}} \\directlua{{{MARK}}}",
    f"x_{{{CALL}}} + \\operatorname{{{MARK}}}({SUM})",
)
DRESSES = (
    "{}",
    "\\boxed{{{}}}",
    "The answer is ${}$.",
    "\\boxed{{\\text{{{}}}}} Score: {}",
    '```json\n{{"answer": {}}}\n```',
    "<think>{}</think><answer>{}</answer>",
    '(A) {} = 7, "{}" is red.\n#### {}',
)
ACTS = (
    "compile",
    "exec",
    "import",
    "open",
    "os.",
    "subprocess.",
    "pickle.",
    "marshal.",
    "socket.",
    "shutil.",
    "ctypes.",
)
_seen: list[str] | None = None
"""None = nobody watches."""


@contextmanager
def watching() -> Iterator[list[str]]:
    """Return what the interpreter does with texts of the payloads within this context."""
    global _seen
    _add_hook()
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


@cache
def _add_hook() -> None:
    sys.addaudithook(_watch)  # which Python never removes


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None or not event.startswith(ACTS):
        return
    told = " ".join(_told(argument) for argument in arguments)
    if MARK in told or SUM in told:
        _seen.append(f"{event} {told[:300]}")


def _told(argument: Any) -> str:
    if isinstance(argument, ast.AST):
        return ast.dump(argument)
    if isinstance(argument, CodeType):
        return f"{argument.co_names} {' '.join(_told(constant) for constant in argument.co_consts)}"
    return argument if isinstance(argument, str) else repr(argument)[:10_000]
