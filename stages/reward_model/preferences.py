"""Where preferences come from: files that name stored completions or hold the texts, and earlier reward models.

A file is JSONL, CSV or Parquet, one comparison per row. Either ``chosen_id`` and ``rejected_id`` name completions of
runs, or ``chosen`` and ``rejected`` hold the answers and ``prompt`` (or ``messages``) the question; each of these is a
text or a list of {role, content}. Without ``prompt``, ``chosen`` and ``rejected`` are whole conversations that differ
in their last turn. Further columns, all optional: margin, rater, is_tie.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from pipeline.artifact import Artifact
from pipeline.errors import SourceError
from pipeline.files import identity, user_path
from pipeline.manifest import canonical_json
from pipeline.runs import open_run
from pipeline.schema import SCHEMAS
from stages.source_rows import as_text, is_held_out, is_missing, read_turns
from stages.tables import read_table

Message = dict[str, str]
USABLE = (None, "held_out", "not_replayed")
"""Drop reasons of rows that train, test, or could train; null = trains."""


@dataclass(slots=True)
class Preferences:
    """Rows of the dataset ``preferences_used`` before training, and the artifacts that hold their answers."""

    rows: list[dict[str, Any]]
    completions: dict[str, Artifact] = field(default_factory=dict)
    """Input name -> artifact."""
    undecided: int = 0
    """Rows left out because an id is null: nobody said which answer is better."""


def read_preferences(
    files: Sequence[str], runs: Sequence[str], *, source: str, default_margin: float, held_out_share: float
) -> Preferences:
    """Return the comparisons of the files in their order, with the texts of stored completions filled in. Read-only.

    Questions are held out by the same hash as prompts are. Unusable rows keep their place, with a drop_reason.

    Raises:
        SourceError: when a row is ambiguous, names an unknown completion, or compares answers of two questions.
    """
    records = [
        (file, number, r) for file in files for number, r in enumerate(read_table(user_path(file)).to_dicts(), 1)
    ]
    by_text = [_has_texts(record) for _, _, record in records]
    wanted = {
        str(record[key])
        for (_, _, record), texts in zip(records, by_text, strict=True)
        if not texts
        for key in ("chosen_id", "rejected_id")
        if record.get(key) is not None
    }
    known, completions = _completions(runs, wanted) if wanted else ({}, {})
    preferences = Preferences([], completions)
    for (file, number, record), texts in zip(records, by_text, strict=True):
        where = f"row {number} of {file}"
        answers = _from_texts(record, where) if texts else _from_ids(record, where, known, runs)
        if answers is None:
            preferences.undecided += 1
            continue
        row = _row(*answers, record, where, source, default_margin)
        if row["drop_reason"] is None and is_held_out(row["messages"], held_out_share):
            row["drop_reason"] = "held_out"
        preferences.rows.append(row)
    return preferences


def older_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """Return the preferences behind an earlier reward model: trained, not replayed, and held out ones. Read-only."""
    usable = pl.col("drop_reason").is_null() | pl.col("drop_reason").is_in([r for r in USABLE if r is not None])
    cleared = {"source": "older", "chosen_score": None, "rejected_score": None}
    return [{**row, **cleared} for row in artifact.read().filter(usable).iter_rows(named=True)]


def without_duplicates(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows; of equal ones that could train or test, all but the first are marked as dropped."""
    seen: set[str] = set()
    result = []
    for row in rows:
        if row["drop_reason"] in USABLE:
            again = row["preference_id"] in seen
            seen.add(row["preference_id"])
            row = {**row, "drop_reason": "duplicate"} if again else row
        result.append(row)
    return result


