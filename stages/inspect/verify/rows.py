"""Verifies prompts and completions: what their rows say by themselves.

Row by row where a rule says it, in one streaming pass; text by decoding it again, in batches. Columns of lists are
compared by fingerprints with a seed drawn anew in every process.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from pipeline.artifact import Artifact
from pipeline.reading import shorten
from stages.batch import IMPORTED, NO_POLICY
from stages.checkpoints import load_tokenizer, read_json, stated_stop_token_ids, vocabulary_size
from stages.inspect.verify.ledger import PART, Ledger, Rule, Where, WrongRow, apply_rules
from stages.source_rows import SourceRow, is_held_out, question_of

DECODE_ROWS = 8192
"""Rows decoded at a time: bounds the memory that Python's lists of token ids take."""

SEED = secrets.randbits(63)
"""Of fingerprints: nobody can prepare two lists that collide."""

FINISH_REASONS = ("stop", "length", "abort")


def scan(artifact: Artifact) -> pl.LazyFrame:
    """Return the rows with the name of their file in ``_part``. The files' hashes were compared before. Read-only."""
    frame = pl.scan_parquet(artifact.files(), include_file_paths=PART, glob=False)
    return frame.with_columns(pl.col(PART).str.extract(r"([^/\\]+)$"))


def fingerprint(*columns: str | pl.Expr) -> pl.Expr:
    """Return one number per row that differs when any of the columns does."""
    return pl.struct(*columns).hash(seed=SEED)


def check_prompts(ledger: Ledger, where: Where, artifact: Artifact) -> None:
    """Recompute prompt ids and the split of each question."""
    config = artifact.manifest.config
    split, share = config.get("drawn_for"), config.get("held_out_share")
    longest = config.get("max_prompt_tokens")
    columns = ("prompt_id", "messages", "reference_answer", "task", "metadata", PART)
    wrong_ids, wrong_split = [], []
    count = 0
    for rows in scan(artifact).select(columns).collect().iter_slices(DECODE_ROWS):
        for prompt_id, messages, answer, task, metadata, part in rows.iter_rows():
            count += 1
            row = SourceRow(messages, answer, task, metadata)
            if row.prompt_id != prompt_id:
                found = f"messages, task, reference answer and metadata hash to {row.prompt_id}"
                wrong_ids.append(WrongRow(prompt_id, part, found))
            if share is not None and is_held_out(messages, share) != (split == "held_out"):
                wrong_split.append(WrongRow(prompt_id, part, f"the question does not belong to the split {split}"))
    ledger.checked("prompt ids", count)
    ledger.wrong_rows("prompt ids", where, wrong_ids, len(wrong_ids))
    ledger.wrong_rows("prompt split", where, wrong_split, len(wrong_split))
    if longest is None:
        ledger.checked("prompt split", count)
    if longest is not None:
        length = pl.col("prompt_token_ids").list.len()
        reason = pl.when(length > longest).then(pl.lit("too_long"))
        rule = Rule("prompt split", reason.ne_missing(pl.col("drop_reason")), "drop_reason is wrong", ("drop_reason",))
        apply_rules(ledger, where, scan(artifact), [rule], "prompt_id")


def questions(artifact: Artifact) -> pl.DataFrame:
    """Return prompt_id, file and a hash of each row's question, by which the split is decided. Read-only."""
    rows = scan(artifact).select("prompt_id", "messages", PART).collect()
    hashes = [hashlib.sha256(question_of(messages).encode()).hexdigest() for messages in rows["messages"].to_list()]
    return rows.select("prompt_id", PART).with_columns(pl.Series("question", hashes, dtype=pl.String))


def check_held_out(ledger: Ledger, where: Where, artifact: Artifact, held_out: pl.DataFrame) -> None:
    """Compare the questions of an iteration with those of the evaluations."""
    own = questions(artifact)
    seen = own.join(held_out.select("question"), on="question", how="semi")
    rows = [
        WrongRow(row, part, "the same question is evaluated") for row, part in seen.select("prompt_id", PART).rows()
    ]
    ledger.checked("held out", own.height)
    ledger.wrong_rows("held out", where, rows, len(rows))


def check_completions(ledger: Ledger, where: Where, artifact: Artifact, policies: Mapping[str, Artifact]) -> None:
    """Check what the rows of completions or evaluations say by themselves: lengths, logprobs, tokens, text, endings.

    ``policies`` are those that wrote them, by digest.
    """
    schema = pq.read_schema(artifact.files()[0]).names
    rules = [*_token_rules(schema)]
    sizes = [size for policy in policies.values() if (size := vocabulary_size(policy.path)) is not None]
    if sizes:
        rules.append(_vocabulary_rule(min(sizes)))
    else:
        ledger.skipped("token ids", "no policy says how large its vocabulary is")
    rules += _ending_rules(schema, artifact, policies)
    # of imported completions nobody knows the policy
    foreign = ~pl.col("policy_digest").is_in([NO_POLICY] if artifact.manifest.stage == IMPORTED else list(policies))
    rules.append(Rule("policy digests", foreign, "no input of the stage has this digest", ("policy_digest",)))
    apply_rules(ledger, where, scan(artifact), rules, "completion_id")
    _check_groups(ledger, where, artifact)
    check_text(ledger, where, artifact, policies)


