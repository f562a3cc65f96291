"""Runs on object stores: the same digests as local ones, nothing half there, nothing damaged."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from flows.commands.groups import groups
from flows.commands.ls import ls
from flows.commands.metrics import metrics
from flows.commands.rows import rows
from flows.commands.show import show
from flows.printing import Format
from flows.session import Session
from pipeline.artifact import store_url
from pipeline.errors import ArtifactDamaged, ArtifactMissing, StoreError, StoreUnreachable, UsageError
from pipeline.manifest import is_finished
from pipeline.object_store import Listed, Store, open_store
from pipeline.reading import JSON_BYTES
from pipeline.run_dir import RunDir
from pipeline.runs import beside, lock, open_run, run_at, share
from pipeline.working_copy import bring
from stages.config import RunConfig
from stages.inspect.verify.verify import verify_run
from tests.builders import reward_rows, write_artifact
from tests.policies import EOS
from tests.stores import (
    COMPLETIONS,
    DIGIT_0,
    PART,
    copy,
    digests,
    files,
    new_machine,
    objects,
    overwrite,
    start,
)


@pytest.fixture(scope="module", params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def remote(
    request: pytest.FixtureRequest, config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, str]:
    """Return a run of two iterations that a machine has made on a store, and its URL; not to be changed."""
    if request.param == "s3":
        request.getfixturevalue("server")
    folder = tmp_path_factory.mktemp("remote")
    url = f"{request.param}://bucket/{folder.name}/runs/demo"
    with pytest.MonkeyPatch.context() as machine:
        new_machine(folder / "work", machine)
        return start(url, config, iterations=2), url


def test_a_run_on_a_store_has_the_digests_of_a_local_one(remote: tuple[RunDir, str], local: RunDir) -> None:
    run, _ = remote
    assert len(digests(local)) == 19
    assert digests(run) == digests(local)


def test_the_objects_are_the_files_of_a_local_run(remote: tuple[RunDir, str], local: RunDir) -> None:
    """Apart from the clock in manifests and metrics; the lock is released, and nothing hidden is published."""
    _, url = remote
    found, expected = objects(url), files(local)
    assert sorted(found) == sorted(expected)
    differ = [name for name, data in found.items() if data != expected[name].read_bytes()]
    assert {Path(name).name for name in differ} == {"manifest.json", "metrics.parquet"}


def test_the_manifest_of_an_artifact_is_written_last(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    url = f"memory://{tmp_path.name}/demo"
    start(url, config)
    written = {name: info["created"] for name, info in open_store(url).fs.find(url, detail=True).items()}
    manifests = [name for name in written if name.endswith("/manifest.json")]
    assert len(manifests) == 10
    for manifest in manifests:
        folder = manifest.removesuffix("manifest.json")
        files = [time for name, time in written.items() if name.startswith(folder) and name != manifest]
        assert max(files) <= written[manifest]
        assert files


def test_another_machine_continues_a_run(
    base: str, config: RunConfig, local: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(local, f"{base}/demo", iterations=1)
    run = start(f"{base}/demo", config, iterations=2)
    assert digests(run) == digests(local)
    assert not (run.root / PART).exists(), "finished rows are not downloaded to find that they are finished"
    new_machine(tmp_path / "third", monkeypatch)
    assert digests(open_run(f"{base}/demo")) == digests(local)


def test_looking_from_a_new_machine_writes_nothing_and_brings_what_is_asked_for(
    base: str, local: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{base}/runs/demo"
    copy(local, url)
    before = open_store(base).listing()
    ls(f"{base}/runs", Format.jsonl)
    row = json.loads(capsys.readouterr().out)
    assert (row["run"], row["iterations"], row["finished"]) == (url, 1, 1)
    ls(url, Format.jsonl)
    listed = {r["artifact"]: r["rows"] for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert listed[COMPLETIONS] == 4
    metrics(url, Format.jsonl)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["num_completions"] == 4
    root = run_at(url).root
    assert list(root.rglob("part-*")) == []
    rows(url, "completions", None, "completion_token_ids", None, 0, Format.jsonl)
    printed = [json.loads(line)["completion_token_ids"] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 4
    assert {tuple(row) for row in printed} <= {(DIGIT_0 + 2, EOS), (DIGIT_0 + 3, EOS)}
    assert [p.relative_to(root).as_posix() for p in root.rglob("part-*")] == [PART]
    groups(url, None, None, 0, Format.jsonl)
    show(url, None, None, Format.table)
    assert "reference answer: 2" in capsys.readouterr().out
    assert list(root.rglob("*.safetensors")) == []
    assert open_store(base).listing() == before


@pytest.mark.parametrize("machine", ["the same", "another"])
def test_a_publication_without_manifest_is_no_artifact_and_is_completed(
    base: str, config: RunConfig, local: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    url = f"{base}/demo"
    whole = copy(local, url)
    open_run(url).open(0, "completions").fetch()
    open_store(url).remove([f"{COMPLETIONS}/manifest.json"])
    overwrite(url, PART, b"half")
    overwrite(url, f"{COMPLETIONS}/part-00007.parquet", b"debris")
    if machine == "another":
        new_machine(tmp_path / "other", monkeypatch)
        assert not open_run(url).has(0, "completions")
    start(url, config)
    new_machine(tmp_path / "third", monkeypatch)
    again = open_run(url)
    assert digests(again) == whole
    assert again.open(0, "completions").read().height == 4
    assert f"{COMPLETIONS}/part-00007.parquet" not in objects(url)


def test_what_was_finished_here_and_not_published_is_published_by_the_next_start(
    base: str, config: RunConfig, local: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the seal and the first upload: nothing is computed again."""
    url = f"{base}/demo"
    whole = copy(local, url)
    policy = open_run(url).open(0, "policy").fetch()
    (policy / ".store.json").unlink()
    store = open_store(f"{url}/iterations/000000/policy")
    store.remove(list(store.listing()))
    written = (policy / "manifest.json").stat().st_mtime_ns
    start(url, config)
    assert (policy / "manifest.json").stat().st_mtime_ns == written
    new_machine(tmp_path / "other", monkeypatch)
    assert digests(open_run(url)) == whole


