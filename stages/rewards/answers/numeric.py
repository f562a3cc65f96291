"""A reward that compares a number in the answer with the reference answer, however either is written."""

from collections.abc import Iterable, Iterator, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import regex

from stages.rewards.answers.answer_part import NO_REFERENCE, NOTHING_WITHIN, accepted_answers, answer_part, shown
from stages.rewards.answers.plain_numbers import NARROW_BLANKS, UNIT_POWER, is_formula, with_plain_digits
from stages.rewards.base import Score

ARITHMETIC = Context(prec=100, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
"""Enough digits for every exact answer; without traps a number beyond all bounds is an infinity, not an exception."""
CURRENCY = r"(?:\p{Sc}|\b(?:USD|EUR|GBP|CHF|JPY|CNY|INR|AUD|CAD|NOK|SEK|DKK|PLN|RUB|KRW|BRL|MXN|US\$|R\$|Rs\.?|kr\.?))"
ALPHABETS = r"\p{Latin}\p{Greek}\p{Cyrillic}"
"""A digit after one of their letters belongs to a name (H2O, x1); other scripts write numbers without a blank."""


class Found(NamedTuple):
    """A number of a text."""

    value: Decimal
    text: str


def numeric_match(
    completion: str,
    reference: str | None,
    references: Sequence[Any] | None = None,
    within: str | None = None,
    which: Literal["last", "first", "only"] = "last",
    absolute: float = 0.0,
    relative: float = 1e-9,
    decimal: Literal[".", ","] = ".",
    reference_decimal: Literal[".", ","] = ".",
    percent: Literal["hundredths", "ignored"] = "hundredths",
    accounting: bool = False,
) -> Score:
    """Return 1 when a number of the answer equals the reference within a tolerance, else 0; null without a reference.

    Read are thousands separators, powers of ten, fractions and mixed numbers (LaTeX's too), per cent and per mille,
    currencies and units around, minus signs and digits of any script. Not read are number words ("five", "million")
    and what is no well-formed number under ``decimal``, such as "3,14" with a decimal point, versions, dates with
    slashes, times and ratios with a colon, powers but of ten, roots, multiples of pi, numbers with a base or behind a
    plus-minus sign: they are passed over whole, never read in parts. A reference that is a formula gives null.

    Args:
        completion: the answer.
        reference: the reference answer; one number, with anything but numbers around it.
        references: further accepted answers.
        within: which part of the answer counts.
        which: the number that counts if there are several; with "only" different numbers give 0.
        absolute: how far the number may lie from the reference, or
        relative: as a share of the reference, whichever allows more.
        decimal: the decimal sign of the answer. With the comma, points and blanks separate thousands; with the point,
            commas and narrow or non-breaking blanks do.
        reference_decimal: the decimal sign of the references.
        percent: whether 45% is 0.45 ("hundredths") or 45 ("ignored").
        accounting: whether a number alone in parentheses is negative.
    """
    accepted = accepted_answers(reference, references)
    if not accepted:
        return Score(None, {"reason": NO_REFERENCE})
    expected = [
        found[0].value
        for text in accepted
        if len(found := _reference_numbers(text, reference_decimal, percent, accounting)) == 1
    ]
    if not expected:
        return Score(None, {"reason": f"not exactly one number in the reference {shown(accepted[0])!r}"})
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"reason": NOTHING_WITHIN})
    matches = _matches(part, decimal)
    detail: dict[str, Any] = {"reference": _plain(expected[0]), "num_numbers": len(matches)}
    numbers = _numbers(reversed(matches) if which == "last" else matches, decimal, percent, accounting)
    chosen = next(numbers, None)
    if chosen is None:
        return Score(0.0, detail | {"reason": "no number in the answer"})
    if which == "only" and any(number.value != chosen.value for number in numbers):
        return Score(0.0, detail | {"reason": "several numbers in the answer"})
    matched = next((value for value in expected if _is_near(chosen.value, value, absolute, relative)), None)
    detail |= {"number": _plain(chosen.value), "text": shown(chosen.text)}
    if matched is not None:
        detail["reference"] = _plain(matched)
    return Score(float(matched is not None), detail)


def _is_near(value: Decimal, expected: Decimal, absolute: float, relative: float) -> bool:
    allowed = max(Decimal(str(absolute)), ARITHMETIC.multiply(Decimal(str(relative)), expected.copy_abs()))
    return ARITHMETIC.abs(ARITHMETIC.subtract(value, expected)) <= allowed


def _plain(value: Decimal) -> float | str:
    """Return the number as a JSON number, or as text where a double cannot hold it."""
    number = float(value)
    return str(value) if number in (float("inf"), float("-inf")) or (number == 0 and value) else number


