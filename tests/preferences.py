"""Files of preferences, and a run whose completions they name."""

import json
import random
from pathlib import Path
from typing import Any

from pipeline.run_dir import RunDir
from tests.builders import completion_rows, prompt_rows, write_artifact

WORDS = ("red", "green", "blue", "sky", "is", "the")


def longer_is_better(path: Path, count: int, seed: int) -> str:
    """Write preferences of random words in which the longer answer is chosen; no question occurs twice."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        short, long = sorted(draw.sample(range(1, 11), 2))
        prompt, chosen, rejected = (" ".join(draw.choices(WORDS, k=k)) for k in (8, long, short))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return jsonl(path, *rows)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def store_run(root: Path) -> str:
    """Store a run with the completions c0 red, c1 blue of one question, and c2 of another."""
    run = RunDir(root)
    run.record_config("", {})
    user = {"role": "user", "content": "the sky"}
    write_artifact(
        run.place(0, "prompts"),
        "prompts",
        prompt_rows(
            {"prompt_id": "p", "messages": [user]}, {"prompt_id": "q", "messages": [{**user, "content": "is"}]}
        ),
    )
    answers = [{"completion": "red"}, {"completion": "blue"}, {"completion": "green", "prompt_id": "q"}]
    write_artifact(run.place(0, "completions"), "completions", completion_rows(*answers))
    return str(root)
