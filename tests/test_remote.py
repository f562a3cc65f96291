"""URLs: what lies there, who may write there, and what is said when they are wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3fs

from pipeline import object_store, store_lock
from pipeline.errors import ArtifactMissing, StoreError, UsageError
from pipeline.object_store import open_store
from pipeline.owner import this_process
from pipeline.run_dir import RunDir
from pipeline.runs import lock, open_run, run_at
from stages.config import RunConfig
from stages.sources import SourceConfig, first_row
from tests.stores import PART, ROWS, copy, digests, new_machine, objects, overwrite, small_config, start

ROOT = Path(__file__).parent.parent


def test_a_second_writer_on_another_machine_is_refused(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{base}/demo"
    with lock(run_at(url)):
        new_machine(tmp_path / "other", monkeypatch)
        message = rf"another process is writing {url} \(pid {os.getpid()} on .*; seen \d+ seconds ago\)"
        with pytest.raises(UsageError, match=message), lock(run_at(url)):
            pass
    with lock(run_at(url)):
        pass


def test_a_second_writer_on_this_machine_is_refused(base: str) -> None:
    message = rf"another process is writing {base}/demo \(pid {os.getpid()} on "
    with lock(run_at(f"{base}/demo")), pytest.raises(UsageError, match=message), lock(run_at(f"{base}/demo")):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_here_at_once_and_elsewhere_when_its_lease_ends(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{base}/demo"
    with lock(run_at(url)):
        left = objects(url)["lock.json"]
    overwrite(url, "lock.json", left)
    with lock(run_at(url)):
        pass
    overwrite(url, "lock.json", left)
    new_machine(tmp_path / "other", monkeypatch)
    with pytest.raises(UsageError), lock(run_at(url)):
        pass
    long_ago = json.loads(left) | {"renewed_at": json.loads(left)["renewed_at"] - store_lock.LEASE_SECONDS}
    overwrite(url, "lock.json", json.dumps(long_ago).encode())
    with lock(run_at(url)):
        pass
    assert "lock.json" not in objects(url)


def test_one_who_has_lost_the_lock_publishes_nothing(base: str, config: RunConfig) -> None:
    url = f"{base}/demo"
    elsewhere = json.dumps({"owner": "elsewhere/1", "process": this_process(), "renewed_at": 4e9}).encode()
    with pytest.raises(UsageError, match="another process is writing"):
        start(url, config, before_work=lambda: overwrite(url, "lock.json", elsewhere))
    assert sorted(objects(url)) == ["lock.json"]


def test_the_lock_is_renewed_while_it_is_held(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "RENEW_SECONDS", 0.01)
    with lock(run_at(f"{base}/demo")):
        first = objects(f"{base}/demo")["lock.json"]
        for _ in range(10_000):
            if objects(f"{base}/demo").get("lock.json", first) != first:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the lock was not renewed")


def test_source_and_checkpoint_at_a_url_give_what_their_copies_give(
    base: str, local: RunDir, tiny_policy: Path, tmp_path: Path
) -> None:
    store = open_store(base)
    store.write("rows.jsonl", ROWS.encode())
    for path in tiny_policy.iterdir():
        store.upload(path, f"checkpoint/{path.name}")
    store.write("checkpoint/pytorch_model.bin", b"a pickle, which nobody asks for")
    run = start(tmp_path / "runs" / "urls", small_config(tmp_path, f"{base}/checkpoint", f"{base}/rows.jsonl"))
    assert digests(run)["initial_policy"] == digests(local)["initial_policy"]
    drawn = run.open(0, "prompts")
    assert sorted(drawn.read()["reference_answer"]) == ["2", "2"]
    of_the_file = local.open(0, "prompts").manifest.config["source_sha256"]
    assert drawn.manifest.config["source_sha256"] == of_the_file
    assert list((tmp_path / "work").rglob("pytorch_model.bin")) == []


def test_a_source_that_changed_on_the_store_is_downloaded_again_by_a_new_process(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite(base, "rows.csv", b"question\n1\n")
    assert object_store.download_file(f"{base}/rows.csv").read_bytes() == b"question\n1\n"
    overwrite(base, "rows.csv", b"question\n2\n")
    assert object_store.download_file(f"{base}/rows.csv").read_bytes() == b"question\n1\n"
    object_store._download_file.cache_clear()
    assert object_store.download_file(f"{base}/rows.csv").read_bytes() == b"question\n2\n"


def test_a_missing_run_is_named_by_its_url(base: str) -> None:
    with pytest.raises(ArtifactMissing, match=f"{base}/nothing is not a run"):
        open_run(f"{base}/nothing")


def test_a_file_url_is_a_local_run(tmp_path: Path, config: RunConfig) -> None:
    run = start(f"file://{tmp_path}/runs/demo", config)
    assert (tmp_path / "runs" / "demo" / PART).is_file()
    assert run.copy is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket/runs/demo", r"s3://no-such-bucket/runs/demo .*: create the bucket, or correct the URL"),
        ("gs://bucket/demo", "gs://bucket/demo cannot be opened .*: pip install gcsfs"),
        ("s4://bucket/demo", "s4://bucket/demo cannot be opened .*: expected a protocol that fsspec knows"),
        ("s3://", "s3:// names no place on a store: expected a URL like s3://bucket/runs/demo"),
        ("s3://bucket/../other", "names no place"),
    ],
)
@pytest.mark.usefixtures("server")
def test_a_wrong_url_is_one_clear_error(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_machine(tmp_path, monkeypatch)
    with pytest.raises((StoreError, UsageError), match=message):
        run_at(url)


@pytest.mark.usefixtures("server")
def test_no_credentials_and_no_network_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_machine(tmp_path, monkeypatch)
    try:
        with monkeypatch.context() as changed:
            s3fs.S3FileSystem.clear_instance_cache()
            changed.delenv("AWS_ACCESS_KEY_ID")
            changed.delenv("AWS_SECRET_ACCESS_KEY")
            changed.setenv("HOME", str(tmp_path))
            with pytest.raises(StoreError, match=r"s3://bucket/demo .*: set credentials .*AWS_ACCESS_KEY_ID"):
                run_at("s3://bucket/demo")
        with monkeypatch.context() as changed:
            s3fs.S3FileSystem.clear_instance_cache()
            changed.setattr(s3fs.S3FileSystem, "retries", 1)
            changed.setenv("AWS_MAX_ATTEMPTS", "1")
            changed.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            with pytest.raises(
                StoreError, match=r"s3://bucket/demo .*: check the URL, the network, .*AWS_ENDPOINT_URL"
            ):
                run_at("s3://bucket/demo")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_source_that_is_not_there_is_a_clear_error(base: str) -> None:
    with pytest.raises(StoreError, match=f"{base}/rows.jsonl does not exist"):
        first_row(SourceConfig(source=f"{base}/rows.jsonl"))


@pytest.mark.usefixtures("server")
def test_the_command_line_takes_urls(local: RunDir, tmp_path: Path) -> None:
    url = "s3://bucket/command-line/demo"
    copy(local, url)

    def grpo(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        environment = {**os.environ, "GRPO_WORK": str(tmp_path)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    listed = grpo("ls", "s3://bucket/command-line", "--format", "csv")
    assert listed.stdout.splitlines()[1].startswith(f"{url},1,1,")
    wrong = grpo("show", "s3://bucket/command-line/nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines()[0].startswith("error: s3://bucket/command-line/nothing is not a run")


def test_local_work_imports_no_storage_client() -> None:
    code = (
        "import sys, pathlib, flows.cli, flows.commands.show, stages.wiring; from pipeline.runs import run_at; "
        "run_at(pathlib.Path('x')); print([m for m in ('fsspec', 's3fs', 'pipeline.working_copy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
