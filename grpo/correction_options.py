"""The table [update.correction]: one class of options for each kind. Imports neither torch nor transformers.

``w`` is the ratio proximal / sampler of a token. The bounds of each kind are of another quantity, so each has its own,
with 1 among the values that they allow: that is a sampler equal to the proximal policy.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from grpo.strict import StrictModel

LowerBound = Annotated[float, Field(ge=0, le=1)]
UpperBound = Annotated[float, Field(ge=1)]


class Veto(StrictModel):
    """What stands beside every kind: rows that a single token removes, off by default (docs/decisions/0015)."""

    veto_low: float | None = Field(None, gt=0, lt=1)
    """A row with a token of a smaller w gets weight 0; null = no such rule. Long rows meet it more often."""
    veto_high: float | None = Field(None, gt=1)
    """A row with a token of a larger w gets weight 0; null = no such rule. Long rows meet it more often."""


class NoCorrection(Veto):
    """Options of `grpo.correction.none`."""

    kind: Literal["none"] = "none"


class TokenTruncate(Veto):
    """Options of `grpo.correction.token_truncate`."""

    kind: Literal["token_truncate"] = "token_truncate"
    high: UpperBound = 2.0
    """Largest weight of a token."""


class TokenClip(Veto):
    """Options of `grpo.correction.token_clip`, with the bounds of OpenRLHF."""

    kind: Literal["token_clip"] = "token_clip"
    low: LowerBound = 0.5
    """Smallest weight of a token."""
    high: UpperBound = 5.0
    """Largest weight of a token."""


class TokenMask(Veto):
    """Options of `grpo.correction.token_mask`, with the bounds of IcePop (arXiv:2510.18855)."""

    kind: Literal["token_mask"] = "token_mask"
    low: LowerBound = 0.5
    """A token of a smaller w gets weight 0."""
    high: UpperBound = 5.0
    """A token of a larger w gets weight 0."""


class SequenceTruncate(Veto):
    """Options of `grpo.correction.sequence_truncate`."""

    kind: Literal["sequence_truncate"] = "sequence_truncate"
    high: UpperBound = 2.0
    """Largest product of w over a row."""


class SequenceMask(Veto):
    """Options of `grpo.correction.sequence_mask`, with the bounds of TRL."""

    kind: Literal["sequence_mask"] = "sequence_mask"
    low: LowerBound = 0.0
    """A row with a smaller product of w gets weight 0."""
    high: UpperBound = 3.0
    """A row with a larger product of w gets weight 0."""


class GeometricMask(Veto):
    """Options of `grpo.correction.geometric_mask`: made for the mismatch of two engines, too strict for stale rows."""

    kind: Literal["geometric_mask"] = "geometric_mask"
    low: LowerBound = 0.99
    """A row with a smaller geometric mean of w gets weight 0."""
    high: UpperBound = 1.01
    """A row with a larger geometric mean of w gets weight 0."""
    token_cap: UpperBound = 2.0
    """Largest weight of a token in the rows that are kept."""


class K3Mask(Veto):
    """Options of `grpo.correction.k3_mask`: made for the mismatch of two engines, too strict for stale rows."""

    kind: Literal["k3_mask"] = "k3_mask"
    high: float = Field(0.01, gt=0)
    """A row with a larger mean of w - 1 - log w, an estimate of KL(sampler || proximal) per token, gets weight 0."""
    token_cap: UpperBound = 2.0
    """Largest weight of a token in the rows that are kept."""


def _tag(value: Any) -> Any:
    """Return the tag of a table's class; a table without a kind has the default one."""
    return value.get("kind", "token_truncate") if isinstance(value, dict) else getattr(value, "kind", None)


CorrectionConfig = Annotated[
    Annotated[NoCorrection, Tag("none")]
    | Annotated[TokenTruncate, Tag("token_truncate")]
    | Annotated[TokenClip, Tag("token_clip")]
    | Annotated[TokenMask, Tag("token_mask")]
    | Annotated[SequenceTruncate, Tag("sequence_truncate")]
    | Annotated[SequenceMask, Tag("sequence_mask")]
    | Annotated[GeometricMask, Tag("geometric_mask")]
    | Annotated[K3Mask, Tag("k3_mask")],
    Discriminator(
        _tag,
        custom_error_type="unknown_correction",
        custom_error_message="kind should be none, token_truncate, token_clip, token_mask, sequence_truncate, "
        "sequence_mask, geometric_mask or k3_mask",
    ),
]
