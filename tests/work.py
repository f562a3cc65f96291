"""Measures of work that do not depend on the machine, and the running of tabulated reward cases."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from stages.rewards.base import Score


def instructions(call: Callable[[], object]) -> int:
    """Return the bytecode instructions that the call executes in Python frames."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def reward_cases(name: str) -> list[dict[str, Any]]:
    """Return the hand-worked cases of one module."""
    text = (Path(__file__).parent / "reward_cases" / f"{name}.json").read_text(encoding="utf-8")
    cases: list[dict[str, Any]] = json.loads(text)
    return cases


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    """Return reward, detail and error of calling the case's function directly."""
    module, _, name = case["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    known = case["row"] | case["arguments"]
    try:
        score = function(**{key: known[key] for key in inspect.signature(function).parameters if key in known})
    except Exception as error:  # the cases hold the errors as data
        return {"reward": None, "detail": None, "error": str(error)}
    assert isinstance(score, Score)
    error_text = "the function returned None" if score.reward is None else None
    return {"reward": score.reward, "detail": json.loads(json.dumps(score.detail)), "error": error_text}


def check_case(case: dict[str, Any]) -> None:
    """Assert that the case's function gives what was worked out by hand, to the ninth digit."""
    found = outcome(case)
    assert found["reward"] == pytest.approx(case["reward"], abs=1e-9)
    assert found["detail"] == case["detail"]
    assert (case["error"] or "") in (found["error"] or "")
    assert (found["error"] is None) == (case["error"] is None)
