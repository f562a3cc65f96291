"""A completion, or a row, that is a program reaches no interpreter in any reward of the library."""

import json
import subprocess
import sys
from pathlib import Path

from stages.rewards.code.sandbox import PROJECT
from tests.rewards_doc import reward_functions

IN_THE_SANDBOX = {"stages.rewards.code.code:code"}
"""It runs programs: tests/test_sandbox.py shows that they reach nothing."""
OTHERS = ("stages.rewards.models.", "stages.rewards.judge.", "stages.rewards.answers.ratings:", "soft_overlong")
"""They hand texts to models, look ids up in a table, count tokens."""
HOOKED = """
import json, sys
from pathlib import Path
from pipeline.functions import import_function
from tests.rewards_doc import read_cases
from tests.test_rewards_reasoning_gym import payloads
names = ("compile", "exec", "open", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
watched, found = "", []
def hook(event, arguments):
    # what runs or opens something that the text of the completion names
    if watched and event in names and "written-by-a-completion" in str(arguments):
        found.append(f"{watched}: {event} {str(arguments)[:200]}")
sys.addaudithook(hook)
hostile = payloads(Path(sys.argv[1]) / "written-by-a-completion")
forms = ("\\\\boxed{%s}", "$%s$", "<answer>%s</answer>", "```json\\n%s\\n```", "A: %s")
hostile += [form % hostile[0] for form in forms]
calls = {}
for case in read_cases():
    function = case["function"]
    if function not in sys.argv[2:] or function in calls or "row" not in case:
        continue
    call, _ = import_function(function)
    row = {**case["row"], **case["arguments"]}
    texts = {key: hostile[0] for key, value in case["row"].items() if isinstance(value, str)}
    changed = {**row, **texts}
    for given in (row, changed):
        for text in hostile:
            watched = function
            try:
                call(**{**given, "completion": text})
            except Exception:
                pass
            watched = ""
            calls[function] = calls.get(function, 0) + 1
watched = "the test itself"
eval(hostile[0].replace("touch", "exists"))
watched = ""
print(json.dumps({"functions": sorted(calls), "found": found}))
"""


def test_a_hostile_completion_reaches_no_interpreter_in_any_reward(tmp_path: Path) -> None:
    functions = {name for name, _ in reward_functions() if not any(other in name for other in OTHERS)} - IN_THE_SANDBOX
    done = subprocess.run(
        [sys.executable, "-c", HOOKED, str(tmp_path), *functions],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["functions"]) == functions
    assert {line.partition(":")[0] for line in told["found"]} == {"the test itself"}
    assert list(tmp_path.iterdir()) == []
