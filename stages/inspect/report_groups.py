"""The groups of an iteration that a reader should see, and what is known of their completions, as data. Read-only."""

import hashlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import polars as pl
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pipeline.errors import ArtifactDamaged
from pipeline.reading import read_limited
from pipeline.run_dir import RunDir
from pipeline.text import json_text
from stages.checkpoints import TOKENIZER_BYTES

MOST_COMPLETIONS = 16
"""Most completions shown of a group: those that a finding names, then the best and the worst alternately."""
HEAD_TOKENS, TAIL_TOKENS = 768, 256
"""Of a longer completion only its beginning and its end are shown."""
MOST_CHARACTERS = 4_000
"""Of prompts, plain text, details and errors."""

GROUPED = ("completions", "advantages", "rewards", "batches")
"""Datasets whose rows name their group."""

Data = dict[str, pl.LazyFrame]
View = dict[str, Any]

TOKEN_NUMBERS = {
    "importance_ratios": "ratio",
    "correction_weights": "weight",
    "entropies": "entropy",
    "trainer_logprobs": "trainer_logprob",
}
"""Columns of training_records that hold a number per token, if update.record_tokens is on."""


class TokenText:
    """Turns token ids into the text that each token adds; ids stay numbers where the run has no tokenizer."""

    def __init__(self, run: RunDir) -> None:
        self._tokenizer = next((found for path in _tokenizers(run) if (found := _load(path))), None)

    def pieces(self, token_ids: list[int]) -> list[str]:
        """Return one text per token; a character split over several tokens belongs to the last one."""
        if self._tokenizer is None:
            return [f"[{token}]" for token in token_ids]
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in token_ids]


def _tokenizers(run: RunDir) -> Iterator[Path]:
    yield run.initial_policy / "tokenizer.json"
    for iteration in run.iterations():
        yield run.policy_before(iteration) / "tokenizer.json"
        if not run.has(iteration, "completions"):
            continue
        completions = run.open(iteration, "completions")
        for name, found in completions.manifest.inputs.items():  # completions of another run: its policies
            if name.startswith("policy"):
                yield completions.path / found["path"] / "tokenizer.json"


def _load(path: Path) -> Tokenizer | None:
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_buffer(read_limited(path, TOKENIZER_BYTES))
    except Exception as error:  # the library raises nothing more special
        raise ArtifactDamaged(
            f"{path} cannot be read as a tokenizer ({error}): restore it from a copy, see `grpo verify`"
        ) from error


