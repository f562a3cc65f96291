"""Write docs/reward_table.md: its hand-written head, then what the reward functions say and their worked cases."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.functions import import_function
from stages.rewards.base import FACTS

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "reward_table.md"
CASES = ROOT / "tests" / "reward_cases"
MODULES = ROOT / "stages" / "rewards"
PLACEHOLDERS = {
    "word_encoder": "an encoder that knows red (1, 0), green (0, 1), blue (3, 4) and minus (-1, 0), takes the mean of "
    "a text's known words, and reads at most 8 of them",
    "uniform_lm": "a language model of 14 tokens that gives each the probability 1/14 everywhere, with a chat "
    "template; reads 32 tokens",
    "favourite_lm": "a language model of 14 tokens that gives `red` the probability 1/2 everywhere and each other one "
    "1/26, without chat template; words that it does not know are one token, `<unk>`",
    "constant_classifier": "an entailment model that says contradiction 1/4, entailment 1/2, neutral 1/4 of "
    "everything; reads 64 tokens",
    "last_word_classifier": "an entailment model without a class for contradiction: entailment 3/4 where the last word "
    "is red, else 1/2",
    "reward_model": "a reward model whose logit is 1.5 where the last word is red, -2 where it is blue, else 0; reads "
    "32 tokens, its chat template writes `user : ... assistant : ...`",
    "judge_server": "a chat server that gives the answers of `judge_says`, one after the other",
}
"""What a case may name in braces as an argument, and what the test puts in its place."""
MARK = "<!-- generated below by `make rewards-doc` from stages/rewards/ and tests/reward_cases/ -->"
LONGEST_CELL = 300
"""Characters; more would make the table unreadable, and the JSON file has the rest."""


def read_cases() -> list[dict[str, Any]]:
    """Return the cases of all files, in the order of the files' names."""
    return [case for path in sorted(CASES.glob("*.json")) for case in json.loads(path.read_text(encoding="utf-8"))]


MACHINERY = {"base", "functions", "scorer", "pool", "worker", "results", "frames", "words"}
"""What finds and runs reward functions; none of them is one."""


def reward_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Return name and definition of each reward function of the library, read from the source, not imported."""
    for path in sorted(path for path in MODULES.rglob("*.py") if path.stem not in MACHINERY):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_reward(node):
                yield f"{module}:{node.name}", node


def _is_reward(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {argument.arg for argument in node.args.args + node.args.kwonlyargs}
    returns = ast.unparse(node.returns) if node.returns else ""
    gives_scores = "completions" in names and returns in ("pl.Series", "pl.DataFrame")
    gives_score = "completion" in names and any(word in returns for word in ("Score", "float"))
    return not node.name.startswith("_") and (gives_score or gives_scores or returns == "pl.Expr")


def reward_table() -> str:
    """Return the generated part: what the placeholders stand for, then per function its first sentence, its arguments
    and a table of cases.
    """
    cases = read_cases()
    sections = [_placeholders()]
    for name, node in reward_functions():
        own = [case for case in cases if case["function"] == name]
        summary = (ast.get_docstring(node) or "").partition("\n")[0]
        sections.append(f"## {name}\n\n{summary}\n\n{_arguments(name)}{_table(own)}")
    return "\n".join(sections)


def _placeholders() -> str:
    lines = [
        "An argument in braces stands for a tiny model that the tests make, whose output is known by construction, or",
        "for a local server. The language models know the words `red green blue sky is the . user assistant :`.",
        "",
        *(f"- `{{{name}}}`: {text}." for name, text in PLACEHOLDERS.items()),
    ]
    return "\n".join(lines) + "\n"


def _arguments(name: str) -> str:
    function, _ = import_function(name)
    texts = [
        parameter.name + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in FACTS and parameter.name != "completions"
    ]
    return f"Arguments and metadata keys: {', '.join(f'`{text}`' for text in texts)}\n\n" if texts else ""


def _table(cases: list[dict[str, Any]]) -> str:
    if not cases:
        return "No worked cases.\n"
    lines = ["| case | row | arguments | reward | detail or error |", "| --- | --- | --- | --- | --- |"]
    for case in cases:
        lines += [f"| {' | '.join(cells)} |" for cells in _cells(case)]
    return "\n".join(lines) + "\n"


def _cells(case: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each row of a case; what holds for all of them stands with the first."""
    several = "rows" in case
    why = f"<br>{case['why']}".replace("|", "\\|") if "why" in case else ""
    title, given = f"{case['case']}{why}", _code(case["arguments"]) if case.get("arguments") else ""
    if says := case.get("judge_says"):
        given += f"<br>judge says {_code(says)}"
    for index, row in enumerate(case["rows"] if several else [case["row"]]):
        reward, detail, error = (
            found[index] if several and found is not None else found
            for found in (case["reward"], case.get("detail"), case.get("error"))
        )
        # what says no more than that the reward is null is left out beside a detail
        says_nothing = detail is not None and error is not None and error in "the function returned None"
        seen = [detail] if says_nothing else [detail, error]
        yield [title, _code(row), given, _number(reward), "<br>".join(_code(x) for x in seen if x is not None)]
        title, given = "same, next row", ""


def _number(reward: float | None) -> str:
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
