"""A reward for tidy text: brackets, quotes, doubled words, capitals and the last full stop.

It is not a grammar check: it knows no agreement, no spelling, no syntax and no meaning, and a nonsense sentence of fine
shape gets 1. Each check holds for any script that has the thing it looks for, and is left out where it does not apply.
Known false alarms: mathematics such as [0, 1), "had had", a name that begins small (iPhone) at a sentence's start, and
quoted speech that goes on over paragraphs.
"""

from collections.abc import Callable

import regex

from stages.rewards.base import Score
from stages.rewards.words import (
    AFTER_END,
    END_MARKS,
    IS_UNSPACED,
    MOST_LISTED,
    SOUTH_EAST_ASIAN,
    clipped,
    prose,
    sentence_spans,
)

PAIRS = dict(zip(")]}\uff09\u300d\u300f\u3011\u300b", "([{\uff08\u300c\u300e\u3010\u300a", strict=True))
BRACKET = regex.compile(f"[{regex.escape(''.join([*PAIRS, *PAIRS.values()]))}]")
SMILEY = regex.compile(r"(?<!\S)[:;=][-']?[()]++(?!\w)")
ENUMERATOR = regex.compile(r"(?<!\S)[\p{L}\p{Nd}]{1,3}$")
INCHES = regex.compile(r'(?<=\p{Nd})"')

DOUBLED = regex.compile(
    r"(?<![\p{L}\p{M}\p{Nd}'\u2019-])(\p{L}[\p{L}\p{M}]*+)[ \t]++\1(?![\p{L}\p{M}\p{Nd}'\u2019-])", regex.I
)
CASED_START = regex.compile(r"[\s\"'(\[*_\u00ab\u201c\u201e\u2018\u00bf\u00a1]*+(\p{Ll})")
LAST_WORD = regex.compile(rf"\p{{L}}++(?=[{END_MARKS}]?{AFTER_END}\s*+$)")
CLOSERS = " \t\n\r\"'\u201d\u2019\u201c\u00bb)]*_~\u300d\u300f\uff09"
STRUCTURE = regex.compile(r"\s*+(?:[#|>+*\u2022-]|\p{Nd}{1,3}[.)]|\p{L}\)|https?:)")
"""A heading, table row, quotation or list item: no sentence is expected."""
NO_FULL_STOP = regex.compile(f"[{SOUTH_EAST_ASIAN}]")
"""Scripts that write sentences without a mark at their end, or may."""

LEAST_WORDS = 4
"""A shorter line (a name, a number, a title) is no sentence."""


def surface(completion: str) -> Score:
    """Return the share of applicable checks that find nothing; the detail has the findings of each, null = left out.

    brackets: each is closed by its partner; smileys and list marks such as a) are no brackets.
    quotes: straight and curly double quotes come in pairs, and so do angle quotes.
    doubled_words: no word of a script with spaces stands twice in a row.
    sentence_case: no sentence of four words or more begins with a small letter. After a word of up to three letters a
    full stop is taken for an abbreviation's.
    final_punctuation: the last line, if it has four words or more, does not end in a letter or digit.

    Code between backticks is left out. An empty answer gets 0.
    """
    if not completion.strip():
        return Score(0.0, {"reason": "empty answer"})
    text = prose(completion, instead="0")  # a digit: neither a small letter nor a doubled word
    checks: dict[str, Callable[[str], list[str] | None]] = {
        "brackets": _brackets,
        "quotes": _quotes,
        "doubled_words": _doubled_words,
        "sentence_case": _sentence_case,
        "final_punctuation": _final_punctuation,
    }
    findings = {name: check(text) for name, check in checks.items()}
    applicable = [found for found in findings.values() if found is not None]
    counts = {name: len(found) for name, found in findings.items() if found}
    listed = {name: found if found is None else found[:MOST_LISTED] for name, found in findings.items()}
    return Score(sum(not found for found in applicable) / len(applicable), {"findings": listed, "counts": counts})


def _brackets(text: str) -> list[str]:
    text = SMILEY.sub(" ", text)
    opened: list[int] = []
    findings = []
    for match in BRACKET.finditer(text):
        bracket, position = match.group(), match.start()
        if bracket not in PAIRS:
            opened.append(position)
        elif opened and text[opened[-1]] == PAIRS[bracket]:
            opened.pop()
        elif opened or not ENUMERATOR.search(text, max(position - 4, 0), position):
            findings.append(_around(text, position))
    return [*findings, *(_around(text, position) for position in opened)]


def _quotes(text: str) -> list[str]:
    findings = []
    # a mark after a digit may close a quotation or mean inches: count it whichever way comes out even
    if text.count('"') % 2 and INCHES.sub("", text).count('"') % 2:
        findings.append('odd number of "')
    if sum(map(text.count, "\u201c\u201d\u201e")) % 2:
        findings.append("odd number of curly double quotes")
    if text.count("\u00ab") != text.count("\u00bb"):
        findings.append("angle quotes that are not closed")
    return findings


def _doubled_words(text: str) -> list[str]:
    return [clipped(m.group()) for m in DOUBLED.finditer(text) if not IS_UNSPACED.match(m.group(1))]


def _sentence_case(text: str) -> list[str] | None:
    findings: list[str] = []
    num_sentences = 0
    is_abbreviation = False
    for start, end in sentence_spans(text, is_wrapped=True):
        sentence = text[start:end]
        is_paragraph = not start or text[start - 2 : start] == "\n\n"
        if not STRUCTURE.match(sentence) and len(sentence.split(None, LEAST_WORDS)) >= LEAST_WORDS:
            num_sentences += 1
            if CASED_START.match(sentence) and (is_paragraph or not is_abbreviation):
                findings.append(clipped(sentence.strip(), 60))
        last = LAST_WORD.search(sentence[-100:])
        is_abbreviation = last is not None and len(last.group()) <= 3
    return findings if num_sentences else None


def _final_punctuation(text: str) -> list[str] | None:
    line = text.rstrip().rpartition("\n")[2]
    ending = line.rstrip(CLOSERS)[-1:]
    num_words = len(line.split(None, LEAST_WORDS))
    is_sentence = num_words >= LEAST_WORDS or (IS_UNSPACED.search(line) and len(line) >= LEAST_WORDS * 2)
    if not ending or not is_sentence or STRUCTURE.match(line) or NO_FULL_STOP.match(ending):
        return None
    return [clipped(line[-60:])] if ending.isalnum() else []


def _around(text: str, position: int) -> str:
    return text[max(position - 20, 0) : position + 20].strip()
