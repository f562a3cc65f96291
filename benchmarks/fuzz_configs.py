"""Configs as nobody should write them: each is refused with one error, or accepted; nothing crashes, hangs or grows.

    python benchmarks/fuzz_configs.py --cases 1000 --seed 0

A case is a working config of which a few settings were replaced: by values of another type, huge or no numbers, names
with control characters, paths out of the folder, functions that are none, tables nested deeper than Python's stack; or
whose text was damaged. It is loaded, checked as before a run, its recipe is written and a prompt is drawn, in a process
of its own with limits. Every case follows from the seed and its number.
"""

import argparse
import datetime
import faulthandler
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel

from pipeline.config import chosen, deciding
from pipeline.errors import GrpoError
from pipeline.manifest import canonical_json
from pipeline.run_dir import RunDir
from pipeline.text import one_line
from stages.config import RunConfig, config_class, load_config
from stages.preflight import preflight
from stages.score import find_rewards
from stages.sources import SourceConfig, draw

CPU_SECONDS = 10
WALL_SECONDS = 120
"""Says only what hangs without computing: a busy machine stretches the time of all cases."""
MEMORY_BYTES = 2 << 30

NUMBERS = (0, -1, 1, 2, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 0.0, 0.5, -1.5, 1e308, 5e-324)
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"), True, False)
TEXTS = (
    "", " ", "\x00", "a\x00b", "a\x1b[2Jb", "\u202eeman", "a\r\nb", "\ufeff", "\U000e0041", "..", ".", "/", "~",
    "~nobody", "../../x", "/etc/passwd", "/dev/zero", "a" * 300, "a/" * 3000, "\u0130\u00df\U0001f600", "nan",
    "current", "initial", "age:" + "9" * 30, "age:\u0663", "iteration:-1", "iteration:", "%s%n", "$(id)", "{}", "[",
    "-rf", "starter", "s3:", "://", "nosuch://a/b.jsonl", "memory://a/b.jsonl", "file:///etc/passwd", "rows.jsonl",
    "rows.csv", "reasoning_gym:", "reasoning_gym:chain_sum", "reasoning_gym:../x", "transformers", "vllm", "group_std",
)  # fmt: skip
FUNCTIONS = (
    "", ":", "a:", ":a", "a:b:c", "os", "os:getcwd", "os:nothing", "os:path", "sys:exit", "json:dumps", "json:",
    "builtins:print", "..:x", ".a:b", "a b:c", "no.module:f", "stages.rewards.answers.matching:exact_match",
    "stages.score:ScoreConfig", "stages.rewards.answers.matching:exact_match.x", "\x1b:\u202e", "a" * 5000 + ":f",
    "1:1", "if:else", "tomllib:loads",
)  # fmt: skip
OPTIONS = ("min_terms", "max_terms", "min_digits", "max_digits", "operators", "exact", "ignore_case", "size", "\x1b")
OTHERS: tuple[Any, ...] = (
    [], {}, [1, "a"], [[]], [{}], {"a": {"b": [1]}}, {"": ""}, {"\x1b": 1}, {"a": float("nan")}, {"a": 10**30},
    datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), datetime.time(1, 2), [None], 
)  # fmt: skip


