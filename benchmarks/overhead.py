"""Measures what a run costs beside sampling and training: the price of having every step on disk.

    python benchmarks/overhead.py configs/demo.toml --iterations 8
    python benchmarks/overhead.py configs/demo.toml --iterations 4 --model-size 60M

Runs the train flow in this process, with clocks around the functions that do the work, the files and the hashes; the
product itself is not changed. Times are exclusive: what a clock inside another one measures counts there only, so the
kinds add up to the wall time of the iterations. Only the flow's own thread is clocked: what runs beside it costs what
it slows the others, and the time that the flow waits for it ("beside"). The first iterations (imports, warm-up) and the
last one (the run's end) are left out.

`--model-size` puts a random Qwen2 model of about that size, with the tokenizer of the config's policy (or of the run's
starter), in place of the policy. Such a model earns nothing on a real task, so its answers get a reward that merely
differs between them, lest the update have nothing to train on.

Prints the shares of an iteration by kind, then milliseconds by stage and kind: the median over the iterations, and for
the shares the sum over the sum. With `--format json` the same as one JSON object. On a machine that others use too,
`--cpu` gives figures that can be repeated; waiting, for the engine or for the device, does not count in them.
"""

import argparse
import functools
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.environment import prepare_environment

SAMPLING, TRAINING = "engine.generate", "train_on_batches"
OTHER, BESIDE = "other", "beside"
KINDS = (
    SAMPLING,
    TRAINING,
    "engine.load",
    "checkpoint",
    "Parquet",
    "hashing",
    "fsync",
    "artifacts",
    "Prefect",
    BESIDE,
    OTHER,
)
LEGEND = {
    SAMPLING: "vLLM, the requests' way there and back included",
    TRAINING: "torch",
    "engine.load": "exchange of the engine's weights",
    "checkpoint": "weights, optimizer and tokenizer to their files",
    "Parquet": "write (schema check included) and read",
    "hashing": "SHA-256 of files, when written and when first read",
    "fsync": "waiting for the device",
    "artifacts": "manifests, recipes, look-ups, renames",
    "Prefect": "a task's state changes",
    BESIDE: "waiting for background tasks: prompts, optimizer, metrics",
    OTHER: "the stages' own work and what is in no other kind",
}


class Clock:
    """Adds up exclusive times by stage and kind; one thread only."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.thread = threading.get_ident()
        self.stack: list[str] = [OTHER]
        self.stages: list[str] = ["between"]
        self.mark = read()
        self.spent: dict[tuple[str, str], float] = defaultdict(float)
        self.iterations: list[dict[tuple[str, str], float]] = []
        self.has_begun = False

    def settle(self) -> None:
        """Book the time since the last change."""
        now = self.read()
        self.spent[self.stages[-1], self.stack[-1]] += now - self.mark
        self.mark = now

    @contextmanager
    def during(self, kind: str, stage: str | None = None) -> Iterator[None]:
        """Book what happens inside under this kind, and under this stage if one is given."""
        if threading.get_ident() != self.thread:
            yield
            return
        self.settle()
        self.stack.append(kind)
        self.stages.append(stage or self.stages[-1])
        try:
            yield
        finally:
            self.settle()
            self.stack.pop()
            self.stages.pop()

    def around(self, function: Callable[..., Any], kind: str, stage: str | None = None) -> Callable[..., Any]:
        """Return the function with this clock around it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during(kind, stage):
                return function(*args, **kwargs)

        return timed

    def begin_iteration(self) -> None:
        """Put the times since the last beginning away as those of one iteration."""
        self.settle()
        if self.has_begun:
            self.iterations.append(dict(self.spent))
            print(f"iteration {len(self.iterations) - 1}: {sum(self.spent.values()):.3f} s", file=sys.stderr)
        self.has_begun = True
        self.spent.clear()


