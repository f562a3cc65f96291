"""Words, content words and sentences of a text in any script, by rules that need no model.

A word is a run of letters, marks and digits; a number keeps its separators (3.14 is one word). It is cut at apostrophes
and hyphens, so that "France's" has the word "france". In scripts that put no space between words (Chinese, Japanese,
Thai, Lao, Khmer, Burmese) each character, with its marks, counts as a word. Emoji and punctuation are no words.

Every rule is a single pass: the work grows in proportion to the text.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import regex

from pipeline.errors import RewardError

SOUTH_EAST_ASIAN = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
UNSPACED = rf"\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Bopomofo}}{SOUTH_EAST_ASIAN}\u30fc"
"""Characters of the scripts without spaces; U+30FC lengthens a vowel in Japanese and belongs to no script."""

WORD = regex.compile(
    rf"[{UNSPACED}]\p{{M}}*+|\p{{Nd}}++(?:[.,]\p{{Nd}}++)++|[[\p{{L}}\p{{N}}]--[{UNSPACED}]]"
    rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]*+",
    regex.V1,
)
IS_UNSPACED = regex.compile(f"[{UNSPACED}]")
HAS_BORDERS_INSIDE = regex.compile(rf"[{UNSPACED}\p{{Hangul}}]")
"""Korean has spaces, but writes particles onto the words."""
END_MARKS = ".!?\u2026\u061f\u06d4\u0964"
AFTER_END = "[\"'\u201d\u2019\u00bb)\\]*_]*+"
"""What may stand between the mark and the space: quotes, brackets, emphasis of Markdown."""
SENTENCE_END = regex.compile(rf"[{END_MARKS}]{AFTER_END}\s++|[\u3002\uff01\uff1f]++|\n++")
INVISIBLE = dict.fromkeys((0x00AD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF))
TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u02bc`", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
)

MOST_LISTED = 20
"""Entries of a list in a detail; the counts beside it are of all."""

STOP_WORDS = {
    "en": """
        a an and any are as at be been being but by can could d did do does doing don for from had has have
        having he her here hers him his how i if in into is it its just ll m may me might more most must my
        no nor not of on or our ours please re s shall she should so some such t than that the their theirs
        them then there these they this those to too us ve very was we were what when where which who whom
        whose why will with would you your yours
        """,
    "de": """
        aber alle als also am an auch auf aus bei beim bin bis bist bitte da das dass dein deine dem den der
        des die dies diese diesem diesen dieser dieses doch du durch ein eine einem einen einer eines er es
        euch euer für hat hatte hatten haben ich ihm ihn ihnen ihr ihre ihrem ihren ihrer im in ist ja kann
        kein keine können man mein meine mich mir mit muss nach nicht noch nur ob oder ohne sein seine
        seinem seinen seiner sich sie sind so soll um und uns unser unter vom von vor wann war waren warum
        was wegen weil welche welcher welches wem wen wenn wer werden wie wir wird wo wurde zu zum zur über
        """,
    "fr": """
        a ai au aux avec c ce ces cet cette comme comment d dans de des donc du elle elles en es est et eu
        il ils j je l la le les leur leurs lui m ma mais me mes moi mon n ne nos notre nous où on ont ou par
        pas pour pourquoi qu quand que quel quelle quelles quels qui quoi s sa sans se ses si son sont sous
        sur t ta te tes toi ton tu un une vos votre vous y à été être
        """,
    "es": """
        a al como con cuál cuándo cómo de del desde donde dónde e el ella ellas ellos en entre era es esa
        ese eso esta este esto está están ha han hay la las le les lo los me mi mis muy más ni no nos
        nosotros o para pero por porque que quién qué se ser si sin sobre son su sus sí te tu tus tú u un
        una unas uno unos usted y ya yo él
        """,
    "it": """
        a agli ai al alla alle allo anche c che chi ci come con cosa cui d da dai dal dalla dalle dallo dei
        del della delle dello di dove e ed era gli ha hanno ho i il in io l la le lei lo loro lui ma me mi
        mia mio ne negli nei nel nella nelle non o per perché più qual quale quali quando quello questa
        questo se si sia sono su sua sue sui sul sulla suo suoi ti tra tu tuo un una uno vi voi è
        """,
    "zh": "的 了 在 是 和 与 也 都 就 吗 呢 吧 啊 着 过 把 被 我 你 他 她 它 们 这 那 请",
}
"""Words that carry no topic: articles, pronouns, prepositions, conjunctions, auxiliaries, question words, and what
apostrophes leave over. Short on purpose: a word that is missing here only counts as content."""


def words(text: str) -> list[str]:
    """Return the words in order, case-folded and in compatibility form (NFKC): full width equals half width."""
    found: list[str] = WORD.findall(unicodedata.normalize("NFKC", text.translate(INVISIBLE)).casefold())
    return found


def content_words(text: str, stop_words: str | Sequence[str]) -> list[str]:
    """Return the words that are no stop words, see `stop_set`."""
    left_out = stop_set(stop_words)
    return [word for word in words(text) if word not in left_out]


def stop_set(stop_words: str | Sequence[str]) -> frozenset[str]:
    """Return the stop words, folded as `words` folds: of a key of `STOP_WORDS`, of "none", or of a list of words.

    Raises:
        RewardError: when a name stands for no list.
    """
    return _stop_set(stop_words if isinstance(stop_words, str) else tuple(stop_words))


@lru_cache(maxsize=64)
def _stop_set(stop_words: str | tuple[str, ...]) -> frozenset[str]:
    if stop_words == "none":
        return frozenset()
    if isinstance(stop_words, tuple):
        return frozenset(word for entry in stop_words for word in words(entry))
    if stop_words not in STOP_WORDS:
        raise RewardError(
            f"stop_words is {stop_words!r}, which names no list; expected one of {sorted(STOP_WORDS)} or 'none': "
            "choose one, or give a list of words"
        )
    return frozenset(words(STOP_WORDS[stop_words]))


def ngrams(tokens: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    """Return all runs of ``length`` neighbours, in order; none when there are fewer tokens."""
    return zip(*(tokens[start:] for start in range(length)), strict=False)


def sentences(text: str) -> list[str]:
    """Return the sentences and lines, stripped, without empty ones. An abbreviation's full stop ends one, too."""
    return [part for start, end in sentence_spans(text) if (part := text[start:end].strip())]


