"""What a stranger could put into a run: changes of a copy, each harmless, each aimed at what lies outside of it.

`tests/test_hostile_runs.py` takes chosen ones, `benchmarks/hostile_runs.py` many with random arguments.
"""

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chain import CHECKPOINTS, DATASETS
from pipeline.conformance import conform
from pipeline.files import sha256_file, sha256_text
from pipeline.manifest import MANIFEST, STORE_NOTE
from tests.manifests import manifest_of, seal

Change = Callable[[Path, random.Random], str]
"""Changes the run at a path, and says how. Next to the run lies `outside`, whose files nobody may touch."""

OUTSIDE = "outside"
ROWS = tuple(name for name in DATASETS if name not in CHECKPOINTS)
URL = "http://127.0.0.1:9/evil"
"""Nobody answers there."""
NAMES = (
    "../../../../outside/new.txt", "/tmp/hostile-new.txt", "a/../../../../../outside/new.txt", "./part.parquet", "..",
    ".", "", "a//b", "a\\b", "C:/new.txt", "nul\x00", "new\nline", "\u202egnp.exe", "\ud800", "x" * 300,
    "manifest.json", ".store.json", "pruned.json", "sub/model.safetensors", "model.safetensors/..",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**70, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J", [], [[]], {}, {"x": []},
    {"x": {"path": "..", "digest": "f" * 64}}, ["x"], "../../..", "http://127.0.0.1:9/", 10**30,
)  # fmt: skip
DEEP = b"[" * 100_000 + b"]" * 100_000
TEXTS = (
    b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"\x00", DEEP, b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b"1" * 10_000, b"NaN", b'{"digest": 1}', b"[" + b"[]," * 3_000_000 + b"[]]", b" " * (20 << 20),
)  # fmt: skip


