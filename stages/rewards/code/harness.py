"""Runs Python asserts against a program without letting the two meet: two processes, plain values in between.

A copy of this file is run inside the sandbox, by itself, in two roles. The *tests* role holds the asserts and writes
the verdicts; it starts the *program* role, a second process that holds the program and answers: give me this name, call
it with these arguments. A value crosses as data (numbers, texts, lists, tuples, dicts, sets, bytes, numpy's arrays) or
else as a `Remote`: a handle whose calls, attributes, items and iteration are carried out by the program. So the program
sees the arguments of its calls and nothing else: not the asserts, the expected values or the verdicts.

A test that fails before it has touched the program, by a name that leads there or a value that came from there, fails
by itself, and so does one that cannot import something: its verdict is "broken", for which no program is to blame.

A `Remote` never equals a plain value, and has no order and no arithmetic: an answer that claims to equal whatever it is
compared with, or whose difference to everything is 0, does not pass.
"""

import builtins
import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

TEXT_LENGTH = 300
TO_PROGRAM, FROM_PROGRAM = 3, 4
"""File descriptors of the program role."""
PR_SET_DUMPABLE = 4
SPECIAL_NAMES = ("__name__", "__qualname__", "__dict__", "__annotations__", "__code__", "__defaults__")
"""Those of a `Remote` that a test may ask for. By others libraries take an object for what it says that it is: by
`__array_interface__` numpy reads any address."""
ARRAY_KINDS = "biufcSUO"
"""Of numpy's arrays that cross as data."""


class CannotCross(BaseException):
    """A test wants to hand over something that is not data; BaseException, so that no test can swallow it."""


class ProgramEnded(BaseException):
    """The program's process has ended."""