def sentence_spans(text: str, is_wrapped: bool = False) -> Iterable[tuple[int, int]]:
    """Return start and end of each sentence; in a wrapped text a single line end is no border."""
    ends = (end.end() for end in SENTENCE_END.finditer(text) if not (is_wrapped and end.group() == "\n"))
    return pairwise([0, *ends, len(text)])


def prose(text: str, instead: str = " ") -> str:
    """Return the text with ``instead`` for what stands between backticks: code has another grammar than language.

    An open block (```) reaches to the end; an open single backtick is text.
    """
    parts = " ".join(text.split("```")[::2]).split("`")
    unclosed = parts.pop() if len(parts) % 2 == 0 else ""
    return instead.join(parts[::2]) + unclosed


def folded(text: str) -> str:
    """Return the text without differences of case, white space, width, and the shape of quotes and dashes."""
    plain = unicodedata.normalize("NFKC", text.translate(INVISIBLE).translate(TYPOGRAPHY)).translate(TYPOGRAPHY)
    # folding can leave a letter and its mark apart again
    return " ".join(unicodedata.normalize("NFKC", plain.casefold()).split())


def occurs(text: str, phrase: str) -> bool:
    """Return whether the phrase stands in the text as whole words or whole numbers."""
    start = text.find(phrase)
    while start >= 0:
        if _is_border(text, start) and _is_border(text, start + len(phrase)):
            return True
        start = text.find(phrase, start + 1)
    return False


def _is_border(text: str, position: int) -> bool:
    """Return whether a word or number can begin or end at this position."""
    if position in (0, len(text)):
        return True
    before, after = text[position - 1], text[position]
    if _is_in_word(before) and _is_in_word(after):
        # a mark belongs to the letter before it even where words have no spaces between them
        return not unicodedata.category(after).startswith("M") and bool(HAS_BORDERS_INSIDE.search(before + after))
    if before in ".," and after.isdecimal():  # 5 does not occur in 2.5
        return not (position > 1 and text[position - 2].isdecimal())
    if after in ".," and before.isdecimal():  # nor in 5.2
        return not text[position + 1 : position + 2].isdecimal()
    return True


def _is_in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def clipped(text: str, most: int = 80) -> str:
    """Return the text, cut to ``most`` characters for a detail."""
    return text if len(text) <= most else text[: most - 3] + "..."