PATHS = (
    ("policy", "model"), ("prompts", "source"), ("prompts", "options"), ("evaluate", "source", "source"),
    ("score", "rewards", "function"), ("score", "rewards", "arguments"), ("offline", "run"), ("generate", "engine"),
    ("generate", "members", "policy"), ("update", "loss", "name"), ("normalize", "baseline"),
)  # fmt: skip
"""Settings that are changed more often: what they name is looked for."""
FITTING: dict[Any, tuple[Any, ...]] = {
    int: (0, 1, 2, 3, 1000, 2**31 - 1, 2**31, 2**63 - 1),
    float: (0.0, 0.1, 0.5, 1.0, 1e308, 5e-324, -1.0),
    bool: (True, False),
    str: TEXTS,
}
"""Values of the right type, which get past the first check."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    kind: str
    """accepted, the class of its error, or what it must not be: crashed, hung, too large."""
    text: str = ""

    @property
    def is_fine(self) -> bool:
        return self.kind not in ("crashed", "hung", "too large")


def base(random_: random.Random, folder: Path) -> dict[str, Any]:
    """Return tables that are accepted as they are."""
    task = "reasoning_gym:chain_sum"
    source = random_.choice([str(folder / "rows.jsonl"), str(folder / "rows.csv"), task, task])
    return {
        "seed": 0,
        "policy": {"model": "starter"},
        "starter": {"steps": 1},
        "prompts": {"source": source, "prompts_per_iteration": 2},
        "generate": {"engine": "transformers", "group_size": 2, "max_tokens": 8, "num_threads": 1},
        "score": {"rewards": [{"name": "exact", "function": "stages.rewards.answers.matching:exact_match"}]},
        "update": {"num_threads": 1},
        "evaluate": {"every": 0},
    }


def settings() -> list[tuple[tuple[str, ...], Any]]:
    """Return the keys of every setting with its annotation; tables of a list count as its first one."""
    return list(_settings(config_class(), ()))


def _settings(table: type[BaseModel], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, field in table.model_fields.items():
        yield (*keys, name), field.annotation
        for inner in _tables(field.annotation):
            yield from _settings(inner, (*keys, name))


def _tables(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _tables(part)


def write_case(number: int, seed: int, folder: Path) -> bytes:
    """Return the text of a case."""
    random_ = random.Random(f"{seed}:{number}")
    tables = base(random_, folder)
    known = settings()
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        keys, annotation = random_.choice([(k, a) for k, a in known if k in PATHS] if random_.random() < 0.4 else known)
        _put(tables, keys, _value(random_, keys, annotation))
        if keys == ("policy", "model") and random_.random() < 0.8:
            tables.pop("starter", None)
    if random_.random() < 0.1:
        _put(tables, (random_.choice(TEXTS) or "x", "y"), random_.choice(NUMBERS))
    try:
        text = tomli_w.dumps(tables)
    except (TypeError, AttributeError, ValueError):  # a null, or a table where none can be: no TOML says it
        text = tomli_w.dumps(base(random_, folder))
    return _damaged(text, random_).encode("utf-8", "surrogatepass")


def _value(random_: random.Random, keys: tuple[str, ...], annotation: Any) -> Any:
    choices = [
        value for part in (annotation, *get_args(annotation)) for value in get_args(part) if isinstance(value, str)
    ]
    if choices and random_.random() < 0.6:
        return random_.choice(choices)
    if keys[-1] in ("function", "engine", "baseline", "scale", "name") and random_.random() < 0.5:
        return random_.choice(FUNCTIONS)
    if keys[-1] in ("options", "arguments", "weights"):
        values = (*NUMBERS, *NO_NUMBERS, *TEXTS, *OTHERS)
        return {random_.choice(OPTIONS): random_.choice(values) for _ in range(2)}
    fitting = [
        value for type_, values in FITTING.items() if type_ in (annotation, *get_args(annotation)) for value in values
    ]
    if fitting and random_.random() < 0.7:
        return random_.choice(fitting)
    return random_.choice(random_.choice((NUMBERS, NO_NUMBERS, TEXTS, OTHERS)))


def _put(tables: Any, keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        if isinstance(tables, list):
            tables = tables[0] if tables else {}
        if not isinstance(tables, dict):
            return
        tables = tables.setdefault(key, [{}] if key in ("rewards", "members", "offline") else {})
    if isinstance(tables, list) and tables:
        tables = tables[0]
    if isinstance(tables, dict):
        tables[keys[-1]] = value


def _damaged(text: str, random_: random.Random) -> str:
    kind = random_.randrange(20)
    place = random_.randrange(len(text))
    if kind == 0:
        return text[:place]
    if kind == 1:
        return text[:place] + random_.choice("\"[]{}=.\x00\u202e\ud800#\n'") + text[place:]
    depth = random_.choice((50, 900, 20_000))
    if kind == 2:
        return text + f"\n[prompts.options]\na = {'[' * depth}{']' * depth}\n"
    if kind == 3:
        return text + f"\n[prompts.options]\n{'.'.join(['a'] * depth)} = 1\n"
    if kind == 4:
        return text.replace('"', f"{'{a=' * depth}1{'}' * depth}", 1)
    if kind == 5:
        return text + f"\n[prompts.options]\nmax_terms = {'9' * random_.choice((19, 400, 5000))}\n"
    if kind == 6:
        return text + text
    return text


def examine(text: bytes, folder: Path) -> Outcome:
    """Load a config, check it, write its recipe, draw a prompt; return what became of it."""
    path = folder / "config.toml"
    path.write_bytes(text)
    try:
        config = load_config(path)
        preflight(config, RunDir(folder / "runs" / "fuzzed"))
        _identify(config)
        _draw(config)
    except GrpoError as error:
        return Outcome(type(error).__name__, str(error))
    except (Exception, SystemExit, KeyboardInterrupt):
        return Outcome("crashed", traceback.format_exc(limit=-6))
    return Outcome("accepted")


def _identify(config: RunConfig) -> None:
    """Compute what identifies the config."""
    canonical_json([chosen(config), deciding(config), config.model_dump(mode="json")])
    [reward.recipe for reward in find_rewards(config.score)]


def _draw(config: RunConfig) -> None:
    for source, split in ((config.prompts, "train"), (config.evaluate.source, "held_out")):
        if source is not None:
            share = config.held_out_share if split == "train" else 1.0
            alone = SourceConfig(**source.model_dump(include=set(SourceConfig.model_fields)))
            draw(alone, split=split, held_out_share=share, count_=1, seed=config.seed, iteration=0)  # type: ignore[arg-type]


def examine_apart(text: bytes, folder: Path) -> Outcome:
    """Do what `examine` does in a process of its own, which may take so much time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        faulthandler.disable()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        found = examine(text, folder)
        os.write(writer, json.dumps([found.kind, found.text[-8000:]]).encode())
        os._exit(0)
    os.close(writer)
    signal.alarm(WALL_SECONDS)
    try:
        with os.fdopen(reader, "rb") as results:
            told = results.read()
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        told = b""
    signal.alarm(0)
    _, status, usage = os.wait4(child, 0)
    if usage.ru_maxrss * 1024 > MEMORY_BYTES:
        return Outcome("too large", f"{usage.ru_maxrss / 1024:.0f} MiB")
    if not told:
        ending = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
        is_slow = ending in ("SIGXCPU", "SIGKILL")
        return Outcome("hung" if is_slow else "crashed", ending)
    kind, said = json.loads(told)
    return Outcome("too large" if "MemoryError" in said else kind, said)


