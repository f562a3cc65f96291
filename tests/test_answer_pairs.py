"""The table of answers and references: each reward as it was worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.rewards.answers.numeric import numeric_match
from stages.rewards.answers.symbolic import math_match
from stages.rewards.base import Score

TABLE = Path(__file__).parent / "reward_cases" / "answer_pairs.tsv"
REWARDS = {"-": None, "0": 0.0, "1": 1.0}


def pairs() -> list[list[str]]:
    """Return completion, reference, and the right rewards of both functions, of each line that is no comment."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [line.replace("<br>", "\n").split("\t") for line in lines if not line.startswith(("# ", "## "))]
    assert all(len(line) == 4 for line in cells), "a line has a tab too many, or too few"
    return cells


@pytest.mark.parametrize(("function", "column"), [(math_match, 2), (numeric_match, 3)])
def test_every_answer_gets_the_reward_worked_out_by_hand(function: Callable[..., Score], column: int) -> None:
    arguments = {"seconds": 60.0} if function is math_match else {}
    found = [(*cells, function(cells[0], cells[1], **arguments)) for cells in pairs()]
    assert [cells for cells in found if cells[4].reward != REWARDS[cells[column]]] == []
    assert all("reason" in score.detail for *_, score in found if score.reward is None)


def test_the_table_is_long_enough_and_says_nothing_twice() -> None:
    known = [tuple(cells[:2]) for cells in pairs()]
    assert len(known) >= 300
    assert [pair for pair in set(known) if known.count(pair) > 1] == []
