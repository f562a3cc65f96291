"""Reward functions for tests of whole runs."""


def share_of_digits(completion: str) -> float:
    """Return the share of characters that are digits: a random policy gets some of it."""
    return sum(c.isdigit() for c in completion) / max(len(completion), 1)