def install(clock: Clock) -> None:
    """Put clocks around the product's functions, wherever their names have been imported."""
    import flows.session
    import flows.training
    import grpo.policy
    import grpo.train_step
    import pipeline.artifact
    import pipeline.run_dir
    import pipeline.stage
    import stages.optimizer
    import stages.policy
    import stages.update
    import stages.wiring
    from flows.background import Background
    from flows.flow_runs import PrefectWork
    from flows.session import Session
    from pipeline.artifact import Artifact
    from pipeline.writer import ArtifactWriter
    from stages.engines.process import EngineProcess

    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in {"flows", "stages", "pipeline", "grpo"}
    ]

    def replace(original: Callable[..., Any], kind: str, stage: str | None = None) -> None:
        timed = clock.around(original, kind, stage)
        for module in modules:
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, timed)

    def replace_method(owner: type, name: str, kind: str, stage: str | None = None) -> None:
        setattr(owner, name, clock.around(getattr(owner, name), kind, stage))

    replace_method(EngineProcess, "generate", SAMPLING)
    replace_method(EngineProcess, "load", "engine.load")
    replace(grpo.train_step.train_on_batches, TRAINING)
    for function in (grpo.policy.save_policy, grpo.optimizer.save_optimizer, stages.checkpoints.copy_tokenizer):
        replace(function, "checkpoint")
    replace_method(ArtifactWriter, "write_part", "Parquet")
    replace_method(Artifact, "read", "Parquet")
    replace(pipeline.writer._count, "Parquet")
    replace(pipeline.files.sha256_file, "hashing")
    replace(pipeline.files.sync_file, "fsync")
    replace_method(ArtifactWriter, "seal", "artifacts")
    replace_method(ArtifactWriter, "open", "artifacts")
    replace(pipeline.artifact.open_artifact, "artifacts")
    replace(pipeline.artifact._verify, "artifacts")
    replace(pipeline.stage.find_finished, "artifacts")
    perform, make_task = Session.perform, PrefectWork.task

    def timed_perform(session: Session, name: str, iteration: int) -> Any:
        with clock.during(OTHER, name):
            return perform(session, name, iteration)

    def timed_task(work: PrefectWork, name: str, run: Callable[..., str], *retries: Any) -> Any:
        task: Any = make_task(work, name, run, *retries)
        task_type = type(task)
        # what `Session.perform` leaves over
        timed = type("TimedTask", (task_type,), {"__call__": clock.around(task_type.__call__, "Prefect", name)})
        task.__class__ = timed
        return task

    Session.perform = timed_perform  # type: ignore[method-assign]
    PrefectWork.task = timed_task  # type: ignore[method-assign, assignment]
    for name in ("wait_for", "settle", "wait_for_all"):
        replace_method(Background, name, BESIDE)
    train_iteration = flows.training.train_iteration

    def timed_iteration(*args: Any) -> bool:
        clock.begin_iteration()
        return train_iteration(*args)

    flows.training.train_iteration = timed_iteration


def random_checkpoint(size: str, tokenizer: Path, vocab_size: int, directory: Path) -> int:
    """Write a random Qwen2 model of about ``size`` parameters with a copy of the tokenizer; return its true size."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from stages.checkpoints import copy_tokenizer, load_tokenizer

    wanted = float(size[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[size[-1].upper()]
    num_layers, head = 12, 64
    # a layer has 4 h^2 weights of attention and 3 * 8/3 h^2 of the MLP; the embedding is shared with the head
    hidden = (-vocab_size + (vocab_size**2 + 4 * 12 * num_layers * wanted) ** 0.5) / (2 * 12 * num_layers)
    hidden = max(round(hidden / head), 1) * head
    eos = load_tokenizer(tokenizer).eos_token_id
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // head * head,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden // head,
            num_key_value_heads=hidden // head,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=eos,
            bos_token_id=None,
        )
    )
    model.save_pretrained(directory)
    copy_tokenizer(tokenizer, directory)
    return sum(parameter.numel() for parameter in model.parameters())


def without_starter(config: Any, path: Path) -> None:
    """Write the config's settings, less the starter, as TOML."""

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
        return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)

    tables = config.model_dump(mode="json", exclude={"starter"}, exclude_unset=True, exclude_none=True)
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in tables.items()), encoding="utf-8")


def distinct_share(completion: str) -> float:
    """Return the share of distinct characters: a reward that differs between answers of a random model."""
    return len(set(completion)) / max(len(completion), 1)


