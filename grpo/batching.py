"""The cut of rows into microbatches. No torch: it happens where the order becomes data, long before a forward."""

from collections.abc import Sequence


def cut_microbatches(lengths: Sequence[int], budget: int) -> list[int]:
    """Return the microbatch index of each row, ascending from 0, for rows in the order given.

    A microbatch takes the next row as long as rows x longest length stays within ``budget``, its padded tokens. A row
    longer than the budget gets a microbatch of its own. Sort by length first: neighbours then pad each other little.

    Raises:
        ValueError: if the budget is not positive.
    """
    if budget < 1:
        raise ValueError(f"the budget of a microbatch is {budget} tokens: expected at least 1; raise it")
    indices = []
    index, num_rows, longest = 0, 0, 0
    for length in lengths:
        longest = max(longest, length)
        if num_rows > 0 and (num_rows + 1) * longest > budget:
            index, num_rows, longest = index + 1, 0, length
        num_rows += 1
        indices.append(index)
    return indices
