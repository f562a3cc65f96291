"""A reward for multiple choice: which of the choices does the answer name?"""

import string
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

from pipeline.errors import RewardError
from stages.rewards.answers.answer_part import NO_REFERENCE, NOTHING_WITHIN, answer_part, shown
from stages.rewards.base import Score
from stages.rewards.words import occurs

ANSWER_WORDS = (
    r"(?:answer|choose|pick|select|antwort|r\u00e9ponse|respuesta|risposta|resposta|\u043e\u0442\u0432\u0435\u0442"
    r"|\u7b54\u6848|\u9009\u62e9|\u6b63\u89e3|\u7b54\u3048|\uc815\ub2f5|\u0627\u0644\u0625\u062c\u0627\u0628\u0629)"
)
"""English, German, French, Spanish, Italian, Portuguese, Russian, Chinese, Japanese, Korean, Arabic."""
LINK_WORDS = (
    r"(?:is|are|would be|must be|should be|option|choice|letter|ist|est|es|\u00e8|\u00e9|la|die|\u662f|\u4e3a|\u306f"
    r"|\uc740|\ub294|\u9009\u9879|\u0647\u064a)"
)
JOINING = r"(?:[,/&]|(?:and|or|und|oder|et|ou|y|o|e)\b|[\u548c\u6216\u3001])"
OPENING = r"[\s:*_\"'`({\[\u3010\uff1a\u201c\u2018$\\-]"


def choice_match(
    completion: str,
    reference: str | None,
    choices: Sequence[Any] | Mapping[str, Any] | None = None,
    within: str | None = None,
    labels: str = "ABCDE",
) -> Score:
    """Return 1 when the answer names the right choice and no other, else 0; null without a usable reference.

    The reference is a label ("B", "(B)") or the text of a choice. ``choices``, a key of the source row's metadata, is
    a list of texts, an object from label to text, or an object with the lists ``label`` and ``text``.

    The strongest way of naming that occurs decides: the answer is a label and nothing else; a label in \\boxed{}; "the
    answer is B" in eleven languages; "option B"; a label in parentheses or at the start of a line; a label as a
    word of its own; the text of a choice. If it names several choices, or a label with the text of another choice
    beside it, the answer is ambiguous: reward 0, with the labels in the detail. "Not B" and "B is wrong" name nothing;
    other negations are not understood. Small letters count alone or at the end of "the answer is b".

    Args:
        completion: the answer.
        reference: the label or text of the right choice.
        choices: the choices of the question.
        within: which part of the answer counts.
        labels: the labels, one character each, where ``choices`` does not say.
    """
    if reference is None:
        return Score(None, {"reason": NO_REFERENCE})
    texts = _texts(choices, labels)
    expected, problem = _resolve(reference, texts)
    if problem:
        return Score(None, {"reason": problem})
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"reason": NOTHING_WITHIN})
    way, named = _named_choices(part, texts)
    detail = {"chosen": named[0] if len(named) == 1 else None, "expected": expected, "named_by": way}
    if not named:
        return Score(0.0, detail | {"reason": "no choice named"})
    if len(named) > 1:
        return Score(0.0, detail | {"reason": f"ambiguous: {', '.join(named)}"})
    return Score(float(named[0] == expected), detail)


def _texts(choices: Sequence[Any] | Mapping[str, Any] | None, labels: str) -> dict[str, str]:
    """Return the folded text of each label, "" where the texts are unknown."""
    if isinstance(choices, Mapping):
        pairs = zip(choices["label"], choices["text"], strict=True) if set(choices) == {"label", "text"} else None
        texts = {str(label): str(text) for label, text in pairs or choices.items()}
    elif choices is None:
        texts = dict.fromkeys(labels, "")
    elif isinstance(choices, str) or len(choices) > 26:
        raise RewardError(f"the metadata key choices holds {choices!r}, expected at most 26 texts: correct the source")
    else:
        texts = dict(zip(string.ascii_uppercase, (str(text) for text in choices), strict=False))
    if not texts or any(len(label) != 1 or not label.isalnum() for label in texts):
        raise RewardError(f"the choices have the labels {list(texts)}, expected single letters or digits: relabel them")
    return {label: _folded_choice(text) for label, text in texts.items()}


def _resolve(reference: str, texts: Mapping[str, str]) -> tuple[str, str]:
    """Return the right label and "", or "" and why it is unknown."""
    by_label = _whole_label(reference, texts)
    by_text = [label for label, text in texts.items() if text and text == _folded(reference)]
    named = list(dict.fromkeys([*by_label, *by_text]))
    if len(named) == 1:
        return named[0], ""
    count = f"fits the choices {', '.join(named)}" if named else "is none of the choices"
    return "", f"the reference {shown(reference)!r} {count}"