def test_what_a_failing_store_did_not_take_is_published_when_the_stage_is_tried_again(
    base: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnreachable("no network")

    run = run_at(f"{base}/demo")
    with lock(run), closing(Session(config, run)) as session:
        session.initial_policy()
        with monkeypatch.context() as patch:
            patch.setattr(Store, "upload", fail)
            with pytest.raises(StoreUnreachable):
                session.perform("prompts", 0)
        session.perform("prompts", 0)
        assert "iterations/000000/prompts/manifest.json" in objects(f"{base}/demo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"has SHA-256 \w{16}\.\.\., its manifest says"),
        (lambda data: data[:-3], r"has [\d,]+ bytes, its manifest says"),
        (None, r"is gone, but its manifest\.json lists it"),
    ],
    ids=["one bit", "truncated", "gone"],
)
def test_a_damaged_object_is_refused_with_what_to_do(base: str, local: RunDir, change: object, message: str) -> None:
    url = f"{base}/demo"
    copy(local, url)
    if callable(change):
        overwrite(url, PART, change(objects(url)[PART]))
    else:
        open_store(url).remove([PART])
    with pytest.raises(ArtifactDamaged, match=message) as caught:
        open_run(url).open(0, "completions").read()
    assert f"{url}/{PART}" in str(caught.value)
    assert f"delete everything below {url}/{COMPLETIONS} and run the same command" in str(caught.value)
    assert not (run_at(url).root / PART).exists()


def test_a_damaged_artifact_that_was_deleted_is_made_again(base: str, config: RunConfig, local: RunDir) -> None:
    url = f"{base}/demo"
    whole = copy(local, url)
    open_run(url)  # knows the artifact, has no file of it
    store = open_store(f"{url}/{COMPLETIONS}")
    store.remove(list(store.listing()))
    assert digests(start(url, config)) == whole
    assert f"{COMPLETIONS}/manifest.json" in objects(url)


def test_a_damaged_manifest_is_named_by_its_url(base: str, local: RunDir) -> None:
    url = f"{base}/demo"
    copy(local, url)
    overwrite(url, f"{COMPLETIONS}/manifest.json", b"{")
    with pytest.raises(ArtifactDamaged, match=rf"cannot be read .*working copy of {url}/{COMPLETIONS}"):
        open_run(url).open(0, "completions")


