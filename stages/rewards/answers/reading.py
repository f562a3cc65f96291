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
ONE_LETTER_UNIT = regex.compile(rf"\s*([+-]?[0-9][0-9.,]*+)[{LETTERS}]\s*")
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
    """The number of "5m", whose letter may be a unit."""

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


def is_same_text(text: str, other: str) -> bool:
    """Return whether two texts are the same but for blanks, dollars and sizes of brackets."""
    return bool(SAME_TEXT.sub("", text) == SAME_TEXT.sub("", other))


def _folded(words: str) -> str:
    return " ".join(regex.findall(r"[\p{L}\p{M}]+", words.casefold()))