def _named_choices(answer: str, texts: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """Return the strongest way in which the answer names choices, and the labels so named, in their order."""
    answer = unicodedata.normalize("NFKC", answer)
    whole = _whole_label(answer, texts)
    if whole:
        return "label alone", whole
    for way, pattern in _patterns("".join(texts)):
        matches = list(pattern.finditer(answer))
        named = {_cased(label, texts) for match in matches for label in match.captures("label")}
        for match in matches:  # "(B) London" where London is C names both
            named |= _text_beside(answer[match.end("label") :], _cased(match["label"], texts), texts)
        if named:
            return way, [label for label in texts if label in named]
    folded = _folded(answer)
    found = [label for label, text in texts.items() if text and _stands_in(folded, text, texts)]
    return ("text" if found else None), found


def _whole_label(answer: str, texts: Mapping[str, str]) -> list[str]:
    """Return the label that is the whole answer but for marks around it."""
    bare = regex.sub(r"\\(?:boxed|text|mathrm|mathbf)\b|[\W_]+", "", answer)
    label = _cased(bare, texts)
    return [label] if label in texts else []


def _cased(label: str, texts: Mapping[str, str]) -> str:
    return label if label in texts or label.swapcase() not in texts else label.swapcase()


@lru_cache(maxsize=64)
def _patterns(labels: str) -> list[tuple[str, "regex.Pattern[str]"]]:
    letter = r"[\p{Latin}\p{Cyrillic}\p{N}]"
    # no label: with an apostrophe or letter after it (A's, Both), the article (A dog), "not B", "B is wrong"
    after = rf"(?!{letter}|['\u2019]|[.,][0-9]|\s+(?:is|was)\s+(?:not|wrong|incorrect|false)\b)"
    article = rf"(?!(?<=[AI])\s+(?!{JOINING}|(?:is|because|since|as)\b)\p{{L}})"
    before = (
        rf"(?<!{letter}|[.'\u2019]|(?i:\b(?:not|neither|nor|nicht|non|pas|\u043d\u0435)|\u4e0d\u662f|n't)[\s*(]{{1,3}})"
    )
    # its first look decides nothing: it spares most characters the slow look behind
    label = rf"(?=[{regex.escape(labels)}]){before}(?<label>[{regex.escape(labels)}]){after}{article}"
    several = rf"{label}(?:[\s)*]*{JOINING}[\s(*]*{label})*"
    link = rf"(?:{OPENING}|(?i:\b{LINK_WORDS}\b)|[\u662f\u4e3a\u306f\uc740\ub294]){{0,12}}"
    small = rf"(?<label>[{regex.escape(labels.lower())}])(?=[)\]}}*\"']*(?:$|[\n.,;]))"
    return [
        ("boxed", regex.compile(rf"\\boxed\s*+\{{\s*+(?:\\\w++\s*+\{{)?+[\s(]*+{several}[\s.)]*+\}}")),
        ("statement", regex.compile(rf"(?i:{ANSWER_WORDS}){link}{several}")),
        ("statement", regex.compile(rf"(?i:{ANSWER_WORDS}){link}(?<!\p{{L}}){small}")),
        ("option", regex.compile(rf"(?i:\b(?:option|choice))s?[\s:*(]{{1,4}}{several}")),
        (
            "marked label",
            regex.compile(rf"\({several}\)|(?:^|\n)(?:[^\S\n]|\*)*+{label}\**[.):]|\*\*{several}[.)]?\*\*"),
        ),
        ("single letter", regex.compile(several)),
    ]


def _text_beside(rest: str, label: str, texts: Mapping[str, str]) -> set[str]:
    """Return the label of another choice whose text directly follows the named label."""
    following = _folded(rest[: 2 + max(len(text) for text in texts.values()) * 2])
    if not following or (texts[label] and following.startswith(texts[label])):
        return set()
    return {other for other, text in texts.items() if text and following.startswith(text) and occurs(following, text)}


def _stands_in(answer: str, text: str, texts: Mapping[str, str]) -> bool:
    """Return whether the text stands in the answer other than inside the longer text of another choice."""
    for other in texts.values():
        if text != other and text in other:
            answer = answer.replace(other, "\0")
    return occurs(answer, text)


def _folded(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(regex.sub(r"[^\w\s.,%+/\u2212-]|[.,](?!\d)", " ", plain).split())


_folded_choice = lru_cache(maxsize=4096)(_folded)