def choose_groups(data: Data, flagged: Collection[str], count: int, seed: str) -> tuple[dict[str, str], int]:
    """Return up to ``count`` groups, each with the reason for which it was chosen, and how many groups there are.

    Groups that an audit names come first. Then the rankings take turns: groups with a failed reward, the widest spread
    of rewards, the largest advantage, completions cut at max_tokens, and a sample that depends on ``seed`` and the ids.
    """
    facts = _group_facts(data)
    if facts is None:
        return {}, 0
    ids = set(facts["group_id"])
    chosen = {group: "audit finding" for group in sorted(flagged) if group in ids}
    sample = sorted(ids, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    rankings = {
        "failed reward": _ranked(facts, "failed"),
        "widest spread": _ranked(facts, "spread"),
        "largest advantage": _ranked(facts, "advantage"),
        "cut at max_tokens": _ranked(facts, "cut"),
        "sampled": sample,
    }
    queues = {reason: iter(ranking) for reason, ranking in rankings.items()}
    while queues and len(chosen) < min(count, len(ids)):
        for reason in list(queues):
            group = next((g for g in queues[reason] if g not in chosen), None)
            if group is None:
                del queues[reason]
            elif len(chosen) < count:
                chosen[group] = reason
    return chosen, len(ids)


def _group_facts(data: Data) -> pl.DataFrame | None:
    base = data.get("advantages", data.get("completions"))
    if base is None:
        return None
    unscored = pl.col("reward").is_null() | pl.col("error").is_not_null()
    of_dataset = {
        "advantages": {"spread": pl.col("group_reward_std").first(), "advantage": pl.col("advantage").abs().max()},
        "completions": {"cut": (pl.col("finish_reason") == "length").sum()},
        "rewards": {"failed": unscored.sum()},
    }
    facts = base.select("group_id").unique(maintain_order=True)
    for dataset, measures in of_dataset.items():
        if dataset in data:
            found = data[dataset].group_by("group_id").agg(**measures)
            facts = facts.join(found, on="group_id", how="left", maintain_order="left")
    return facts.collect()


def _ranked(facts: pl.DataFrame, column: str) -> list[str]:
    """Return the groups with a positive value in the column, largest first; equal ones by id."""
    if column not in facts.columns:
        return []
    having = facts.filter(pl.col(column) > 0).sort(column, "group_id", descending=[True, False])
    return having["group_id"].to_list()


def group_views(
    data: Data, iteration: int, chosen: dict[str, str], tokens: TokenText | None, flagged: Collection[str]
) -> Iterator[View]:
    """Yield what is known about each chosen group, in that order; without ``tokens`` only texts are shown.

    ``flagged`` are completions that a finding names.
    """
    if not chosen:
        return
    rows = _completions(data, list(chosen))
    prompts = _prompts(data, rows)
    by_group = rows.partition_by("group_id", as_dict=True, maintain_order=True)
    for group, reason in chosen.items():
        if (group,) not in by_group:
            raise ArtifactDamaged(
                f"iteration {iteration} has rewards or advantages of the group {group!r} and none of its completions: "
                "see `grpo verify`"
            )
        listed = by_group[(group,)].to_dicts()
        kept = _kept(listed, flagged)
        vocabulary: dict[str, int] = {}
        members = [_completion(row, iteration, tokens, vocabulary) for row in kept]
        first = listed[0]
        yield {
            "group_id": group,
            "reason": reason,
            "is_flagged": reason == "audit finding",
            **prompts.get(first.get("prompt_id") or "", {}),
            "mean": number(first.get("group_reward_mean")),
            "std": number(first.get("group_reward_std")),
            "num_members": len(listed),
            "num_cut": sum(row.get("finish_reason") == "length" for row in listed),
            "num_failed": sum(any(p["reward"] is None for p in row.get("parts") or []) for row in listed),
            "members": members,
            "pieces": list(vocabulary),
        }


def _completions(data: Data, groups: list[str]) -> pl.DataFrame:
    """Return one row per completion with all that the datasets say; an absent dataset leaves its columns out."""
    chosen = {name: frame.filter(pl.col("group_id").is_in(groups)) for name, frame in data.items() if name in GROUPED}
    frame = chosen["completions"] if "completions" in data else chosen["advantages"]
    others = []
    if "completions" in data and "advantages" in data:
        others.append(chosen["advantages"].drop("group_id"))
    if "rewards" in data:
        parts = pl.struct("reward_name", "reward", "error", "detail").alias("parts")
        others.append(chosen["rewards"].group_by("completion_id").agg(parts))
    if "batches" in data:
        steps = chosen["batches"].group_by("completion_id")
        others.append(
            steps.agg(
                pl.col("optimizer_step").drop_nulls().unique().sort().alias("optimizer_steps"),
                pl.col("drop_reason").drop_nulls().first().alias("batch_drop_reason"),
            )
        )
    if "training_records" in data:
        ordered = data["training_records"].sort("optimizer_step", maintain_order=True).drop("sampling_logprobs")
        others.append(ordered.unique("completion_id", keep="last", maintain_order=True))
    for other in others:
        frame = frame.join(other, on="completion_id", how="left", maintain_order="left", suffix="_of_record")
    names = frame.collect_schema().names()
    order = [name for name in ("advantage", "completion_index") if name in names]
    return frame.sort(
        "group_id", *order, descending=[False, *(n == "advantage" for n in order)], nulls_last=True, maintain_order=True
    ).collect()


def _prompts(data: Data, rows: pl.DataFrame) -> dict[str, View]:
    if "prompts" not in data or "prompt_id" not in rows.columns:
        return {}
    wanted = rows["prompt_id"].unique().to_list()
    found = (
        data["prompts"]
        .filter(pl.col("prompt_id").is_in(wanted))
        .select("prompt_id", "messages", "reference_answer", "task")
        .collect()
    )
    return {
        row["prompt_id"]: {
            "prompt_id": row["prompt_id"],
            "task": row["task"],
            "reference": shorten(row["reference_answer"]),
            "messages": [{"role": m["role"], "content": shorten(m["content"])} for m in row["messages"]],
        }
        for row in found.to_dicts()
    }


def _kept(rows: list[View], flagged: Collection[str]) -> list[View]:
    """Return at most MOST_COMPLETIONS rows in their order."""
    if len(rows) <= MOST_COMPLETIONS:
        return rows
    best_and_worst = [i for pair in zip(range(len(rows)), reversed(range(len(rows))), strict=True) for i in pair]
    named = [i for i, row in enumerate(rows) if row["completion_id"] in flagged]
    keep = set(list(dict.fromkeys([*named, *best_and_worst]))[:MOST_COMPLETIONS])
    return [row for i, row in enumerate(rows) if i in keep]


def _completion(row: View, iteration: int, tokens: TokenText | None, vocabulary: dict[str, int]) -> View:
    token_ids = row.get("completion_token_ids") or []
    logprobs = row.get("sampling_logprobs") or []
    policy_iteration = row.get("policy_iteration")
    known = [x for x in logprobs if x is not None]
    view = {
        "completion_id": row["completion_id"],
        "index": row.get("completion_index"),
        "reward": number(row.get("reward")),
        "advantage": number(row.get("advantage")),
        "dropped": row.get("batch_drop_reason") or row.get("drop_reason"),
        "optimizer_steps": row.get("optimizer_steps"),
        "finish": row.get("finish_reason"),
        "policy": row.get("policy_name"),
        "policy_digest": (row.get("policy_digest") or "")[:8] or None,
        "age": None if policy_iteration is None else iteration - policy_iteration,
        "num_tokens": len(token_ids) if "completion_token_ids" in row else None,
        "logprob_sum": number(math.fsum(known)) if known and all(map(math.isfinite, known)) else None,
        "ratio_mean": number(row.get("importance_ratio_mean")),
        "ratio_max": number(row.get("importance_ratio_max")),
        "weight_mean": number(row.get("correction_weight_mean")),
        "entropy_mean": number(row.get("entropy_mean")),
        "kl": number(row.get("kl_to_sampler")),
        "clipped": _sum(row.get("clipped_low_tokens"), row.get("clipped_high_tokens")),
        "masked": row.get("masked_tokens"),
        "text": shorten(row.get("completion")),
        "parts": [
            {
                "name": part["reward_name"],
                "reward": number(part["reward"]),
                "error": shorten(part["error"]),
                "detail": shorten(part["detail"]),
            }
            for part in row.get("parts") or []
        ],
    }
    if token_ids and tokens is not None:
        pieces = _middle_out(tokens.pieces(token_ids))
        view["tokens"] = [vocabulary.setdefault(piece, len(vocabulary)) for piece in pieces]
        view["token_ids"] = _middle_out(token_ids)
        view["tokens_left_out"] = len(token_ids) - len(pieces)
        view["logprob"] = [number(x, 3) for x in _middle_out(logprobs)]
        if row.get("loss_mask") is not None:
            view["loss_mask"] = [int(x) for x in _middle_out(row["loss_mask"])]
        for column, name in TOKEN_NUMBERS.items():
            if row.get(column) is not None:
                view[name] = [number(x, 3) for x in _middle_out(row[column])]
    return {name: value for name, value in view.items() if value is not None}


def _sum(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _middle_out(values: list[Any]) -> list[Any]:
    if len(values) <= HEAD_TOKENS + TAIL_TOKENS:
        return values
    return values[:HEAD_TOKENS] + values[-TAIL_TOKENS:]


def number(value: float | None, digits: int = 4) -> float | str | None:
    """Return the number with so many significant digits; what JSON cannot say becomes its name."""
    if value is None:
        return None
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(float(value))


def shorten(text: str | None) -> str | None:
    """Return the text; a long one is cut and says so."""
    if text is None or len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} [... {len(text) - MOST_CHARACTERS:,} more characters]"


def encoded_size(view: View) -> int:
    """Return the bytes of the view as JSON."""
    return len(json_text(view, separators=(",", ":")).encode())