def draw_replay(rows: list[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Return the rows with ``share`` of the older ones marked for training, to the nearest whole number.

    Held-out rows stay held out. The draw goes by the hash of seed and preference_id, so it does not depend on the
    order of the rows.
    """
    pool = [row for row in rows if _may_replay(row)]
    ranked = sorted(pool, key=lambda row: identity(seed, "replay", row["preference_id"]))
    drawn = {row["preference_id"] for row in ranked[: int(share * len(pool) + 0.5)]}
    return [
        {**row, "drop_reason": None if row["preference_id"] in drawn else "not_replayed"} if _may_replay(row) else row
        for row in rows
    ]


def _may_replay(row: Mapping[str, Any]) -> bool:
    return row["source"] == "older" and row["drop_reason"] in (None, "not_replayed")


def preference_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Return the rows with exactly the columns of ``preferences_used``."""
    schema = pl.DataFrame(SCHEMAS["preferences_used"].empty_table()).schema
    return pl.DataFrame(list(rows), schema=schema)


def _row(
    messages: list[Message],
    chosen: str,
    rejected: str,
    record: Mapping[str, Any],
    where: str,
    source: str,
    default_margin: float,
) -> dict[str, Any]:
    rater = as_text(record.get("rater"), where, "rater")
    margin = record.get("margin")
    try:
        margin = default_margin if margin is None or is_missing(margin) else float(margin)
        if not math.isfinite(margin):
            raise ValueError
    except (TypeError, ValueError):
        raise SourceError(f"{where} has the margin {margin!r}: expected a number, or null; correct it") from None
    is_tie = str(record.get("is_tie")).strip().lower() in ("true", "1")
    return {
        "preference_id": identity(canonical_json(messages), chosen, rejected, rater),
        "source": source,
        "chosen_id": None if record.get("chosen_id") is None else str(record["chosen_id"]),
        "rejected_id": None if record.get("rejected_id") is None else str(record["rejected_id"]),
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
        "rater": rater,
        "drop_reason": "tie" if is_tie else "equal" if chosen == rejected else None,
        "chosen_score": None,
        "rejected_score": None,
    }


def _has_texts(record: Mapping[str, Any]) -> bool:
    return record.get("chosen") is not None and record.get("rejected") is not None


def _from_texts(record: Mapping[str, Any], where: str) -> tuple[list[Message], str, str] | None:
    """Return conversation and answers of a row that holds them."""
    asked = "messages" if record.get("messages") is not None else "prompt"
    chosen, rejected = (_turns(record, column, "assistant", where) for column in ("chosen", "rejected"))
    if record.get(asked) is None:
        if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
            raise SourceError(
                f"{where} has no prompt, and chosen and rejected are not conversations that share all turns but the "
                "last: add a column prompt"
            )
        return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if len(chosen) != 1 or len(rejected) != 1:
        raise SourceError(
            f"{where} has a prompt, and answers of {len(chosen)} and {len(rejected)} turns: expected one each; leave "
            "the prompt out where chosen and rejected are whole conversations"
        )
    return _turns(record, asked, "user", where), chosen[0]["content"], rejected[0]["content"]


def _turns(record: Mapping[str, Any], column: str, role: str, where: str) -> list[Message]:
    """Return a text as one turn of the role, and a list of turns as it is."""
    value = record[column]
    return [{"role": role, "content": value}] if isinstance(value, str) else read_turns(value, where, column)


def _from_ids(
    record: Mapping[str, Any], where: str, known: Mapping[str, tuple[list[Message], str]], runs: Sequence[str]
) -> tuple[list[Message], str, str] | None:
    """Return conversation and answers of a row that names completions; None when it names only one or none."""
    if "chosen_id" not in record or "rejected_id" not in record:
        raise SourceError(
            f"{where} has the columns {list(record)}: expected chosen_id and rejected_id, or prompt, chosen and "
            "rejected with texts; rename or fill them in"
        )
    ids = [record["chosen_id"], record["rejected_id"]]
    if None in ids:
        return None
    unknown = [str(i) for i in ids if str(i) not in known]
    if unknown:
        raise SourceError(
            f"{where} names the completions {unknown}, which none of the runs {list(runs)} holds: add their run to "
            "reward_model.runs, or give the texts"
        )
    (messages, chosen), (others, rejected) = known[str(ids[0])], known[str(ids[1])]
    if messages != others:
        raise SourceError(
            f"{where} compares {ids[0]} with {ids[1]}, which answer different questions: expected answers of one "
            "prompt; remove the row"
        )
    return messages, chosen, rejected


def _completions(
    runs: Sequence[str], wanted: set[str]
) -> tuple[dict[str, tuple[list[Message], str]], dict[str, Artifact]]:
    """Return conversation and text of the wanted completions of the runs, and the artifacts that held any."""
    known: dict[str, tuple[list[Message], str]] = {}
    used: dict[str, Artifact] = {}
    for run in runs:
        artifacts = list(open_run(run).artifacts())
        prompts = {a.path.parent: a for a in artifacts if a.manifest.dataset == "prompts"}
        for artifact in artifacts:
            if artifact.manifest.dataset not in ("completions", "evaluations"):
                continue
            found = artifact.scan().filter(pl.col("completion_id").is_in(sorted(wanted)))
            sources = [artifact]
            if artifact.manifest.dataset == "completions":
                sources.append(prompts[artifact.path.parent])
                found = found.join(sources[-1].scan().select("prompt_id", "messages"), on="prompt_id")
            rows = found.select("completion_id", "messages", "completion").collect()
            known.update({key: (messages, text) for key, messages, text in rows.iter_rows()})
            if len(rows):
                used.update({f"{a.manifest.dataset}:{a.digest[:12]}": a for a in sources})
    return known, dict(sorted(used.items()))
