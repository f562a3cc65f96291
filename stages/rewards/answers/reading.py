"""What an answer says: mathematics, words, a number in a base, or a quantity in two units."""

from typing import Any, NamedTuple

import regex

from stages.rewards.answers.latex import WORDED, Unreadable, plain_latex
from stages.rewards.answers.parser import expression
from stages.rewards.answers.units import LETTERS, quantity

BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
BASED = regex.compile(
    r"\(?(?<digits>[0-9A-Z]*[0-9][0-9A-Z]*)\)?\s*_\s*\{?\s*(?:\\(?:text|mathrm|mbox)\s*\{)?\s*"
    rf"(?<base>[0-9]{{1,2}}|{'|'.join(BASES)})\s*\}}{{0,2}}"
)
WORDS = regex.compile(r"[\p{L}\s.,;:!?'\u2019()-]*+")
LONG_WORD = regex.compile(r"(?!(?:sin|cos|tan|log|sqrt|exp)\b)\p{L}{4,}|[^\x00-\x7f]|(?i:\b(?:yes|no|odd|all)\b)")
TWO_LETTERS = regex.compile(r"\p{L}{2}")
LETTERS_ONLY = regex.compile(r"\W*+\p{L}(?:\W++(?:(?:and|or)\W++)?\p{L})*+\W*+")
"""Variables, or the letters of choices: A, B and C."""
ONE_LETTER_UNIT = regex.compile(
    rf"(?:.*=)?\s*([+-]?[0-9][0-9.,]*+)(?:\s|~|\\[,;: ])*[{LETTERS}](?:\s?\^\s?\{{?-?[1-3]\}}?|[\u00b2\u00b3])?"
)
STEP = regex.compile(
    r"(?<opens>[(\[{])|(?<closes>[)\]}])|(?<parts>[;\n]|,(?![0-9]{3}(?![0-9]))|\b(?:and|or)\b|\\begin)"
    r"|(?<leads>(?<![<>!=])=(?![=>])|[-=]{1,3}>|[\u2192\u21d2]|\\(?:implies|(?:Long)?[Rr]ightarrow|to)(?![A-Za-z]))"
)
"""What a calculation leads to stands behind its last = or arrow; what has several parts is no calculation."""
LIST_OF_THREES = regex.compile(r"[0-9]{1,3}(?:,[0-9]{3})++")
HAS_BRACES = regex.compile(r"\\\{|\\lbrace")
SAME_TEXT = regex.compile(r"[\s$]+(?![0-9])|(?<![0-9])[\s$]+|\\[,;:! ]|\\(?:left|right)(?![A-Za-z])")


class Reading(NamedTuple):
    """What one text says; what it cannot be is None."""

    text: str
    values: tuple[Any, ...] = ()
    """The sympy expressions that it may mean: 100,200 is a list or one number."""
    words: str | None = None
    based: tuple[str, int] | None = None
    quantity: tuple[tuple[str, str], ...] | None = None
    number_with_letter: Any = None
    """The number of "5m" or "x = 5 m^2", whose letter may be a unit."""
    is_result: bool = False
    """It is what a calculation leads to, whose other sides could not be read."""

    @property
    def is_in_words(self) -> bool:
        """Whether the text is words, or the letter of a choice."""
        return self.words is not None or len(_folded(WORDED.sub(r"\1", self.text))) == 1

    def says(self, words: str) -> bool:
        """Return whether the words are the same, whatever their case and punctuation."""
        return _folded(WORDED.sub(r" \1 ", self.text)) == _folded(WORDED.sub(r" \1 ", words))

    @property
    def is_braced(self) -> bool:
        return HAS_BRACES.search(self.text) is not None


def read(text: str) -> Reading:
    """Return what the text says, all of it.

    Raises:
        Unreadable: when part of it has no meaning here.
    """
    text = text.strip()
    bare = WORDED.sub(r" \1 ", text).strip()
    has_word = LONG_WORD.search(bare) or (bare != text and TWO_LETTERS.search(bare))
    if has_word and WORDS.fullmatch(bare) and not LETTERS_ONLY.fullmatch(bare):
        return Reading(text, words=_folded(bare))
    parts = quantity(text)
    if parts is not None:
        return Reading(text, quantity=parts)
    based = BASED.fullmatch(text.replace("$", "").rstrip("."))
    if based:
        base = BASES.index(based["base"]) + 2 if based["base"] in BASES else int(based["base"])
        if base == 10:
            return read(based["digits"])
        try:
            int(based["digits"], base)
        except ValueError:
            raise Unreadable(text) from None
        return Reading(text, based=(based["digits"].lstrip("0") or "0", base))
    values = [expression(plain_latex(text))]
    if LIST_OF_THREES.fullmatch(text):
        values.append(expression(text.replace(",", ", ")))
    unit = ONE_LETTER_UNIT.fullmatch(text)
    return Reading(text, tuple(values), number_with_letter=expression(plain_latex(unit[1])) if unit else None)


def read_answer(text: str) -> Reading:
    """Return what the text says; of a calculation that cannot be read, as \\sum_k k = 55, what it leads to.

    Raises:
        Unreadable: when that has no meaning here, too.
    """
    try:
        return read(text)
    except Unreadable:
        result = _result(text)
        if not result:
            raise
        return read(result)._replace(is_result=True)


def _result(text: str) -> str:
    """Return what stands behind the last = or arrow outside of brackets; "" where there is none, or several parts."""
    depth, start = 0, len(text)
    for step in STEP.finditer(text):
        depth += bool(step["opens"]) - bool(step["closes"])
        if depth == 0 and step["parts"]:
            return ""
        if depth == 0 and step["leads"]:
            start = step.end()
    return text[start:].strip()


def is_same_text(text: str, other: str) -> bool:
    """Return whether two texts are the same but for blanks, dollars and sizes of brackets."""
    return bool(SAME_TEXT.sub("", text) == SAME_TEXT.sub("", other))


def _folded(words: str) -> str:
    return " ".join(regex.findall(r"[\p{L}\p{M}]+", words.casefold()))