def test_an_artifact_that_another_machine_made_anew_replaces_the_working_copy(
    base: str, config: RunConfig, local: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{base}/demo"
    copy(local, url)
    open_run(url).open(0, "completions").fetch()
    changed = config.model_copy(update={"seed": 1})
    new_machine(tmp_path / "other", monkeypatch)
    store = open_store(url)
    store.remove(list(store.listing()))
    theirs = digests(start(url, changed))
    new_machine(tmp_path / "work", monkeypatch)
    assert digests(open_run(url)) == theirs
    assert open_run(url).open(0, "completions").read()["seed"].n_unique() == 4


def test_a_run_refers_to_its_neighbour_on_the_store_and_not_to_a_local_run(
    base: str, local: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(local, f"{base}/first")
    first = open_run(f"{base}/first")
    second = run_at(f"{base}/second")
    with lock(second):
        second.record_config("", {})
        second.refer(0, "completions", first.open(0, "completions"))
        with pytest.raises(UsageError, match="no other machine can see: copy that run to the store"):
            second.refer(0, "prompts", local.open(0, "prompts"))
    noted = json.loads(objects(f"{base}/second")["iterations/000000/completions.reference.json"])
    assert noted["path"] == "../../../first/iterations/000000/completions"
    new_machine(tmp_path / "other", monkeypatch)
    assert open_run(f"{base}/second").open(0, "completions").read().height == 4


def test_a_run_on_a_store_is_verified_with_its_files(base: str, local: RunDir) -> None:
    copy(local, f"{base}/demo", iterations=2)
    findings = verify_run(open_run(f"{base}/demo"))
    assert findings.problems == []
    assert findings.tallies["text"].checked > 0


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("../../../outside/manifest.json", 1, "expected plain paths"),
        ("a/../../config.toml", 1, "expected plain paths"),
        ("initial_policy/manifest.json", 10**12, "has 1,000,000,000,000 bytes, expected at most 67,108,864"),
    ],
)
def test_an_object_whose_name_leads_out_or_that_fills_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, message: str
) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    store = open_store("memory://bucket/odd/demo")
    store.write("config.resolved.json", b"{}")
    listed = {**store.listing(), name: Listed(size, "x")}
    monkeypatch.setattr(Store, "listing", lambda _: listed)
    with pytest.raises(StoreError, match=message):
        run_at(store.url)
    assert not (tmp_path / "outside").exists()


def test_a_manifest_that_is_asked_for_by_itself_has_the_same_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    store = open_store("memory://bucket/odd/large")
    store.write("manifest.json", b"x" * 101)
    monkeypatch.setattr("pipeline.object_store.RECORD_BYTES", 100)
    with pytest.raises(StoreError, match=r"odd/large/manifest\.json has 101 bytes, expected at most 100"):
        bring(store.url)


def test_a_manifest_that_is_larger_than_any_of_ours_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    store = open_store("memory://bucket/odd/long")
    store.write("manifest.json", b"x" * (JSON_BYTES + 1))
    place = bring(store.url)
    store.write("manifest.json", b'{"digest": "d"}')
    assert (bring(store.url) / "manifest.json").read_bytes() == b'{"digest": "d"}'
    assert place == store.work


def test_a_note_of_a_store_counts_in_its_working_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    for place, url, expected in (
        (tmp_path / "work" / "s3" / "b" / "x", "s3://b/x", "s3://b/x"),
        (tmp_path / "work" / "s3" / "b" / "y", "http://127.0.0.1:9/evil", None),
        (tmp_path / "run" / "x", "s3://b/x", None),
    ):
        place.mkdir(parents=True)
        (place / ".store.json").write_text(json.dumps({"url": url}))
        assert store_url(place) == expected


def test_a_local_run_refers_to_one_on_a_store_by_url_which_is_asked_only_when_the_user_named_it(
    base: str, local: RunDir, tmp_path: Path
) -> None:
    copy(local, f"{base}/first")
    second = RunDir(tmp_path / "runs" / "second")
    second.refer(0, "completions", open_run(f"{base}/first").open(0, "completions"))
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(ArtifactMissing, match=rf"without asking the network: .* `grpo ls {base}/first` once"):
        second.open(0, "completions")
    assert not (tmp_path / "work").exists()
    open_run(f"{base}/first")
    assert second.open(0, "completions").read().height == 4


def test_runs_on_a_store_share_an_artifact_and_the_first_one_wins(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines make it at the same time; their bits differ."""
    ours, run = tmp_path / "work", run_at(f"{base}/runs/demo")
    first = write_artifact(beside(run, "starters") / "abc", "rewards", reward_rows(a=[1.0]))
    new_machine(tmp_path / "other", monkeypatch)
    their_run = run_at(f"{base}/runs/demo")
    second = write_artifact(beside(their_run, "starters") / "abc", "rewards", reward_rows(a=[0.5]))
    new_machine(ours, monkeypatch)
    assert share(run, first).digest == first.digest
    new_machine(tmp_path / "other", monkeypatch)
    assert share(their_run, second).read()["reward"].to_list() == [1.0]
    new_machine(tmp_path / "third", monkeypatch)
    assert is_finished(beside(run_at(f"{base}/runs/demo"), "starters") / "abc")
