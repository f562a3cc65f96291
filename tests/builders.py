"""Builders of rows, artifacts and tiny models for tests, with defaults for everything a test does not care about."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.artifact import Artifact
from pipeline.config import StrictModel
from pipeline.manifest import Recipe, recipe_hash
from pipeline.schema import SCHEMAS
from pipeline.writer import ArtifactWriter


class NoConfig(StrictModel):
    """Config of a stage that needs none."""


def reward_rows(**groups: Sequence[float | None]) -> pl.DataFrame:
    """Return rewards rows: ``reward_rows(a=[1, 0, None])`` has one group ``a`` with three members."""
    rows = [
        {"completion_id": f"{group}-{i}", "group_id": group, "reward_name": "accuracy", "reward": value}
        for group, values in groups.items()
        for i, value in enumerate(values)
    ]
    return fill("rewards", rows, reward_recipe="r")


def completion_rows(*completions: dict[str, Any]) -> pl.DataFrame:
    """Return completions rows; each dict names what matters to the test."""
    rows = []
    for i, given in enumerate(completions):
        tokens = given.get("completion_token_ids", [7, 1])
        rows.append(
            {
                "completion_id": f"c{i}",
                "group_id": "g",
                "completion_index": i,
                "completion_token_ids": tokens,
                "sampling_logprobs": [-1.0] * len(tokens),
                **given,
            }
        )
    return fill(
        "completions",
        rows,
        prompt_id="p",
        policy_name="current",
        policy_digest="d",
        policy_iteration=0,
        prompt_token_ids=[5, 6],
        completion="7",
        finish_reason="stop",
        seed=0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        logprobs_mode="processed",
        engine="scripted",
        engine_version="1",
    )


def advantage_rows(*rows: dict[str, Any]) -> pl.DataFrame:
    """Return advantages rows; each dict names what matters to the test."""
    defaults = {"group_id": "g", "reward": 1.0, "group_size": 2, "advantage": 0.5}
    return fill("advantages", [{"completion_id": f"c{i}", **row} for i, row in enumerate(rows)], **defaults)


def check_rows(*rows: dict[str, Any]) -> pl.DataFrame:
    """Return checks rows of one failed completion of two, c0; each dict names what matters to the test."""
    defaults = {
        "name": "short",
        "severity": "warn",
        "dataset": "completions",
        "condition": "num_tokens > 1",
        "max_share": 0.0,
        "num_rows": 2,
        "num_failed": 1,
        "failed_ids": ["c0"],
        "passed": False,
        "note": "1 of 2 rows (50.0%)",
    }
    return fill("checks", [{**defaults, **row} for row in rows or ({},)])


def prompt_rows(*rows: dict[str, Any]) -> pl.DataFrame:
    """Return prompts rows; each dict names what matters to the test."""
    defaults = {
        "prompt_id": "p",
        "messages": [{"role": "user", "content": "3 + 4"}],
        "prompt_token_ids": [5, 6],
        "task": "t",
        "metadata": "{}",
    }
    return fill("prompts", list(rows or ({},)), **defaults)


def fill(dataset: str, rows: Sequence[dict[str, Any]], **defaults: Any) -> pl.DataFrame:
    """Return rows of a dataset: given values, else defaults, else null."""
    schema = pl.DataFrame(SCHEMAS[dataset].empty_table()).schema
    blank = dict.fromkeys(schema)
    return pl.DataFrame([{**blank, **defaults, **row} for row in rows], schema=schema)


def write_artifact(place: Path, dataset: str, frame: pl.DataFrame, recipe: str = "recipe") -> Artifact:
    """Write a finished artifact with one part."""
    writer = new_writer(place, dataset, recipe)
    writer.write_part(0, frame)
    return seal(writer, recipe)


def new_writer(place: Path, dataset: str, recipe: str = "recipe") -> ArtifactWriter:
    """Return an open writer; ``recipe`` is any text that tells recipes apart."""
    writer = ArtifactWriter(place, dataset, recipe_hash(Recipe("test", 1, {"recipe": recipe}, {}, {})))
    writer.open()
    return writer


def seal(writer: ArtifactWriter, recipe: str = "recipe") -> Artifact:
    """Finish the artifact of a writer that `new_writer` made with this recipe."""
    return writer.seal(
        stage="test", stage_version=1, config={"recipe": recipe}, chosen={"recipe": recipe}, inputs={}, environment={}
    )


def by_group(frame: pl.DataFrame, column: str = "advantage") -> dict[str, list[Any]]:
    """Return the column's values of each group, in row order."""
    return {key[0]: part[column].to_list() for key, part in frame.partition_by("group_id", as_dict=True).items()}
