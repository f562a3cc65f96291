"""Verifies recorded tokens: their lists against the batches' rows, and against the row's own numbers."""

import polars as pl

from stages.inspect.verify.files import Located
from stages.inspect.verify.ledger import PART, Ledger, Rule, apply_rules
from stages.inspect.verify.rows import scan

TOLERANCE = 1e-9
"""Relative, for sums whose order polars chooses."""

NUMBERS = (
    "trainer_logprobs",
    "sampling_logprobs",
    "importance_ratios",
    "correction_weights",
    "entropies",
    "token_losses",
)
REASONS = ("clip_reasons", "mask_reasons")

MEANS = {
    "importance_ratio_mean": "importance_ratios",
    "correction_weight_mean": "correction_weights",
    "entropy_mean": "entropies",
}
"""Number of the row -> the list that it is the mean of."""

COUNTS = {
    "clipped_low_tokens": ("clip_reasons", ["clipped_low"]),
    "clipped_high_tokens": ("clip_reasons", ["clipped_high"]),
    "masked_tokens": ("mask_reasons", ["veto", "off_policy_sequence_mask", "unknown_sampler", "correction"]),
}
"""Number of the row -> the list and its reasons that it counts."""


def check_tokens(ledger: Ledger, item: Located, source: Located) -> None:
    """Check recorded tokens against those of the batches, and the numbers of their rows against the tokens.

    Rows without recorded tokens are passed over.
    """
    records = scan(item.artifact)
    if not {"token_losses", *REASONS} <= set(records.collect_schema().names()):
        return
    keys = ["completion_id", "optimizer_step"]
    batches = scan(source.artifact).filter(pl.col("drop_reason").is_null())
    written = batches.select(*keys, "completion_token_ids", "loss_mask", written="sampling_logprobs")
    joined = records.join(written, on=keys, how="inner").filter(pl.col("token_losses").is_not_null())
    length = pl.col("completion_token_ids").list.len()
    is_other = pl.any_horizontal((pl.col(name).list.len() != length).fill_null(True) for name in (*NUMBERS, *REASONS))
    rule = Rule("records", is_other, "a list of tokens has another length than the completion")
    apply_rules(ledger, item.where, joined, [rule], "completion_id")
    fitting = joined.filter(~is_other)
    apply_rules(ledger, item.where, fitting.select(*_derived(keys)), _rules(), "completion_id")


def _derived(keys: list[str]) -> list[pl.Expr]:
    """Return what the lists give, next to the numbers of the row."""

    def floats(name: str) -> pl.Expr:
        return pl.col(name).cast(pl.List(pl.Float64))

    def count(name: str, reasons: list[str]) -> pl.Expr:
        return pl.col(name).list.eval(pl.element().is_in(reasons).fill_null(False).cast(pl.Int32)).list.sum()

    every = pl.lit(True).repeat_by(pl.col("completion_token_ids").list.len())
    mask = pl.coalesce("loss_mask", every)
    untrained = pl.col("mask_reasons").list.eval((pl.element() != "loss_mask").fill_null(True))
    known = pl.col("token_losses").list.eval(pl.element().is_not_null())
    losses = floats("token_losses")
    return [
        *(pl.col(name) for name in (*keys, PART, "loss", *MEANS, *COUNTS)),
        ((mask != untrained) | (mask != known)).alias("_masked"),
        losses.list.sum().alias("_loss"),
        losses.list.eval(pl.element().abs()).list.sum().alias("_scale"),
        *(floats(column).list.mean().alias(f"_{name}") for name, column in MEANS.items()),
        *(count(column, reasons).alias(f"_{name}") for name, (column, reasons) in COUNTS.items()),
    ]


def _rules() -> list[Rule]:
    """Return what must hold between the lists and the numbers of the row."""
    gap = (pl.col("_loss") - pl.col("loss")).abs()
    rules = [
        Rule("records", pl.col("_masked"), "the tokens that trained are not those of the batch's loss_mask"),
        Rule("records", gap > TOLERANCE * pl.col("_scale"), "token_losses do not sum to loss", ("_loss", "loss")),
    ]
    for name, column in MEANS.items():
        far = (pl.col(f"_{name}") - pl.col(name)).abs() > TOLERANCE * pl.col(name).abs()
        found = f"{name} is not the mean of {column}"
        rules.append(Rule("records", far.fill_null(pl.col(name).is_not_null()), found, (f"_{name}", name)))
    for name, (column, _) in COUNTS.items():
        odd = pl.col(f"_{name}") != pl.col(name)
        rules.append(Rule("records", odd, f"{name} is not the count of {column}", (f"_{name}", name)))
    return rules
