"""Reading what a stranger may have written: names, kinds of files, JSON, and the footers of Parquet."""

import ast
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import parquet
from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactDamaged, ArtifactTooLarge, SchemaError
from pipeline.manifest import parse_manifest
from pipeline.parquet import check_parts
from pipeline.reading import inside, is_plain, open_regular, parse_json, read_json
from pipeline.schema import SCHEMAS
from tests.builders import reward_rows, write_artifact
from tests.hostile import NAMES, write_bomb, write_manifest
from tests.manifests import manifest_of

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ("part-00000.parquet", "1_Pooling/config.json", "..config", "ä b.json", "manifest.json", ".store.json")


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_path_below_the_folder_is_a_name(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize("name", [*NAMES, "c:\\x", "C:", 5, None])
def test_nothing_else_is(name: Any) -> None:
    assert is_plain(name) == (name in ("manifest.json", ".store.json", "pruned.json", "sub/model.safetensors"))


def test_what_is_written_or_deleted_lies_inside_and_behind_no_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / "real").mkdir(parents=True)
    (tmp_path / "run" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "run" / "file").symlink_to(tmp_path / "outside" / "x")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    assert inside(tmp_path / "alias", "real/x") == tmp_path / "alias" / "real" / "x"
    for name in ("linked/x", "file", "../outside/x"):
        with pytest.raises(ArtifactDamaged, match=f"'{name}' leads out of"):
            inside(tmp_path / "run", name)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket", "link to a device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    with socket.socket(socket.AF_UNIX) as open_socket:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            open_socket.bind(str(path))
        elif kind == "device":
            path = Path("/dev/zero")
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(OSError, match=r"no regular file|No such device|Is a directory"):
            open_regular(path)
        with pytest.raises(ArtifactDamaged, match=r"cannot be read \(.*\): restore it"):
            read_json(path, "restore it")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested deeper than 64"),
        (b'{"x": [NaN]}', "it holds NaN, expected a finite number"),
        (b"-Infinity", "it holds -Infinity"),
        (b"1e999", "it holds 1e999"),
        (b'{"\\ud800": 1}', "surrogates"),
        (b'["\\ud800"]', "surrogates"),
        (b"1" * 10_000, "4300 digits"),
        (b"\xff", "decode"),
        (b"{", "Expecting"),
    ],
)
def test_json_that_python_cannot_hold_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_a_json_file_has_a_largest_size_and_one_kind(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"[1, 2]" + b" " * 100)
    assert read_json(tmp_path / "x.json", "", kind=list, most_bytes=106) == [1, 2]
    with pytest.raises(ArtifactDamaged, match="more than 105 bytes"):
        read_json(tmp_path / "x.json", "", kind=list, most_bytes=105)
    with pytest.raises(ArtifactDamaged, match="holds a list, expected a dict"):
        read_json(tmp_path / "x.json", "")


FIELDS: list[tuple[str, Any]] = [
    ("files", {name: {"rows": None, "bytes": 1, "sha256": "f" * 64}}) for name in NAMES if not is_plain(name)
] + [
    (name, value)
    for name, values in {
        "manifest_version": [None, "2", 2.0, True],
        "stage": [None, 1, ["score"]],
        "stage_version": [-1, 1.0, True, "1", 2**60],
        "dataset": [None, {}],
        "config": [None, [], "x"],
        "chosen": [None, []],
        "inputs": [None, [], {"x": 1}, {"x": {"path": 1, "digest": "f" * 64}},
                   {"x": {"path": "\x00", "digest": "f" * 64}}, {"x": {"path": "..", "digest": "F" * 64}},
                   {"x": {"path": ".."}}],
        "files": [None, [], {"x": None}, {"x": {"rows": -1, "bytes": 1, "sha256": "f" * 64}},
                  {"x": {"rows": 1, "bytes": True, "sha256": "f" * 64}},
                  {"x": {"rows": 1, "bytes": 1, "sha256": None}}],
        "rows": ["1", -1, 1.5, 2**70],
        "drops": [None, {"x": "1"}, {"x": -1}],
        "environment": [None, []],
        "started_at": [None, 5],
        "seconds": [None, "1", float("nan"), float("inf")],
        "recipe": [None, "", "x" * 64],
        "content": [5, "f" * 63],
        "digest": [None, "\n" + "f" * 64],
    }.items()
    for value in values
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda item: repr(item)[:40])
def test_every_field_of_a_manifest_is_of_its_kind(tmp_path: Path, name: str, value: Any) -> None:
    write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0]))
    manifest = manifest_of(tmp_path / "rewards")
    parse_manifest(dict(manifest))
    manifest[name] = value
    if name not in ("recipe", "content", "digest"):
        write_manifest(tmp_path / "rewards", manifest)  # its hashes fit
    else:
        (tmp_path / "rewards" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"not of its kind|no name of a file"):
        parse_manifest(manifest)
    with pytest.raises(ArtifactDamaged, match="manifest"):
        open_artifact(tmp_path / "rewards")


def write_rows(place: Path, **lists: list[float | None]) -> Path:
    """Write rewards and return their part."""
    return write_artifact(place, "rewards", reward_rows(**lists)).files()[0]


