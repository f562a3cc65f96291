"""The means over tokens, as denominators: what the summed token losses of each row are divided by. No torch: they
become data long before a loss.

The loss of an optimizer step is the sum over its tokens of ``weight * loss / denominator`` (`weigh_tokens`), so a
denominator belongs to the whole step, not to a microbatch. Rows without a trainable token are left out.

Shapes: `B` rows of an optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grpo.groups import Floats, Integers


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of an optimizer step, and what else its means count.

    The extras are the step's share of the rows without a signal, where these are kept in the denominator: they have no
    gradient and belong to no step. The steps share them evenly, hence fractions.
    """

    tokens_B: Integers
    """Trainable tokens."""
    prompt_B: Integers
    """Number of the row's prompt; the rows of a group share it."""
    constant: int | None = None
    """Tokens by which `constant_length` divides."""
    extra_tokens: float = 0.0
    extra_rows: float = 0.0
    extra_prompts: float = 0.0


def token_mean(rows: StepRows) -> Floats:
    """Return the step's tokens: each token has the same weight (what frameworks call DAPO, arXiv:2503.14476)."""
    return np.full(len(rows.tokens_B), float(rows.tokens_B.sum()) + rows.extra_tokens)


def row_mean(rows: StepRows) -> Floats:
    """Return rows x tokens of the row: the mean over rows of their token means (GRPO, arXiv:2402.03300)."""
    return rows.tokens_B.astype(np.float64) * (len(rows.tokens_B) + rows.extra_rows)


def row_sum(rows: StepRows) -> Floats:
    """Return the number of rows: the mean over rows of their token sums, as long rows weigh more than short ones."""
    return np.full(len(rows.tokens_B), len(rows.tokens_B) + rows.extra_rows)


def constant_length(rows: StepRows) -> Floats:
    """Return rows x constant: the mean over rows of token sums divided by a constant (Dr. GRPO, arXiv:2503.20783)."""
    if rows.constant is None:
        raise ValueError("constant_length has no constant: expected the tokens to divide by; set it")
    return np.full(len(rows.tokens_B), (len(rows.tokens_B) + rows.extra_rows) * rows.constant)


def prompt_mean(rows: StepRows) -> Floats:
    """Return prompts x tokens of the prompt: the mean over prompts of their token means (DAPO as in its paper)."""
    tokens_of: Floats = np.bincount(rows.prompt_B, rows.tokens_B).astype(np.float64)
    return tokens_of[rows.prompt_B] * (len(np.unique(rows.prompt_B)) + rows.extra_prompts)


def token_sum(rows: StepRows) -> Floats:
    """Return 1: the sum over tokens, which grows with the batch, and the learning rate with it."""
    return np.ones(len(rows.tokens_B))


AGGREGATIONS: dict[str, Callable[[StepRows], Floats]] = {
    "token_mean": token_mean,
    "row_mean": row_mean,
    "row_sum": row_sum,
    "constant_length": constant_length,
    "prompt_mean": prompt_mean,
    "token_sum": token_sum,
}