def _token_rules(schema: Collection[str]) -> Iterator[Rule]:
    """Yield what holds for the lists along the tokens; null is no other length, but a completion has logprobs."""
    length = pl.col("completion_token_ids").list.len()
    for name in ("sampling_logprobs", "loss_mask", "kept_mass"):
        if name in schema:
            is_other = pl.col(name).list.len() != length
            is_wrong = is_other if name == "sampling_logprobs" else is_other.fill_null(False)
            yield Rule("lengths", is_wrong, f"{name} has another length than completion_token_ids")
    logprobs = pl.col("sampling_logprobs").list
    is_bad = ~logprobs.sum().is_finite().fill_null(True) | (logprobs.max() > 0).fill_null(False)
    yield Rule("logprobs", is_bad, "a log probability is positive or not finite", ("sampling_logprobs",))
    if "kept_mass" in schema:
        mass = pl.col("kept_mass").list
        outside = (mass.min() <= 0).fill_null(False) | (mass.max() > 1 + 1e-5).fill_null(False)
        yield Rule("logprobs", outside, "kept_mass is no probability", ("kept_mass",))


def _vocabulary_rule(size: int) -> Rule:
    tokens = pl.col("completion_token_ids").list
    outside = ((tokens.min() < 0) | (tokens.max() >= size)).fill_null(False)
    return Rule("token ids", outside, f"a token id is outside of 0 ... {size - 1}", ("completion_token_ids",))


def _ending_rules(schema: Collection[str], artifact: Artifact, policies: Mapping[str, Artifact]) -> Iterator[Rule]:
    """Yield what holds between the last token and how the completion ended."""
    reason, tokens = pl.col("finish_reason"), pl.col("completion_token_ids").list
    yield Rule("endings", ~reason.is_in(FINISH_REASONS), "unknown finish_reason", ("finish_reason",))
    longest = artifact.manifest.config.get("max_tokens")
    if longest is not None:
        yield Rule("endings", tokens.len() > longest, f"more than max_tokens = {longest} tokens")
        is_short = (reason == "length") & (tokens.len() != longest)
        yield Rule("endings", is_short, f"finish_reason is length, without max_tokens = {longest} tokens")
    stated = [stated_stop_token_ids(policy.path) for policy in policies.values()]
    stops = sorted({i for ids in stated for i in ids or []})
    if stops and None not in stated:  # else only the tokenizer knows
        is_wrong = (reason == "stop") & ~tokens.last().is_in(stops).fill_null(False)
        yield Rule("endings", is_wrong, f"finish_reason is stop, without one of the stop tokens {stops}")
    if "stop_reason" in schema and artifact.manifest.stage == "generate":  # which knows no stop strings
        last = pl.when(reason == "stop").then(tokens.last().cast(pl.String))
        is_wrong = pl.col("stop_reason").is_not_null() & pl.col("stop_reason").ne_missing(last)
        yield Rule("endings", is_wrong, "stop_reason is not the last token", ("stop_reason",))


def _check_groups(ledger: Ledger, where: Where, artifact: Artifact) -> None:
    prompt = fingerprint("prompt_id", "prompt_token_ids" if where.dataset == "completions" else "messages")
    rows = scan(artifact).select("completion_id", "group_id", PART, prompt.alias("prompt"))
    frame = rows.collect(engine="streaming")
    ledger.checked("groups", frame.height)
    repeated = frame.filter(pl.col("completion_id").is_duplicated())
    named = [
        WrongRow(i, part, "the completion_id stands twice") for i, part in repeated.select("completion_id", PART).rows()
    ]
    mixed = frame.filter(pl.col("prompt").n_unique().over("group_id") > 1)
    text = "members of its group have different prompts"
    named += [WrongRow(i, part, text) for i, part in mixed.select("completion_id", PART).head(ledger.limit).rows()]
    ledger.wrong_rows("groups", where, named, repeated.height + mixed.height)


def check_text(ledger: Ledger, where: Where, artifact: Artifact, policies: Mapping[str, Artifact]) -> None:
    """Decode every completion with the tokenizer of the policy that wrote it, and compare with the stored text."""
    columns = ["completion_id", "policy_digest", "completion_token_ids", "completion"]
    wrong: list[WrongRow] = []
    count = 0
    for path in artifact.files():
        for batch in pq.ParquetFile(path).iter_batches(batch_size=DECODE_ROWS, columns=columns):
            chunk = pl.DataFrame(batch)
            for (digest,), rows in chunk.group_by("policy_digest", maintain_order=True):
                policy = policies.get(str(digest)) or next(iter(policies.values()), None)
                if policy is None:
                    ledger.skipped("text", "the policy that wrote the answers is not there")
                    continue
                texts = pl.Series(_decode(policy, rows["completion_token_ids"].to_list()), dtype=pl.String)
                count += rows.height
                differ = rows.with_columns(texts.alias("decoded")).filter(pl.col("decoded") != pl.col("completion"))
                wrong += [WrongRow(row["completion_id"], path.name, _text_difference(row)) for row in differ.to_dicts()]
    ledger.checked("text", count)
    ledger.wrong_rows("text", where, wrong, len(wrong))


def _text_difference(row: Mapping[str, Any]) -> str:
    return f"the text is {shorten(row['completion'])}, its tokens decode to {shorten(row['decoded'])}"


_decoders: dict[str, Any] = {}


def _decode(policy: Artifact, token_ids: list[list[int]]) -> list[str]:
    """Return the texts of token ids. transformers is imported only for tokenizers that need it.

    Not generate's own function: two libraries must make the same text of the same tokens.
    """
    facts = policy.manifest.files.get("tokenizer.json")
    # transformers then changes white space after decoding
    cleans_up = read_json(policy.path / "tokenizer_config.json").get("clean_up_tokenization_spaces")
    if facts is None or cleans_up:
        return list(load_tokenizer(policy.path).batch_decode(token_ids, skip_special_tokens=True))
    if facts["sha256"] not in _decoders:
        from tokenizers import Tokenizer

        _decoders[facts["sha256"]] = Tokenizer.from_file(str(policy.path / "tokenizer.json"))
    return list(_decoders[facts["sha256"]].decode_batch(token_ids, skip_special_tokens=True))
