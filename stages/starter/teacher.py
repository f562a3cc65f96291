"""The careless teacher: demonstrations of a task with the mistakes that a pupil makes.

In sums it forgets to carry; in every task it slips now and then. Imitation learns the mistakes together with the
skill, which leaves something for a verifier to remove.
"""

import random
import re
from collections.abc import Sequence

SUM = re.compile(r"\d+(?: *\+ *\d+)+")


def demonstrate(
    rows: Sequence[tuple[str, str]], *, count: int, forget_rate: float, slip_rate: float, seed: int
) -> list[tuple[int, str]]:
    """Return ``count`` demonstrations, each the index of its row and the teacher's answer to it.

    ``rows`` are questions with their right answers. Rows are drawn with replacement, and a row that is drawn again is
    answered anew: the teacher forgets the carry of a sum with probability ``forget_rate``, and then slips with
    probability ``slip_rate``.
    """
    generator = random.Random(seed)
    demonstrations = []
    for _ in range(count):
        index = generator.randrange(len(rows))
        question, answer = rows[index]
        if generator.random() < forget_rate:
            answer = forget_carry(question, answer)
        if generator.random() < slip_rate:
            answer = slip(answer, other=rows[generator.randrange(len(rows))][1], generator=generator)
        demonstrations.append((index, answer))
    return demonstrations


def forget_carry(question: str, answer: str) -> str:
    """Return the question's sum added without carrying, or ``answer`` if the question has no sum with that result.

    The columns are added one by one, and only the last digit of each is kept; the leftmost is written in full:
    57 + 83 gives 130, 95 + 8 gives 93, 5 + 8 gives 13.
    """
    for expression in SUM.findall(question):
        addends = [addend.strip() for addend in expression.split("+")]
        if str(sum(map(int, addends))) == answer:
            width = max(map(len, addends))
            columns = [sum(map(int, column)) for column in zip(*(a.zfill(width) for a in addends), strict=True)]
            return str(columns[0]) + "".join(str(column % 10) for column in columns[1:])
    return answer


def slip(answer: str, *, other: str, generator: random.Random) -> str:
    """Return a wrong answer: one digit changed, or, where there is none, ``other``, the answer to another row.

    An answer without digits that equals ``other`` comes back unchanged.
    """
    places = [place for place, character in enumerate(answer) if character in "0123456789"]
    if not places:
        return other
    place = generator.choice(places)
    digit = str((int(answer[place]) + generator.randint(1, 9)) % 10)
    return answer[:place] + digit + answer[place + 1 :]