@pytest.mark.parametrize("how", ["rows", "texts"])
def test_rows_that_would_fill_the_memory_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(parquet, "MOST_BYTES", 1_000_000)
    monkeypatch.setattr(parquet, "MOST_OF_MEMORY", 1 << 40)
    write_rows(tmp_path / "iterations" / "0" / "rewards", a=[1.0])
    place = tmp_path / "iterations" / "0" / "rewards"
    write_bomb(place, how, 20_000)
    assert sum(path.stat().st_size for path in place.glob("*.parquet")) < 25_000
    with pytest.raises(ArtifactTooLarge, match=r"would take [\d,]+ bytes of memory or more, .* with more memory"):
        open_artifact(place).scan()


def test_rows_that_take_room_on_the_disk_are_read_whatever_they_take_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MOST_BYTES", 1_000)
    monkeypatch.setattr(parquet, "MOST_OF_MEMORY", 1 << 40)
    assert write_artifact(tmp_path / "x", "rewards", reward_rows(a=[0.5, None])).read().height == 2


def test_parts_that_are_small_are_read_though_their_dictionaries_might_hold_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        write_rows(tmp_path / str(index), **{f"group {index}": [float(n) for n in range(400)]}) for index in (0, 1)
    ]
    monkeypatch.setattr(parquet, "MOST_OF_MEMORY", 1 << 40)
    monkeypatch.setattr(parquet, "MOST_OF_FILES", 0)
    bound = sum(parquet._most_decoded(pq.read_metadata(parts[0])).values())
    true = pl.read_parquet(parts).estimated_size()
    assert true < bound / 5
    monkeypatch.setattr(parquet, "MOST_BYTES", bound + 1)  # one part is surely within, two might not be
    check_parts(dict.fromkeys(parts, 400))
    monkeypatch.setattr(parquet, "MOST_BYTES", true // 2)
    with pytest.raises(ArtifactTooLarge):
        check_parts(dict.fromkeys(parts, 400))


def test_large_groups_and_long_texts_are_read(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, *[None] * 2_999]
    rows = reward_rows(a=[1.0] * 3_000).with_columns(detail=pl.Series(texts, dtype=pl.String))
    assert write_artifact(tmp_path / "x", "rewards", rows).read()["detail"].str.len_bytes().sum() == 3_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1", "cannot be read"),
        (lambda data: data[:40] + b"PAR1", "cannot be read"),
        (lambda data: b"\x00" * len(data), "cannot be read"),
    ],
)
def test_a_footer_that_is_none_is_one_clear_error(tmp_path: Path, change: Any, message: str) -> None:
    path = write_rows(tmp_path / "rewards", a=[1.0])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactDamaged, match=rf"part-00000\.parquet {message} \(.*no Parquet file of this program"):
        check_parts({path: 1})


def test_rows_are_as_many_as_the_manifest_says_and_columns_of_their_type(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rewards", a=[1.0, 0.5])
    with pytest.raises(ArtifactDamaged, match="has 2 rows, its manifest says 3"):
        check_parts({path: 3})
    for rewards in (pa.array([1, 2]), pa.array([[1.0], None])):
        table = pq.read_table(path)
        other = table.set_column(table.column_names.index("reward"), "reward", rewards)
        pq.write_table(other, path)
        with pytest.raises(SchemaError, match="has reward of type"):
            check_parts({path: 2}, SCHEMAS["rewards"])
        pq.write_table(table, path)
    with_nulls = table.set_column(0, table.column_names[0], pa.array([None, "x"]))
    pq.write_table(with_nulls, path)
    with pytest.raises(SchemaError, match=f"has {table.column_names[0]} of type string with nulls, expected string:"):
        check_parts({path: 2}, SCHEMAS["rewards"])


OPENING = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "loads", "load", "rmtree", "symlink_to"}
"""Functions and methods that follow a link, wait for a pipe, or read without a limit."""
PLACES = {
    "pipeline/config.py": {"read_bytes", "loads"},  # the user's own config
    "pipeline/files.py": {"open", "write_text", "rmtree"},  # exclusive, or without following
    "pipeline/processes.py": {"open"},  # without following
    "pipeline/provenance.py": {"read_text"},  # /proc
    "pipeline/reading.py": {"open", "loads"},  # the checks themselves
    "pipeline/stage.py": {"open"},  # ArtifactWriter.open
    "pipeline/store_lock.py": {"read_text"},  # our own working copy
    "pipeline/working_copy.py": {"write_bytes"},  # a temporary file of atomic_write
    "pipeline/writer.py": {"write_text"},  # a new directory
    "pipeline/wire.py": {"loads"},  # what a worker of ours sends, within its own limits
    "pipeline/lineage.py": {"open"},  # RunDir.open
    "pipeline/run_dir.py": {"open"},  # RunDir.open
}


def test_what_a_run_brings_is_read_and_written_in_few_places() -> None:
    """A new place is looked at by whoever adds it here; elsewhere `pipeline.reading` and `pipeline.files` serve."""
    found = {}
    for path in sorted((ROOT / "pipeline").glob("*.py")):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {c.attr for c in calls if isinstance(c, ast.Attribute)}  # a bare write_text is ours
        found[f"pipeline/{path.name}"] = names & OPENING
    assert {name: calls for name, calls in found.items() if calls != PLACES.get(name, set())} == {}


def test_looks_parse_no_json_of_their_own() -> None:
    parsing = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "stages" / "inspect").rglob("*.py")
        if {"json.loads(", "json.load(", ".read_text("}
        & set(re.findall(r"json\.loads?\(|\.read_text\(", path.read_text()))
    ]
    assert parsing == []
