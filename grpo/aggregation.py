"""The denominators: what the summed token losses of a row are divided by. No torch: they are data, long before a loss.

The loss of an optimizer step is the sum over its tokens of ``weight * loss / denominator`` (`weigh_tokens`), so a
denominator belongs to the whole step, not to a microbatch.
"""

import polars as pl


def token_mean(tokens: pl.Series, extra_tokens: float) -> pl.Series:
    """Return for each row of a step the trainable tokens of the step: every token has the same weight (DAPO).

    ``tokens`` has each row's trainable tokens; ``extra_tokens`` count too, though they are in no row.
    """
    total = float(tokens.sum()) + extra_tokens
    return pl.Series("loss_denominator", [total] * len(tokens), dtype=pl.Float64)
