"""Artifacts: what makes one exist, what damages one, what survives a kill."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactDamaged, ArtifactMissing, SchemaError
from pipeline.manifest import is_finished
from tests.builders import new_writer, prompt_rows, reward_rows, seal, write_artifact


def test_an_artifact_reads_back_the_rows_it_was_given(tmp_path: Path) -> None:
    frame = reward_rows(a=[1.0, None], b=[0.5])
    artifact = write_artifact(tmp_path / "rewards", "rewards", frame)
    assert open_artifact(tmp_path / "rewards").read().equals(frame)
    assert artifact.manifest.rows == 3
    assert artifact.manifest.files["part-00000.parquet"]["rows"] == 3


def test_equal_rows_and_recipe_give_equal_digests_in_two_places(tmp_path: Path) -> None:
    first = write_artifact(tmp_path / "x" / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    second = write_artifact(tmp_path / "y" / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    assert first.digest == second.digest


@pytest.mark.parametrize(("rows", "recipe"), [((1.0, 0.5), "recipe"), ((1.0, 0.0), "other")])
def test_digest_depends_on_rows_and_on_recipe(tmp_path: Path, rows: tuple[float, ...], recipe: str) -> None:
    base = write_artifact(tmp_path / "x", "rewards", reward_rows(a=[1.0, 0.0]))
    assert write_artifact(tmp_path / "y", "rewards", reward_rows(a=rows), recipe).digest != base.digest


def test_a_directory_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    assert not is_finished(tmp_path / "rewards")
    with pytest.raises(ArtifactMissing, match=r"has no manifest\.json.*run it"):
        open_artifact(tmp_path / "rewards")


def test_nothing_has_the_final_name_before_the_seal(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "rewards", "rewards", "recipe")
    writer.write_part(0, reward_rows(a=[1.0]))
    assert not (tmp_path / "rewards").exists()


def test_a_killed_writers_parts_are_kept_for_the_same_recipe(tmp_path: Path) -> None:
    killed = new_writer(tmp_path / "rewards", "rewards", "recipe")
    killed.write_part(0, reward_rows(a=[1.0]))
    (killed.directory / ".part-00001.parquet.tmp").write_bytes(b"half a part")
    again = new_writer(tmp_path / "rewards", "rewards", "recipe")
    assert again.has_part(0)
    assert not again.has_part(1)
    assert [p.name for p in again.directory.iterdir() if p.name.endswith(".tmp")] == []


def test_a_killed_writers_parts_are_removed_for_another_recipe(tmp_path: Path) -> None:
    killed = new_writer(tmp_path / "rewards", "rewards", "recipe")
    killed.write_part(0, reward_rows(a=[1.0]))
    other = new_writer(tmp_path / "rewards", "rewards", "other")
    assert not other.has_part(0)


def test_a_truncated_part_is_named_with_both_sizes(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    part = artifact.files()[0]
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(
        ArtifactDamaged, match=rf"part-00000\.parquet has {size - 10:,} bytes, .* says {size:,}.*delete"
    ):
        open_artifact(tmp_path / "rewards").read()


def test_one_flipped_byte_is_found(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    part = artifact.files()[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=r"part-00000\.parquet has SHA-256"):
        open_artifact(tmp_path / "rewards").read()


def test_a_manifest_with_a_changed_hash_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    path = tmp_path / "rewards" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["part-00000.parquet"]["sha256"] = hashlib.sha256(b"forged").hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactDamaged, match="do not add up to its digest"):
        open_artifact(tmp_path / "rewards")


def test_dropped_rows_are_counted_by_reason_also_in_parts_of_an_earlier_process(tmp_path: Path) -> None:
    first = new_writer(tmp_path / "prompts", "prompts", "recipe")
    first.write_part(0, prompt_rows({"drop_reason": "too_long"}, {}))
    second = new_writer(tmp_path / "prompts", "prompts", "recipe")
    second.write_part(1, prompt_rows({"drop_reason": "too_long"}))
    sealed = seal(second)
    assert sealed.manifest.drops == {"too_long": 2}
    assert sealed.manifest.rows == 3


def test_parquet_bytes_hold_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_artifact(tmp_path / "x", "rewards", reward_rows(a=[1.0])).files()[0].read_bytes()
    monkeypatch.setattr("time.time", lambda: 1.0)
    assert write_artifact(tmp_path / "y", "rewards", reward_rows(a=[1.0])).files()[0].read_bytes() == first


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_seconds_are_right_though_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    writer = new_writer(tmp_path / "prompts", "prompts", "recipe")
    writer.write_part(0, prompt_rows({}))
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + jump)
    assert 0 <= seal(writer).manifest.seconds < 3600


def test_a_file_explains_its_columns(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0]))
    assert b"null = could not be scored" in pq.read_schema(artifact.files()[0]).field("reward").metadata[b"doc"]


def test_wrong_columns_are_refused_on_write(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "rewards", "rewards", "recipe")
    with pytest.raises(SchemaError, match=r"lack the columns \['detail'\].*unknown columns \['extra'\]"):
        writer.write_part(0, reward_rows(a=[1.0]).drop("detail").with_columns(extra=pl.lit(1)))


def test_null_is_refused_where_none_may_stand(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "rewards", "rewards", "recipe")
    with pytest.raises(SchemaError, match=r"reward_recipe.*null"):
        writer.write_part(0, reward_rows(a=[1.0]).with_columns(reward_recipe=pl.lit(None, pl.String)))


def test_a_kill_between_manifest_and_rename_changes_nothing(tmp_path: Path) -> None:
    whole = write_artifact(tmp_path / "x" / "rewards", "rewards", reward_rows(a=[1.0]))
    killed = new_writer(tmp_path / "y" / "rewards", "rewards", "recipe")
    killed.write_part(0, reward_rows(a=[1.0]))
    (killed.directory / "manifest.json").write_text("{}")
    (killed.directory / "optimizer").mkdir()
    (killed.directory / "optimizer" / "state.safetensors").write_bytes(b"half a state")
    again = new_writer(tmp_path / "y" / "rewards", "rewards", "recipe")
    assert again.has_part(0)
    assert seal(again).digest == whole.digest


def test_what_a_killed_removal_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".rewards.doomed").mkdir()
    new_writer(tmp_path / "rewards", "rewards", "recipe")
    assert not (tmp_path / ".rewards.doomed").exists()


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"chosen": {"recipe": "forged"}}, "do not add up to its recipe"),
        ({"inputs": {"x": {"path": "x", "digest": "f" * 64}}}, "do not add up to its recipe"),
        ({"config": {"recipe": "forged"}}, "its config is not the one of its recipe"),
    ],
)
def test_a_manifest_with_another_input_or_setting_is_refused(
    tmp_path: Path, forged: dict[str, Any], message: str
) -> None:
    write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    path = tmp_path / "rewards" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **forged}))
    with pytest.raises(ArtifactDamaged, match=message):
        open_artifact(tmp_path / "rewards")


def test_a_manifest_of_another_version_is_not_called_damage_that_could_be_deleted(tmp_path: Path) -> None:
    write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    path = tmp_path / "rewards" / "manifest.json"
    old = {**json.loads(path.read_text()), "manifest_version": 1}
    path.write_text(json.dumps({name: value for name, value in old.items() if name != "chosen"}))
    with pytest.raises(ArtifactDamaged, match=r"manifest_version 1, this program reads 2: use the version"):
        open_artifact(tmp_path / "rewards")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"{}", b"[]", b"{"])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, data: bytes) -> None:
    write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0, 0.0]))
    (tmp_path / "rewards" / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=r"manifest\.json (is not a valid manifest|cannot be read) \("):
        open_artifact(tmp_path / "rewards")


def test_a_directory_without_manifest_in_the_artifacts_place_is_removed(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "half").write_text("a copy that was interrupted")
    write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0]))
    assert sorted(p.name for p in (tmp_path / "rewards").iterdir()) == ["manifest.json", "part-00000.parquet"]
