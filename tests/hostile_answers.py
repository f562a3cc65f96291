"""Every reward of the library over answers that would act if anything took them for code; run as a process of its own.

    python -m tests.hostile_answers FOLDER

The process works in FOLDER, where a payload that is executed leaves a file, and prints a JSON object: the functions
that were run, and what the interpreter was seen to do with the text of an answer.
"""

import ast
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
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
seen: list[str] = []


def main(folder: str) -> None:
    from tests.judge_server import serve
    from tests.rewards_doc import read_cases, reward_functions
    from tests.test_reward_cases import SERVER, outcomes, placeholders, scripted
    from tests.tiny_models import save_case_models

    os.environ["NO_PROXY"] = "127.0.0.1"
    os.chdir(folder)
    known: dict[str, str] = {f"{{{name}}}": path for name, path in save_case_models(Path(folder, "models")).items()}
    names = [name for name, _ in reward_functions() if name not in NOT_RUN]
    decided_last = sorted(read_cases(), key=lambda case: case["reward"] is not None)
    cases = {case["function"]: case for case in decided_last}
    for name in names:  # what they import, they import before anything is watched
        with ExitStack() as stack:
            case = cases[name]
            if SERVER in placeholders(case):
                server = stack.enter_context(serve(scripted(["Score: 7"] * 10_000)))
                known[SERVER] = server.base_url
            given = (case.get("arguments") or {}).items()
            arguments = {key: known.get(value, value) if isinstance(value, str) else value for key, value in given}
            outcomes(case, arguments)
            watched = [*seen]
            row = case["row"] if "row" in case else case["rows"][0]
            rows = [row | {"completion": dress.format(*[text] * 3)} for text in PAYLOADS for dress in DRESSES]
            rows.append({key: CALL if isinstance(value, str) else value for key, value in rows[0].items()})
            outcomes({"function": name, "rows": rows}, arguments)
            seen[len(watched) :] = [f"{name}: {act}" for act in seen[len(watched) :]]
    print(json.dumps({"functions": names, "seen": seen, "files": sorted(path.name for path in Path(folder).iterdir())}))


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what the interpreter does with a text of a payload."""
    if not event.startswith(ACTS):
        return
    told = " ".join(_told(argument) for argument in arguments)
    if MARK in told or SUM in told:
        seen.append(f"{event} {told[:300]}")


def _told(argument: Any) -> str:
    if isinstance(argument, ast.AST):
        return ast.dump(argument)
    if isinstance(argument, CodeType):
        return f"{argument.co_names} {' '.join(_told(constant) for constant in argument.co_consts)}"
    return argument if isinstance(argument, str) else repr(argument)[:10_000]


if __name__ == "__main__":
    sys.addaudithook(watch)
    main(sys.argv[1])
