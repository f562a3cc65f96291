"""How a column of a dataset is written down, and the columns that several datasets have.

Conventions: ids are opaque strings; null means unknown, never 0; one value per row has a singular name; per-token
numbers are float32 lists, group statistics float64; JSON columns hold one compact object. Each field carries its
documentation as Arrow metadata (key ``doc``), which Parquet files keep, so that a file explains itself.
"""

from collections.abc import Iterable

import pyarrow as pa

TOKEN_IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
TOKEN_FLOATS = pa.list_(pa.float32())
TOKEN_TEXTS = pa.list_(pa.string())
TEXTS = pa.list_(pa.field("element", pa.string(), nullable=False))
MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))


def column(name: str, type_: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    """Return a field that carries its documentation."""
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


def dataset(doc: str, columns: Iterable[pa.Field]) -> pa.Schema:
    """Return a schema that carries the dataset's documentation."""
    return pa.schema(list(columns), metadata={"doc": doc})


DROP_REASON = column("drop_reason", pa.string(), "why the row is not used; null = it is used", nullable=True)
COMPLETION_ID = column("completion_id", pa.string(), "one sampled answer; unique across runs")
GROUP_ID = column("group_id", pa.string(), "the answers to one prompt that are compared with each other")
PROMPT_ID = column("prompt_id", pa.string(), "hash of the source row")
PROMPT_TOKEN_IDS = column("prompt_token_ids", TOKEN_IDS, "the prompt exactly as sent to the engine")
COMPLETION_TOKEN_IDS = column(
    "completion_token_ids", TOKEN_IDS, "the answer exactly as sampled, with its end-of-sequence token"
)
SAMPLING_LOGPROBS = column(
    "sampling_logprobs",
    TOKEN_FLOATS,
    "natural log probability of each sampled token under the policy and sampling settings that chose it; "
    "same length as completion_token_ids; a null element = the engine returned no finite number",
)
LOSS_MASK = column(
    "loss_mask",
    pa.list_(pa.bool_()),
    "which completion tokens train (tool output does not); null = all of them",
    nullable=True,
)
COMPLETION = column("completion", pa.string(), "the answer as text, special tokens left out")
FINISH_REASON = column("finish_reason", pa.string(), "stop = ended by itself; length = cut at max_tokens; abort")
SEED = column("seed", pa.int64(), "seed of this request's sampling")
TEMPERATURE = column("temperature", pa.float32(), "sampling temperature; 0 = greedy")
POLICY_DIGEST = column("policy_digest", pa.string(), "digest of the policy artifact whose weights wrote the answer")
POLICY_ITERATION = column(
    "policy_iteration",
    pa.int32(),
    "updates of this run behind those weights; 0 = the initial policy; null = not a policy of this run",
    nullable=True,
)
OPTIMIZER_STEP = column("optimizer_step", pa.int32(), "index of the optimizer step within the iteration")
REFERENCE_ANSWER = column("reference_answer", pa.string(), "the right answer; null = none is known", nullable=True)
TOKEN_COLUMNS = [
    column(name, type_, f"with update.record_tokens, else no column: {doc}", nullable=True)
    for name, type_, doc in (
        ("clip_reasons", TOKEN_TEXTS, "why the clip leaves a token no gradient: clipped_low, clipped_high, dual_clip"),
        (
            "mask_reasons",
            TOKEN_TEXTS,
            "why a token has no part in the loss: loss_mask; veto (the row has a token of extreme proximal / sampler "
            "ratio); unknown_sampler; correction (it gave weight 0)",
        ),
        ("token_losses", TOKEN_FLOATS, "shares of the step's loss; as float64, in token order, they sum to loss"),
    )
]
"""Rows have all of them or none: null columns would change the bytes, hence the digests, of runs without tokens."""