def encode(value: Any, handle: Callable[[Any], Any]) -> Any:
    """Return the value as JSON-like data; what is not plain goes through ``handle``."""
    if value is None or isinstance(value, bool):
        return value
    for kind, simple in ((int, int), (float, float), (str, str)):
        if isinstance(value, kind):
            return simple(value) if type(value) is not kind else value
    if isinstance(value, dict):
        return {"dict": [[encode(key, handle), encode(item, handle)] for key, item in dict.items(value)]}
    sequences: tuple[Any, ...] = (list, tuple, set, frozenset)
    for sequence in sequences:
        if isinstance(value, sequence):
            return {sequence.__name__: [encode(item, handle) for item in sequence.__iter__(value)]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if _is_array(value):
        return {"ndarray": [value.dtype.str, value.shape, [encode(item, handle) for item in value.ravel().tolist()]]}
    if type(value).__module__ == "numpy" and hasattr(value, "item") and type(number := value.item()) is not type(value):
        return encode(number, handle)
    return handle(value)


def _array(content: list[Any], find: Callable[[int], Any]) -> Any:
    dtype, shape, items = content
    values = [decode(item, find) for item in items]
    try:
        import numpy
    except ImportError:  # then the program has none either, and only says so
        return values
    array = numpy.array(values, dtype).reshape(shape)
    if array.dtype.kind not in ARRAY_KINDS:
        raise TypeError(f"an array of {array.dtype}")
    return array


def _is_array(value: Any) -> bool:
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray" and value.dtype.kind in ARRAY_KINDS


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """Return the value of what `encode` made; ``find`` gives the object of a handle."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "remote":
        return find(content)
    if kind == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(item, find) for item in content)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind == "ndarray":
        return _array(content, find)
    return complex(*content)


# --- the role that holds the tests


class Program:
    """The other process, as seen from the tests."""

    def __init__(self, text: str) -> None:
        to_program, from_program = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process == 0:
            _become_program(to_program[0], from_program[1])
        os.close(to_program[0])
        os.close(from_program[1])
        self.num_asked = 0
        self.requests = os.fdopen(to_program[1], "w", encoding="utf-8")
        self.answers = os.fdopen(from_program[0], encoding="utf-8")
        self.ask("run", text)

    def ask(self, action: str, *values: Any) -> Any:
        """Return what the program answers, or raise what it raised, as the nearest built-in exception."""
        self.num_asked += 1
        data = [action, *(encode(value, _handle_of) for value in values)]
        try:
            self.requests.write(json.dumps(data) + "\n")
            self.requests.flush()
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
            raise ProgramEnded(f"the program ended {f'by signal {-code}' if code < 0 else f'with exit status {code}'}")
        answer = json.loads(line)
        if "raised" in answer:
            kind = getattr(builtins, str(answer["raised"]), None)
            if kind is StopIteration and action != "next":  # it would end a loop of the tests before its asserts
                kind = RuntimeError
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = Exception
            try:
                error = kind(answer["text"])
            except TypeError:  # UnicodeDecodeError and its like want more
                error = Exception(answer["text"])
            error.is_of_program = True  # type: ignore[attr-defined]
            raise error
        self._copy_back(values, answer.get("changed", {}))
        return decode(answer["value"], self._remote)

    def _remote(self, number: int) -> "Remote":
        return Remote(self, number)

    def _copy_back(self, values: tuple[Any, ...], changed: dict[str, Any]) -> None:
        """Bring the arguments that the program changed in place up to date."""
        for position, data in changed.items():
            old, new = values[1][int(position)], decode(data, self._remote)
            if type(old) is not type(new):
                continue
            if isinstance(old, list | bytearray):
                old[:] = new
            elif isinstance(old, dict | set):
                old.clear()
                old.update(new)
            elif _is_array(old) and old.shape == new.shape:
                old[...] = new


class Remote:
    """Something that lives in the program and is not data."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._program.ask("call", self, values, named)

    def __getattr__(self, name: str) -> Any:
        _check_name(name)
        return self._program.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _check_name(name)
        self._program.ask("set_attribute", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._program.ask("set_item", self, key, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._program.ask("iterate", self)
        while True:
            try:
                value = self._program.ask("next", iterator)
            except StopIteration:
                return
            yield value

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __contains__(self, value: Any) -> bool:
        return any(value == item for item in self)  # compared here: the program does not learn what is looked for

    def __len__(self) -> int:
        return int(self._program.ask("length", self))

    def __bool__(self) -> bool:
        return bool(self._program.ask("truth", self))

    def __str__(self) -> str:
        return str(self._program.ask("text", self))

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._program.ask("equal", self, other))

    def __hash__(self) -> int:
        return hash(self._number)


def _check_name(name: str) -> None:
    if name[:2] == name[-2:] == "__" and name not in SPECIAL_NAMES:
        raise AttributeError(f"{name} of something that lives in the program cannot be had")


def _handle_of(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"remote": value._number}
    raise CannotCross(f"a test hands the program a value of type {type(value).__name__}")


class Names(dict[str, Any]):
    """The globals of the tests: a name that neither they nor Python define is the program's."""

    program: Program

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)  # Python goes on to its built-ins: a program cannot replace them for the tests
        return self.program.ask("name", name)


def _serve_module(name: str, program: Program) -> None:
    """Let the tests import the program under this name."""

    def find(attribute: str) -> Any:
        _check_name(attribute)
        try:
            return program.ask("name", attribute)
        except NameError as error:
            raise AttributeError(str(error)) from None

    module = ModuleType(name)
    module.__getattr__ = find  # type: ignore[method-assign]
    sys.modules[name] = module


def run_tests() -> None:
    """Read the job from standard input; write a line of JSON for each step that is a test or that failed."""
    # nobody may look into this process from now on: not its memory, not its file descriptors
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    sys.set_int_max_str_digits(0)
    job = json.loads(sys.stdin.read())
    verdicts = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the tests print is no verdict
    step: int | None = None
    try:
        names = Names(__name__="tests")
        names.program = program = Program(job["program"])
        _serve_module(job["solution_module"], program)
        if job["entry_point"] is not None:
            names[job["entry_point"]] = program.ask("name", job["entry_point"])
        touched = {job["entry_point"]}  # names in the tests whose values may be the program's
        for step, (source, is_test, mentioned) in enumerate(job["steps"]):
            num_asked, error = program.num_asked, None
            try:
                exec(compile(source, "<tests>", "exec"), names)
            except (CannotCross, ProgramEnded):
                raise
            except BaseException as caught:
                error = caught
            has_touched = program.num_asked > num_asked or not touched.isdisjoint(mentioned)
            if has_touched:
                touched.update(mentioned)
            if error is not None:
                is_broken = _is_own_failure(error, has_touched, job["solution_module"])
                _tell(verdicts, step, "broken" if is_broken else "failed", f"{type(error).__name__}: {error}")
                # what follows would run without what this step should have made
                if is_broken or not is_test or not isinstance(error, Exception):
                    return
            elif is_test:
                _tell(verdicts, step, "passed", "")
    except (CannotCross, ProgramEnded) as error:
        _tell(verdicts, step, "unsupported" if isinstance(error, CannotCross) else "crash", str(error))
    except BaseException as error:
        _tell(verdicts, step, "failed", f"{type(error).__name__}: {error}")


def _is_own_failure(error: BaseException, has_touched: bool, module: str) -> bool:
    """Return whether the tests are to blame for it, and not the program."""
    if getattr(error, "is_of_program", False):
        return False
    if isinstance(error, ImportError):  # of the module that is the program: it lacks a name
        return error.name != module
    # files, memory and processes are what the program shares with them, and may use up
    return not has_touched and not isinstance(error, OSError | MemoryError | RuntimeError)


def _tell(verdicts: Any, step: int | None, verdict: str, text: str) -> None:
    verdicts.write(json.dumps({"step": step, "verdict": verdict, "text": text[:TEXT_LENGTH]}) + "\n")
    verdicts.flush()


# --- the role that holds the program


def _become_program(read_end: int, write_end: int) -> None:
    nothing = os.open("/dev/null", os.O_RDONLY)
    # first out of the way of each other: one of the four may already be 3 or 4
    fds = [os.dup(fd) for fd in (read_end, write_end)]
    while min(fds) <= FROM_PROGRAM:
        fds = [os.dup(fd) for fd in fds]
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.dup2(fds[0], TO_PROGRAM)
    os.dup2(fds[1], FROM_PROGRAM)
    os.execv(sys.executable, [sys.executable, "-s", "-P", "-B", __file__, "program"])


def serve_program() -> None:
    """Carry out the requests of the tests on the program, which the first request brings."""
    sys.set_int_max_str_digits(0)
    requests = os.fdopen(TO_PROGRAM, encoding="utf-8")
    answers = os.fdopen(FROM_PROGRAM, "w", encoding="utf-8")
    for fd in (TO_PROGRAM, FROM_PROGRAM):
        os.set_inheritable(fd, False)
    objects: list[Any] = []
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}

    def handle(value: Any) -> Any:
        objects.append(value)
        return {"remote": len(objects) - 1}

    for line in requests:
        action, *data = json.loads(line)
        try:
            values = [decode(item, objects.__getitem__) for item in data]
            result = _carry_out(names, action, values)
            answer = {"value": encode(result, handle)}
            if action == "call":
                mutable = (list, dict, set, bytearray)
                changed = {i: v for i, v in enumerate(values[1]) if isinstance(v, mutable) or _is_array(v)}
                answer["changed"] = {str(i): encode(value, handle) for i, value in changed.items()}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            answer = {"raised": kinds[0], "text": str(error)[:TEXT_LENGTH]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _carry_out(names: dict[str, Any], action: str, values: list[Any]) -> Any:
    first, *rest = values
    if action == "run":
        exec(compile(first, "program.py", "exec"), names)
        return None
    if action == "name":
        if first not in names:
            raise NameError(f"name {first!r} is not defined")
        return names[first]
    if action == "call":
        return first(*rest[0], **rest[1])
    if action == "set_item":
        first[rest[0]] = rest[1]
        return None
    actions: dict[str, Callable[..., Any]] = {
        "attribute": getattr,
        "set_attribute": setattr,
        "item": lambda thing, key: thing[key],
        "iterate": iter,
        "next": next,
        "length": len,
        "truth": bool,
        "text": str,
        "equal": lambda one, other: bool(one == other),
    }
    return actions[action](first, *rest)


if __name__ == "__main__":
    if sys.argv[1:] == ["program"]:
        serve_program()
    else:
        run_tests()
