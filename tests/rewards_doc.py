"""Write docs/reward_table.md: its hand-written head, then what the reward functions say and their worked cases."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.rewards.base import FACTS

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "reward_table.md"
CASES = ROOT / "tests" / "reward_cases"
MODULES = ROOT / "stages" / "rewards"
MARK = "<!-- generated below by `make rewards-doc` from stages/rewards/ and tests/reward_cases/ -->"
LONGEST_CELL = 300
"""Characters; more would make the table unreadable, and the JSON file has the rest."""


def read_cases() -> list[dict[str, Any]]:
    """Return the cases of all files, in the order of the files' names."""
    return [case for path in sorted(CASES.glob("*.json")) for case in json.loads(path.read_text(encoding="utf-8"))]


MACHINERY = {"base", "functions", "scorer", "pool", "worker", "results"}
"""What finds and runs reward functions; none of them is one."""


def reward_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Return name and definition of each reward function of the library, read from the source, not imported."""
    for path in sorted(path for path in MODULES.glob("*.py") if path.stem not in MACHINERY):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_reward(node):
                yield f"stages.rewards.{path.stem}:{node.name}", node


def _is_reward(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {argument.arg for argument in node.args.args + node.args.kwonlyargs}
    returns = ast.unparse(node.returns) if node.returns else ""
    gives_scores = "completions" in names and returns in ("pl.Series", "pl.DataFrame")
    gives_score = "completion" in names and any(word in returns for word in ("Score", "float"))
    return not node.name.startswith("_") and (gives_score or gives_scores or returns == "pl.Expr")


def reward_table() -> str:
    """Return the generated part: per function its first sentence, its arguments and a table of cases."""
    cases = read_cases()
    sections = []
    for name, node in reward_functions():
        own = [case for case in cases if case["function"] == name]
        summary = (ast.get_docstring(node) or "").partition("\n")[0]
        sections.append(f"## {name}\n\n{summary}\n\n{_arguments(node)}{_table(own)}")
    return "\n".join(sections)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    positional = node.args.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    texts = [
        argument.arg + (f" = {ast.unparse(default)}" if default else "")
        for argument, default in pairs
        if argument.arg not in FACTS and argument.arg != "completions"
    ]
    return f"Arguments and metadata keys: {', '.join(f'`{text}`' for text in texts)}\n\n" if texts else ""


def _table(cases: list[dict[str, Any]]) -> str:
    if not cases:
        return "No worked cases.\n"
    lines = ["| case | row | arguments | reward | detail or error |", "| --- | --- | --- | --- | --- |"]
    for case in cases:
        reward = case["reward"]
        saw = case.get("error") if reward is None and not case.get("detail") else case.get("detail")
        row = case["rows"] if "rows" in case else case["row"]
        cells = [_code(row), _code(case["arguments"]) if case.get("arguments") else "", _number(reward), _code(saw)]
        lines.append(f"| {case['case']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(reward: Any) -> str:
    if isinstance(reward, list):
        return ", ".join(_number(value) for value in reward)
    return "null" if reward is None else f"{reward:.6g}"


def _code(value: Any) -> str:
    """Return the value as JSON in one table cell."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + "..."
    ticks = "``" if "`" in text else "`"
    return f"{ticks} {text} {ticks}".replace("|", "\\|") if "`" in text else f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    head = TARGET.read_text(encoding="utf-8").split(MARK)[0]
    TARGET.write_text(f"{head}{MARK}\n\n{reward_table()}", encoding="utf-8")
