"""Rewards that compare the words of the answer with the reference answer.

All take ``within``, a regular expression for the part of the answer that counts (`answers.answer_part`), and accept
further references from the metadata key ``references``, a list. Without any reference the reward is null.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import regex

from stages.rewards.answers.answer_part import NO_REFERENCE, NOTHING_WITHIN, accepted_answers, answer_part, shown
from stages.rewards.base import Score
from stages.rewards.words import UNSPACED

TOKEN = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^\s{UNSPACED}]+")
PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]+")
"""Unicode's punctuation and the rest of ASCII's, as SQuAD's script has it."""
ARTICLES = ("a", "an", "the")


def exact_match(
    completion: str,
    reference: str | None,
    references: Sequence[Any] | None = None,
    within: str | None = None,
    ignore_case: bool = False,
    ignore_unicode_form: bool = False,
    ignore_white_space: bool = False,
    ignore_punctuation: bool = False,
) -> Score:
    """Return 1 when the answer equals a reference, outer white space aside, else 0.

    Args:
        completion: the answer.
        reference: the reference answer.
        references: further accepted answers.
        within: which part of the answer counts.
        ignore_case: compare case-folded text, as in "STRASSE" and the same word with a sharp s.
        ignore_unicode_form: compare in the form NFKC, in which full-width letters and ligatures are plain ones.
        ignore_white_space: any run of white space is one blank.
        ignore_punctuation: leave out all punctuation; "3.14" and "314" are then equal.
    """
    accepted = accepted_answers(reference, references)
    if not accepted:
        return Score(None, {"reason": NO_REFERENCE})
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"reason": NOTHING_WITHIN})
    options = (ignore_case, ignore_unicode_form, ignore_white_space, ignore_punctuation)
    answer = _plain(part, *options)
    matched = next((text for text in accepted if _plain_reference(text, *options) == answer), None)
    return Score(float(matched is not None), {"answer": shown(answer), "matched": matched and shown(matched)})


def _plain(text: str, case: bool, form: bool, white_space: bool, punctuation: bool) -> str:
    if form:
        text = unicodedata.normalize("NFKC", text)
    if case:
        text = text.casefold()
        if form:  # folding can leave a letter and its mark apart again
            text = unicodedata.normalize("NFKC", text)
    if punctuation:
        text = PUNCTUATION.sub("", text)
    return " ".join(text.split()) if white_space else text.strip()


_plain_reference = lru_cache(maxsize=4096)(_plain)


def token_f1(
    completion: str,
    reference: str | None,
    references: Sequence[Any] | None = None,
    within: str | None = None,
    ignore_words: Sequence[str] = ARTICLES,
) -> Score:
    """Return the harmonic mean of precision and recall of the answer's words, for the nearest reference.

    SQuAD's measure (arXiv:1606.05250): case, punctuation and articles do not count, a word counts as often as it
    occurs. Here words are Unicode's, and in scripts without blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each
    character is one. Punctuation is left out, not split at, so numbers lose their point and sign: see `numeric_match`.

    Args:
        completion: the answer.
        reference: the reference answer.
        references: further accepted answers.
        within: which part of the answer counts.
        ignore_words: words that do not count, in small letters; the default suits English.
    """
    accepted = accepted_answers(reference, references)
    if not accepted:
        return Score(None, {"reason": NO_REFERENCE})
    ignored = frozenset(ignore_words)
    known = [(text, words) for text in accepted if (words := _reference_words(text, ignored))]
    if not known:
        return Score(None, {"reason": f"no words in the reference {shown(accepted[0])!r}"})
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"reason": NOTHING_WITHIN})
    answer = _words(part, ignored)
    best = max((_overlap(answer, words, text) for text, words in known), key=lambda score: score.reward or 0.0)
    return best


def _overlap(answer: Counter[str], expected: Counter[str], reference: str) -> Score:
    common = (answer & expected).total()
    precision = common / answer.total() if answer else 0.0
    recall = common / expected.total()
    detail = {"precision": precision, "recall": recall, "common_words": common, "reference": shown(reference)}
    return Score(2 * precision * recall / (precision + recall) if common else 0.0, detail)


def _words(text: str, ignored: frozenset[str]) -> Counter[str]:
    plain = PUNCTUATION.sub("", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))
    return Counter(word for word in TOKEN.findall(plain) if word not in ignored)


_reference_words = lru_cache(maxsize=4096)(_words)
