"""What it takes to score answers of reasoning-gym in the sandbox, beside a bare run of it and a task that needs none.

python benchmarks/evaluated_answers.py --answers 100
"""

import argparse
import time
from collections.abc import Callable

from stages.rewards.answers.reasoning_gym import verify
from stages.rewards.code.sandbox import Sandbox

ENTRIES = {
    "countdown": {"answer": "1 + 2", "metadata": {"source_dataset": "countdown", "numbers": [1, 2], "target": 3}},
    "chain_sum": {"answer": "12", "metadata": {"source_dataset": "chain_sum"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100)
    answers = parser.parse_args().answers
    for task, entry in ENTRIES.items():
        print(f"{task}: first answer after {_seconds(lambda entry=entry: verify('1 + 2', entry)):.2f} s")
        each = _seconds(lambda entry=entry: [verify("1 + 2", entry) for _ in range(answers)]) / answers
        print(f"{task}: {each * 1000:.3f} ms for each of the next {answers}")
    with Sandbox() as sandbox:
        each = _seconds(lambda: [sandbox.run(["true"]) for _ in range(answers)]) / answers
    print(f"`true` in the sandbox: {each * 1000:.3f} ms")


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
