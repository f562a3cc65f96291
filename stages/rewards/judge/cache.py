"""The answers of judges on disk: the dataset ``judgements``, shared by any number of processes.

A process appends: it writes parts of its own, under names that nobody else uses, and each appears when it is whole.
Parts never change and never go, so DuckDB and polars can read the directory while others write. Two processes that
ask the same thing at the same moment both keep their answer; from then on the earlier one counts.

This is no artifact: `created` is a clock, and which parts there are depends on who was killed when.
"""

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.conformance import check_schema, conform
from pipeline.errors import RewardError
from pipeline.files import atomic_write, sha256_text
from pipeline.manifest import canonical_json
from pipeline.schema import SCHEMAS

SAVE_SECONDS = 5.0
"""Answers that a kill -9 can lose are at most this old."""
SAVE_ANSWERS = 500
"""A part is written earlier when it has so many rows."""
TOKEN_COUNTS = ("num_prompt_tokens", "num_completion_tokens")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said to one request."""

    text: str
    finish_reason: str | None
    served_model: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None


def request_hash(body: Mapping[str, Any]) -> str:
    """Return the key of a request: the hash of its body, that is of all that decides the answer but the server."""
    return sha256_text(canonical_json(body))


@dataclass(slots=True)
class JudgementCache:
    """Answers by request hash; keeps nothing when ``directory`` is None."""

    directory: Path | None
    unsaved: list[dict[str, Any]] = field(default_factory=list)

    def find(self, hashes: Collection[str]) -> dict[str, Answer]:
        """Return the known answers to these requests. Read-only.

        Raises:
            RewardError: naming a file of the directory that cannot be read.
            SchemaError: naming a file that is something else.
        """
        if self.directory is None or not hashes:
            return {}
        paths = sorted(self.directory.glob("*.parquet"))
        for path in paths:
            _check_part(path)
        if not paths:
            return {}
        wanted = pl.LazyFrame({"request_hash": list(hashes)}, schema={"request_hash": pl.String})
        known = (
            pl.scan_parquet(paths, glob=False)
            .join(wanted, on="request_hash", how="semi")
            .select("request_hash", "answer", "finish_reason", "served_model", *TOKEN_COUNTS, "created")
            .sort("created", "answer")
            .unique("request_hash", keep="first", maintain_order=True)
            .drop("created")
            .collect()
        )
        return {key: Answer(*facts) for key, *facts in known.iter_rows()}

    def keep(self, body: Mapping[str, Any], answer: Answer) -> None:
        """Take an answer in; it is on disk after the next `save`."""
        if self.directory is None:
            return
        self.unsaved.append(
            {
                "request_hash": request_hash(body),
                "model": body["model"],
                "messages": body["messages"],
                "sampling": canonical_json({k: v for k, v in body.items() if k not in ("model", "messages")}),
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "served_model": answer.served_model,
                "num_prompt_tokens": answer.num_prompt_tokens,
                "num_completion_tokens": answer.num_completion_tokens,
                "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            }
        )
        if len(self.unsaved) >= SAVE_ANSWERS:
            self.save()

    def save(self) -> None:
        """Write the answers taken in since the last time, if there are any, as one part.

        Raises:
            OutOfSpace: when the device is full.
        """
        if self.directory is None or not self.unsaved:
            return
        rows = pa.Table.from_pylist(self.unsaved, schema=SCHEMAS["judgements"])
        self.directory.mkdir(parents=True, exist_ok=True)
        # names sort by time; the random half makes them unique among processes and machines
        path = self.directory / f"part-{time.time_ns():020d}-{uuid4().hex[:12]}.parquet"
        with atomic_write(path) as temporary:
            pq.write_table(conform(rows, "judgements"), temporary, compression="zstd", write_page_checksum=True)
        self.unsaved.clear()

    async def keep_saving(self) -> None:
        """Save every few seconds until cancelled."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self.save()


def _check_part(path: Path) -> None:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RewardError(
            f"{path} cannot be read ({error}): delete it, and the answers that were in it are asked for again"
        ) from error
    check_schema(schema, "judgements", path)
