"""Object stores for tests: a server that speaks S3, machines, and small runs whose answers are scripted."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import s3fs
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from flows.session import Session
from pipeline.object_store import open_store
from pipeline.run_dir import RunDir
from pipeline.runs import lock, run_at
from stages.config import RunConfig, load_config
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from stages.inspect.metrics import append_metrics, iteration_metrics, recorded_metrics
from tests.policies import EOS
from tests.small_run import CONFIG, DIGIT_0, EXACT, perform_iteration

ROWS = '{"question": "1 + 1 =", "answer": "2"}\n{"question": "0 + 2 =", "answer": "2"}\n'
COMPLETIONS = "iterations/000000/completions"
PART = f"{COMPLETIONS}/part-00000.parquet"


def answer(request: Request) -> list[int]:
    """Answer 2 or 3, as the request's seed says: the same in whichever process."""
    return [DIGIT_0 + 2 + request.seed % 2, EOS]


@contextmanager
def s3_server() -> Iterator[None]:
    """Offer an S3 server with one bucket to this process."""
    with pytest.MonkeyPatch.context() as environment:
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            environment.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)
        yield
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def small_config(folder: Path, policy: str, source: str) -> RunConfig:
    (folder / "config.toml").write_text(CONFIG.format(policy=policy, source=source, iterations=2, function=EXACT))
    return load_config(folder / "config.toml")


def new_machine(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be on a machine with its own, empty working copies."""
    monkeypatch.setenv("GRPO_WORK", str(work))


def start(
    where: str | Path, config: RunConfig, iterations: int = 1, before_work: Callable[[], None] = lambda: None
) -> RunDir:
    """Do what `grpo run` does, with scripted answers; return the run."""
    run = run_at(where)
    with lock(run), closing(Session(config, run, _engine=ScriptedEngine(answer))) as session:
        before_work()
        run.record_config("", config.model_dump(mode="json"))
        session.initial_policy()
        for index in range(iterations):
            perform_iteration(session, index)
            if recorded_metrics(run, index) is None:
                append_metrics(run, iteration_metrics(run, index, pass_threshold=1.0))
    return run


def files(run: RunDir) -> dict[str, Path]:
    found = [p for p in run.root.rglob("*") if p.is_file() and p.name != ".lock" and "logs" not in p.parts]
    return {p.relative_to(run.root).as_posix(): p for p in found}


def copy(run: RunDir, url: str, *, iterations: int = 1) -> dict[str, str]:
    """Copy a local run to a store as any tool would, up to an iteration; return its digests."""
    late = [f"iterations/{index:06d}" for index in range(iterations, 2)]
    names = {n: p for n, p in files(run).items() if not n.startswith(tuple(late))}
    for name, path in names.items():
        open_store(url).upload(path, name)
    return {n: d for n, d in digests(run).items() if f"{n}/manifest.json" in names}


def digests(run: RunDir) -> dict[str, str]:
    return {a.path.relative_to(run.root).as_posix(): a.digest for a in run.artifacts()}


def objects(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return store.read(list(store.listing()))


def overwrite(url: str, name: str, data: bytes) -> None:
    open_store(url).write(name, data)