def sources(folder: Path) -> None:
    """Write the sources that the configs name."""
    rows = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.csv").write_text(
        "question,answer\n" + "\n".join(f"{row['question']},{row['answer']}" for row in rows)
    )


def _too_late(*_: object) -> None:
    raise TimeoutError


def main() -> int:
    """Run the cases; print what each kind of outcome counts, and every case that is not fine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="This case alone, in this process, with its text.")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from stages.rewards.answers.reasoning_gym import import_reasoning_gym

    with tempfile.TemporaryDirectory(prefix="grpo-fuzz-") as name:
        folder = Path(name)
        sources(folder)
        os.chdir(folder)
        if given.only is not None:
            text = write_case(given.only, given.seed, folder)
            print(text.decode("utf-8", "replace")[:4000])
            print(examine(text, folder))
            return 0
        import_reasoning_gym()  # once, not in every process
        signal.signal(signal.SIGALRM, _too_late)
        counts: Counter[str] = Counter()
        started, slowest, which = time.monotonic(), 0.0, 0
        for number in range(given.cases):
            begun = time.monotonic()
            found = examine_apart(write_case(number, given.seed, folder), folder)
            if time.monotonic() - begun > slowest:
                slowest, which = time.monotonic() - begun, number
            counts[found.kind] += 1
            if not found.is_fine:
                print(f"case {number}: {found.kind}: {one_line(found.text)[-600:]}", flush=True)
    seconds = time.monotonic() - started
    print(f"{given.cases} configs in {seconds:.0f} s, the slowest ({which}) {slowest:.1f} s: {dict(counts)}")
    return 0 if all(Outcome(kind).is_fine for kind in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
