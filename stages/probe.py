"""What may never end is tried first in a process of its own: a task with its options, a chat template.

Both are programs of others with values of others. The process may use little memory and a few seconds of processor
time; what it does not manage in them is refused before anything is written. Python's own limits would not stop a loop
inside of C, such as a power with a huge exponent.
"""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, PolicyError, SourceError

CPU_SECONDS = 10
"""Processor time of what is tried; imports come on top."""
MEMORY_BYTES = {"task": 4 << 30, "template": 1 << 30}
"""A template takes as much again in the process that asks; a task imports large packages."""
MOST_CHARACTERS = 1 << 24
"""Of what a template writes."""
WALL_SECONDS = 600
"""Only for a machine that stands still."""
ROOT = Path(__file__).parents[1]
RESERVED = (
    "messages", "add_generation_prompt", "tools", "documents", "conversation", "chat_template",
    "continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask",
)  # fmt: skip
"""Variables of a chat template, or arguments of what renders it, that are not the config's to set."""
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""A tag of transformers that writes nothing."""


@lru_cache(maxsize=16)
def try_task(config: str) -> None:
    """Check that a task gives a row with its options; ``config`` is the JSON of a SourceConfig.

    Raises:
        SourceError: when it does not, within the limits.
    """
    source = json.loads(config)
    if source["options"] and (problem := _try("task", config).get("problem")):
        raise SourceError(
            f"{source['source']} gives no row with the options {source['options']!s:.300}: {problem}; correct "
            "prompts.options"
        )


def check_template(
    template: str | None,
    variables: Mapping[str, Any],
    special: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]],
) -> None:
    """Check that a chat template reads the config's variables, and ends.

    ``special`` are the texts of the tokenizer's special tokens, which it also reads. What else a template may raise is
    left to `stages.encoding.render`.

    Raises:
        ConfigError: when a variable is none of the template's.
        PolicyError: when the template writes no conversation within the limits.
    """
    known: set[str] = set()
    if template is not None:
        known |= _try_template(json.dumps([template, dict(variables), dict(special), list(messages)], default=str))
    known -= {*RESERVED, *special, "raise_exception", "strftime_now"}
    if unknown := sorted(set(variables) - known):
        raise ConfigError(
            f"prompts.chat_template_kwargs sets {unknown[0]}, which the model's chat template does not read: expected "
            f"{', '.join(sorted(known)) or 'none, since it reads no variables'}; correct the name, or leave it out"
        )


@lru_cache(maxsize=16)
def _try_template(what: str) -> frozenset[str]:
    """Return the variables that the template reads."""
    found = _try("template", what)
    if "no_template" in found:
        raise PolicyError(
            f"the model's chat template is no template ({found['no_template']}): expected one of jinja; save the "
            "tokenizer again with a right one"
        )
    if "problem" in found:
        raise PolicyError(
            f"the model's chat template writes no conversation: {found['problem']}; expected one that ends, take "
            "another model or correct the template"
        )
    return frozenset(found["variables"])


def _try(kind: str, what: str) -> dict[str, Any]:
    """Return what a child process found; under "problem" what is wrong with what it tried."""
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    memory = MEMORY_BYTES[kind]
    limits = [str(CPU_SECONDS), str(memory)]
    try:
        found = subprocess.run(
            [sys.executable, "-P", "-m", "stages.probe", kind, *limits],
            input=what,
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"it did not end within {WALL_SECONDS} s"}
    if found.returncode == 0:
        answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return answer
    if found.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        problem = f"it did not end within {CPU_SECONDS} s of processor time and {memory >> 30} GiB of memory"
    else:
        last = (found.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        problem = f"its process ended with status {found.returncode} ({last:.200})"
    return {"problem": problem}


def main(kind: str, cpu_seconds: str, memory_bytes: str) -> None:
    """Try what stands on standard input, and print what was found as a line of JSON."""
    what = json.load(sys.stdin)
    try:
        found = _try_here(kind, what, int(cpu_seconds), int(memory_bytes))
    except MemoryError:
        found = {"problem": f"it needs more than {int(memory_bytes) >> 30} GiB of memory"}
    print(json.dumps(found))


def _try_here(kind: str, what: Any, cpu_seconds: int, memory_bytes: int) -> dict[str, Any]:
    if kind == "task":
        from stages.rewards.answers.reasoning_gym_tasks import import_reasoning_gym
        from stages.sources import SourceConfig, generated_rows

        import_reasoning_gym()
        _limit(cpu_seconds, memory_bytes)
        try:
            next(generated_rows(SourceConfig.model_validate(what), seed=0))
        except SourceError as error:
            return {"problem": str(error)}
        return {}
    from jinja2.meta import find_undeclared_variables

    template, variables, special, messages = what
    environment, text = _environment(), GENERATION.sub("", template)
    _limit(cpu_seconds, memory_bytes)
    try:
        read = find_undeclared_variables(environment.parse(text))  # which calculates the template's constants
    except MemoryError:
        raise
    except Exception as error:  # a template nested too deep ends in a RecursionError
        return {"no_template": f"{type(error).__name__}: {error!s:.300}"}
    try:
        written = environment.from_string(text).render(
            messages=messages, add_generation_prompt=True, **{**special, **variables}
        )
    except MemoryError:
        raise
    except Exception:  # the caller renders it again, and tells what transformers says
        written = ""
    if len(written) > MOST_CHARACTERS:
        return {"problem": f"it writes {len(written):,} characters for one, at most {MOST_CHARACTERS:,} are read"}
    return {"variables": sorted(read)}


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds
    for kind, value in ((resource.RLIMIT_CPU, end), (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        most = resource.getrlimit(kind)[1]  # of the caller's process, which nobody may exceed
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (bound, bound))


def _environment() -> Any:
    """Return jinja's environment as transformers sets it."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda _: "2026-01-01")
    return environment


if __name__ == "__main__":
    main(*sys.argv[1:])
