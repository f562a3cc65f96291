"""Rewards that compare the answer with the reference answer."""


def exact_match(completion: str, reference: str | None) -> float | None:
    """Return 1 when the answer equals the reference, outer white space aside, else 0; null without a reference."""
    if reference is None:
        return None
    return float(completion.strip() == reference.strip())