def report(clock: Clock, warm_up: int, num_trained: list[int], title: str) -> dict[str, Any]:
    """Return the figures of the iterations after the warm-up."""
    measured = clock.iterations[warm_up:]
    walls = [sum(iteration.values()) for iteration in measured]

    def figures(wanted: Callable[[str, str], bool]) -> dict[str, float]:
        sums = [sum(s for key, s in iteration.items() if wanted(*key)) for iteration in measured]
        return {"milliseconds": 1000 * statistics.median(sums), "share": sum(sums) / sum(walls)}

    cells = sorted({key for iteration in measured for key in iteration})
    stages = list(dict.fromkeys(stage for stage, _ in cells))
    return {
        "title": title,
        "iterations": len(measured),
        "rows_trained": statistics.median(num_trained[warm_up : len(clock.iterations)]),
        "wall_milliseconds": 1000 * statistics.median(walls),
        "kinds": {kind: figures(lambda _, k, kind=kind: k == kind) for kind in KINDS},
        "outside": figures(lambda _, k: k not in (SAMPLING, TRAINING)),
        "stages": {
            stage: {kind: figures(lambda s, k, stage=stage, kind=kind: (s, k) == (stage, kind)) for kind in KINDS}
            for stage in stages
        },
    }


def print_report(figures: dict[str, Any]) -> None:
    print(f"{figures['title']}; {figures['iterations']} iterations after the warm-up,", end=" ")
    print(f"{figures['wall_milliseconds']:.0f} ms each, {figures['rows_trained']:.0f} rows trained (medians)\n")
    for kind, cell in figures["kinds"].items():
        print(f"{kind:18} {cell['milliseconds']:9.1f} ms {100 * cell['share']:6.2f} %   {LEGEND[kind]}")
    outside = figures["outside"]
    print(f"{'outside of both':18} {outside['milliseconds']:9.1f} ms {100 * outside['share']:6.2f} %\n")
    print(f"{'ms by stage':17}" + "".join(f"{kind:>17}" for kind in KINDS))
    for stage, row in figures["stages"].items():
        print(f"{stage:17}" + "".join(f"{cell['milliseconds']:17.1f}" for cell in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="iterations left out; default 2")
    parser.add_argument("--model-size", metavar="SIZE", help="a random model of about this size instead, e.g. 60M")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of that model")
    parser.add_argument("--cpu", action="store_true", help="processor time of the main thread instead of wall time")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run", type=Path, help="run directory, kept; default: a temporary one")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    if arguments.iterations <= arguments.warm_up:
        parser.error("--iterations must be more than --warm-up")
    sys.path.insert(0, "")  # reward functions are found in the current directory, as with `grpo run`
    prepare_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that engine, server and scratch folder end with us
    with tempfile.TemporaryDirectory(prefix="grpo-overhead-") as scratch:
        figures = measure(arguments, Path(scratch))
    if arguments.format == "json":
        print(json.dumps(figures, indent=2))
    else:
        print_report(figures)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run the flow with clocks; return the figures."""
    from flows.prefect_server import prefect_server
    from flows.train import train
    from pipeline.run_dir import RunDir
    from pipeline.stage import silent
    from stages.config import load_config
    from stages.starter.starter import make_starter

    path, overrides = arguments.config, [*arguments.overrides, f"iterations={arguments.iterations + 1}"]
    config = load_config(path, overrides)
    title = f"{path.name}, {config.policy.model}"
    if arguments.model_size:
        tokenizer = Path(config.policy.model)
        if config.starter is not None:
            tokenizer = make_starter(config, scratch / "runs" / "starters", silent).main.path
        size = random_checkpoint(arguments.model_size, tokenizer, arguments.vocab_size, scratch / "model")
        title = f"{path.name}, random Qwen2 of {size / 1e6:.1f}M parameters"
        path = scratch / path.name
        without_starter(config, path)
        reward = {"name": config.score.rewards[0].name, "function": f"{Path(__file__).stem}:distinct_share"}
        rewards = ", ".join(f"{key} = {json.dumps(value)}" for key, value in reward.items())
        overrides = [f"policy.model={json.dumps(str(scratch / 'model'))}", f"score.rewards=[{{{rewards}}}]"]
    clock = Clock(time.thread_time if arguments.cpu else time.perf_counter)
    install(clock)
    run = (arguments.run or scratch / "runs" / "overhead").resolve()
    if run.exists():
        raise SystemExit(f"{run} exists: name another directory")
    with prefect_server() as wait_for_server:
        wait_for_server()
        train(config=str(path.resolve()), run=str(run), overrides=overrides)
    num_trained = RunDir(run).read_metrics()["num_trained"].to_list()
    return report(clock, arguments.warm_up, num_trained, title)


if __name__ == "__main__":
    main()