def _matches(text: str, decimal: str) -> list["regex.Match[str]"]:
    return list(_pattern(decimal).finditer(with_plain_digits(text, decimal)))


def _numbers(matches: Iterable["regex.Match[str]"], decimal: str, percent: str, accounting: bool) -> Iterator[Found]:
    """Return the numbers that the matches hold, each worked out when it is asked for: a long answer has many."""
    for match in matches:
        value = _value(match, decimal, percent)
        if not value.is_finite():
            continue
        text = match.string
        is_enclosed = (
            match.start() > 0 and text[match.start() - 1] == "(" and text[match.end() : match.end() + 1] == ")"
        )
        yield Found(value.copy_negate() if accounting and is_enclosed and value > 0 else value, match.group().strip())


@lru_cache(maxsize=4096)
def _reference_numbers(text: str, decimal: str, percent: str, accounting: bool) -> list[Found]:
    """Return the numbers of a reference; none when it is a formula or has digits that are no number."""
    plain = with_plain_digits(text, decimal)
    matches = list(_pattern(decimal).finditer(plain))
    rest = _pattern(decimal).sub("", UNIT_POWER.sub("", plain))
    if is_formula(plain) or any(letter.isdecimal() for letter in rest):
        return []
    return list(_numbers(matches, decimal, percent, accounting))


@lru_cache(maxsize=2)
def _pattern(decimal: str) -> "regex.Pattern[str]":
    point = regex.escape(decimal)
    separators = rf"[,'\u2019_{NARROW_BLANKS}]" if decimal == "." else rf"[.'\u2019{NARROW_BLANKS} ]"
    grouped = rf"[0-9]{{1,3}}(?:(?<separator>{separators})[0-9]{{3}})(?:(?P=separator)[0-9]{{3}})*"
    lakhs = r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|" if decimal == "." else ""
    digits = rf"(?:{lakhs}{grouped}|[0-9]+)"
    bare_decimals = r"|\.[0-9]+" if decimal == "." else ""
    number = rf"(?:{digits}(?:{point}[0-9]+)?{bare_decimals})"
    divisor = number.replace("separator", "separator2")
    zero = r"[0.,]+(?![0-9.,])"
    sign = r"(?:(?<![0-9\p{L})\]}])[+-]|(?<=(?:^|[=:(])\s{0,3})[+-]\s)"
    return regex.compile(
        # the first line decides nothing: it spares most characters the slow look behind
        r"(?=[0-9.+\p{Sc}A-Zk-])"
        rf"(?<![0-9_^{ALPHABETS}]|[0-9][.,:'/]|[0-9]\s/\s?|[\^_][{{(]-?|[0-9{ALPHABETS})\]}}]\*\*|\s\*\*\s)"
        rf"(?<sign>{sign})?(?:{CURRENCY}\s?)?(?<inner_sign>[+-](?=[0-9.]))?"
        rf"(?:(?<whole>[0-9]+)\s(?<top>[0-9]+)/(?!{zero})(?<bottom>[0-9]+)"
        rf"|(?<number>{number}(?:[eE][+-]?[0-9]+)?)(?:\s?/\s?(?!{zero})(?<divisor>{divisor}))?)"
        r"(?:\s?(?<percent>%|\u2030|per\s?cent\b|pct\b))?"
        rf"(?![0-9_]|[.,:'][0-9]|\s?/\s?[0-9]|\s?\^|\*\*[0-9({ALPHABETS}-]|\s\*\*\s)"
    )


def _value(match: "regex.Match[str]", decimal: str, percent: str) -> Decimal:
    if match["whole"]:
        part = ARITHMETIC.divide(Decimal(match["top"]), Decimal(match["bottom"]))
        value = ARITHMETIC.add(Decimal(match["whole"]), part)
    else:
        value = _decimal(match["number"], decimal)
        if match["divisor"]:
            value = ARITHMETIC.divide(value, _decimal(match["divisor"], decimal))
    if "-" in ((match["sign"] or "").strip(), match["inner_sign"]):
        value = value.copy_negate()
    if match["percent"] and percent == "hundredths":
        value = ARITHMETIC.divide(value, Decimal(1000 if match["percent"] == "\u2030" else 100))
    return value


def _decimal(text: str, decimal: str) -> Decimal:
    mantissa, *exponent = text.replace("E", "e").split("e")
    whole, _, fraction = mantissa.partition(decimal)
    digits = "".join(c for c in whole if c.isdecimal())
    return ARITHMETIC.create_decimal(f"{digits or '0'}.{fraction}e{exponent[0] if exponent else 0}")