def write_manifest(place: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest whose hashes fit what it says, as far as it can be hashed."""
    with suppress(TypeError, AttributeError, LookupError, ValueError):
        seal(manifest)
    (place / MANIFEST).write_bytes(json.dumps(manifest).encode(errors="surrogatepass"))


def reseal(place: Path) -> None:
    """Make the manifest fit the files that it lists, then every later manifest of the run fit this one."""
    manifest = manifest_of(place)
    before = manifest["digest"]
    for name, facts in manifest["files"].items():
        path = place / name
        facts |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        if name.endswith(".parquet"):
            try:
                facts["rows"] = pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowException):
                facts["rows"] = 1
    counts = [facts["rows"] for facts in manifest["files"].values() if facts["rows"] is not None]
    manifest["rows"] = sum(counts) if counts else None
    write_manifest(place, manifest)
    replace_digest(place.parent.parent.parent, before, manifest_of(place)["digest"])


def replace_digest(root: Path, before: str, after: str) -> None:
    """Make the inputs of later artifacts name a new digest, and so on to the end of the chain."""
    for path in sorted(root.glob("iterations/*/*/manifest.json")):
        if is_plain_file(path) and before in path.read_text():
            manifest = json.loads(path.read_text())
            old = manifest["digest"]
            for facts in manifest["inputs"].values():
                facts["digest"] = after if facts["digest"] == before else facts["digest"]
            write_manifest(path.parent, manifest)
            if manifest["digest"] != old:
                replace_digest(root, old, manifest["digest"])


def any_place(root: Path, rng: random.Random, datasets: tuple[str, ...] = DATASETS) -> Path:
    """Return the place of an artifact of an iteration."""
    found = [path.parent for path in sorted(root.glob(f"iterations/*/*/{MANIFEST}")) if is_plain_file(path)]
    return rng.choice([place for place in found if place.name in datasets and all(map(is_plain_file, place.iterdir()))])


def is_plain_file(path: Path) -> bool:
    """Return whether we ourselves may open a file: an earlier change may have made a pipe or a device of it."""
    return path.is_file() and not path.is_symlink()


def name_of_a_file(root: Path, rng: random.Random) -> str:
    """A file of a manifest has a name that leads out, and a store that has it."""
    place, name = any_place(root, rng), rng.choice(NAMES)
    manifest = manifest_of(place)
    manifest["files"][name] = {"rows": None, "bytes": 5, "sha256": sha256_text("prize")}
    write_manifest(place, manifest)
    (place / STORE_NOTE).write_text(json.dumps({"url": URL}))
    return f"{place.name} lists {name!r}"


def field_of_a_manifest(root: Path, rng: random.Random) -> str:
    """A field of a manifest, or of a table in it, has another kind."""
    place, value = any_place(root, rng), rng.choice(VALUES)
    manifest = manifest_of(place)
    name = rng.choice(sorted(manifest))
    table = manifest[name]
    if isinstance(table, dict) and table and rng.random() < 0.7:
        key = rng.choice(sorted(table))
        if isinstance(table[key], dict) and table[key] and rng.random() < 0.7:
            table, key = table[key], rng.choice(sorted(table[key]))
        table[key], name = value, f"{name}.{key}"
    else:
        manifest[name] = value
    if name not in ("recipe", "content", "digest"):
        write_manifest(place, manifest)
    else:
        (place / MANIFEST).write_bytes(json.dumps(manifest).encode(errors="surrogatepass"))
    return f"{name} of {place.name} is {value!r}"


def json_files(root: Path) -> list[Path]:
    """Return every JSON file of a run, manifests among them."""
    return sorted(filter(is_plain_file, root.rglob("*.json")))


def text_of_a_file(root: Path, rng: random.Random) -> str:
    """A JSON file, or the metrics, hold something else."""
    others = filter(is_plain_file, [root / "config.resolved.json", root / "metrics.parquet"] * 5)
    path = rng.choice([*json_files(root), *others])
    text = rng.choice(TEXTS)
    path.write_bytes(text)
    return f"{path.relative_to(root)} begins with {text[:8]!r}, {len(text)} bytes"


def setting(root: Path, rng: random.Random) -> str:
    """A setting of the resolved config has another kind."""
    tables = json.loads(next(path for path in json_files(root) if path.name == "config.resolved.json").read_text())
    name, value = rng.choice(sorted(tables)), rng.choice(VALUES)
    if isinstance(tables[name], dict) and tables[name] and rng.random() < 0.7:
        key = rng.choice(sorted(tables[name]))
        tables[name][key], name = value, f"{name}.{key}"
    else:
        tables[name] = value
    (root / "config.resolved.json").write_bytes(json.dumps(tables).encode(errors="surrogatepass"))
    return f"{name} of the config is {value!r}"


def kind_of_a_file(root: Path, rng: random.Random) -> str:
    """A file is a pipe, a device, a folder, a socket's place, or a link to what lies outside."""
    path = rng.choice([*json_files(root), *root.rglob("*.parquet"), *root.rglob("*.safetensors")])
    return special(path, rng.choice(("fifo", "zero", "folder", "loop", "outside", "dangling")))


def special(path: Path, kind: str) -> str:
    """Put something that is no plain file in a place."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.moved"))
    else:
        path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        outside = next(p for p in path.parents if (p / OUTSIDE).is_dir()) / OUTSIDE
        targets = {
            "zero": "/dev/zero",
            "loop": path.name,
            "outside": outside / "secret.txt",
            "dangling": outside / "new.txt",
        }
        path.symlink_to(targets.get(kind, outside))
    return f"{path.name} is {kind}"


def link_of_a_folder(root: Path, rng: random.Random) -> str:
    """A folder of the run, or a file that commands write, is a link to what lies outside."""
    names = (".lock", ".report.html.tmp", "report.html", "logs", "iterations", "members", "iterations/000001", "pruned")
    name = rng.choice(names)
    if name == "pruned":
        place = any_place(root, rng, ("policy",))
        (place / "pruned.json").symlink_to(root.parent / OUTSIDE / "secret.txt")
        return "pruned.json is a link"
    return special(root / name, rng.choice(("outside", "folder-outside", "dangling", "fifo")))


def reference(root: Path, rng: random.Random) -> str:
    """An artifact is replaced by a reference that leads anywhere."""
    place = any_place(root, rng)
    digest = manifest_of(place)["digest"]
    paths: tuple[Any, ...] = (
        URL, "s3://bucket/x", "file:///etc", "http://127.0.0.1:9/../../x", "/etc", "../../../../outside", "", ".",
        "\x00", f"../{place.parent.name}/{place.name}", "x" * 5_000, *VALUES,
    )  # fmt: skip
    path = rng.choice(paths)
    place.rename(root.parent / OUTSIDE / f"moved-{place.name}")
    note = {"path": path, "digest": rng.choice((digest, "f" * 64, None, 5))}
    place.with_name(f"{place.name}.reference.json").write_bytes(json.dumps(note).encode(errors="surrogatepass"))
    return f"{place.name} refers to {path!r}"[:200]


def folder_names(root: Path, rng: random.Random) -> str:
    """A folder of iterations, or next to the datasets, has a name that is none."""
    names = ("\u00b2", "\u0663", "0", "9" * 24, "9" * 200, "-1", "000007", "1000000000", "../x", "000001.moved")
    name = rng.choice(names[:7])
    path = root / "iterations" / name
    if rng.random() < 0.3:
        path.touch()
    else:
        path.mkdir(exist_ok=True)
    return f"iterations has {name[:30]!r}"


def bytes_of_a_part(root: Path, rng: random.Random) -> str:
    """Bytes of a part are changed, and its hashes with them."""
    place = any_place(root, rng, ROWS)
    path = sorted(place.glob("*.parquet"))[0]
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "footer", "cut", "length", "garbage", "empty"))
    if how == "flip":
        for _ in range(rng.choice((1, 4, 64))):
            data[rng.randrange(4, len(data) - 8)] = rng.randrange(256)
    elif how == "footer":
        size = int.from_bytes(data[-8:-4], "little")
        for _ in range(rng.choice((1, 4, 16))):
            data[rng.randrange(len(data) - 8 - size, len(data) - 8)] = rng.randrange(256)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "length":
        data[-8:-4] = rng.choice((0, 1, len(data), 2**31, 2**32 - 1)).to_bytes(4, "little")
    else:
        data = bytearray(rng.randbytes(2_000) if how == "garbage" else b"")
    path.write_bytes(bytes(data))
    reseal(place)
    return f"{how} of {place.name}"


def rows_of_a_part(root: Path, rng: random.Random) -> str:
    """Rows say what no stage writes: other types, nulls, numbers, lengths; hashes fit."""
    place = any_place(root, rng, ROWS)
    path = sorted(place.glob("*.parquet"))[0]
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    index = table.column_names.index(name)
    type_ = table.schema.field(name).type
    how = rng.choice(("drop", "null", "type", "extreme", "none", "double", "extra", "empty lists"))
    if how == "drop":
        table = table.drop_columns([name])
    elif how == "null":
        table = table.set_column(index, pa.field(name, type_), pa.nulls(len(table), type_))
    elif how == "type":
        other = rng.choice(
            (pa.int8(), pa.list_(pa.int32()), pa.struct({"x": pa.string()}), pa.large_binary(), pa.date32())
        )
        table = table.set_column(index, pa.field(name, other), pa.nulls(len(table), other))
    elif how == "none":
        table = table.slice(0, 0)
    elif how == "double":
        table = pa.concat_tables([table, table])
    elif how == "extra":
        table = table.append_column("\x1b[31m", pa.array([1] * len(table)))
    else:
        frame = pl.DataFrame(table)
        extremes: dict[bool, list[Any]] = {True: [float("nan"), float("inf"), -1e308], False: [2**31 - 1, -1]}
        if frame.schema[name].is_numeric():
            value = rng.choice(extremes[frame.schema[name].is_float()])
            frame = frame.with_columns(pl.lit(value).cast(frame.schema[name], strict=False).alias(name))
        elif frame.schema[name] == pl.String:
            text = rng.choice(
                ("", "\x00", "\x1b]0;x\x07", "\u202e", "[red]x[/", "x" * 100_000, "<script>alert(1)</script>")
            )
            frame = frame.with_columns(pl.lit(text).alias(name))
        elif frame.schema[name].is_nested():
            frame = frame.with_columns(pl.lit([], frame.schema[name]).alias(name)) if how == "empty lists" else frame
        table = frame.to_arrow().cast(table.schema, safe=False) if how != "null" else table
    pq.write_table(table, path, compression="zstd")
    reseal(place)
    return f"{how} of {name} of {place.name}"


def bomb(root: Path, rng: random.Random) -> str:
    """A small part decodes to what fills a memory."""
    how = rng.choice(("rows", "texts", "lists"))
    place = any_place(root, rng, ROWS if how == "rows" else ("completions",))
    write_bomb(place, how, 2_000_000 if how == "rows" else 1 << 20)
    return f"a bomb of {how} in {place.name}"


def write_bomb(place: Path, how: str, size: int = 1_000_000) -> None:
    """Replace the first part by rows that take little room: ``size`` equal rows, or long texts or lists in a few."""
    path = sorted(place.glob("*.parquet"))[0]
    row = pl.read_parquet(path, glob=False).head(1)
    schema = pq.read_schema(path)
    if how == "rows":
        table = conform(row, place.name).take(pa.repeat(pa.scalar(0), size // 10))
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for _ in range(10):
                writer.write_table(table)
    else:
        table = conform(pl.concat([row] * 40), place.name)
        is_wanted = pa.types.is_string if how == "texts" else pa.types.is_list
        field = next(field for field in schema if is_wanted(field.type))
        if how == "texts":
            dictionary = pa.array(["x" * (50 * size)])
            column = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), dictionary)
        else:
            values = pa.nulls(40 * size).cast(field.type.value_type).fill_null(0)
            column = pa.ListArray.from_arrays(
                pa.array(range(0, 40 * size + 1, size), pa.int32()), values, type=field.type
            )
        new = pa.field(field.name, column.type, field.nullable)
        table = table.set_column(table.column_names.index(field.name), new, column)
        pq.write_table(table, path, compression="zstd", store_schema=False)  # as text, not as a dictionary
    reseal(place)


def stage_name(root: Path, rng: random.Random) -> str:
    """An artifact says that another stage, or another version, has made it."""
    place = any_place(root, rng)
    manifest = manifest_of(place)
    before = manifest["digest"]
    manifest["stage"] += rng.choice(("_x", "", " ", "\u200b"))
    manifest["stage_version"] = rng.choice((0, 1, 99, manifest["stage_version"]))
    write_manifest(place, manifest)
    replace_digest(root, before, manifest["digest"])
    return f"{place.name} by {manifest['stage']!r} {manifest['stage_version']}"


KINDS: tuple[Change, ...] = (
    name_of_a_file, field_of_a_manifest, text_of_a_file, setting, kind_of_a_file, link_of_a_folder, reference,
    folder_names, bytes_of_a_part, rows_of_a_part, bomb, stage_name,
)  # fmt: skip
