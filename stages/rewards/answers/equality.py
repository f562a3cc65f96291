"""Whether two readings say the same."""

import math
from typing import Any

from stages.rewards.answers.reading import Reading

PRECISION = 30
"""Significant digits with which numbers are worked out before they are compared."""


def is_same(expected: Reading, found: Reading, digits: int) -> bool | None:
    """Return whether the answer says what the reference says; None where this is not decided.

    Not decided: a number with a base against the same number without one; quantities in several units against other
    units; the result of a calculation against an equation.
    """
    if found.is_result and any(_last_side(value) is not value for value in expected.values):
        return None
    if expected.based or found.based:
        return _is_same_in_base(expected, found)
    if expected.quantity or found.quantity:
        return _is_same_quantity(expected, found)
    if expected.words is not None or found.words is not None:
        return expected.words is not None and expected.words == found.words
    meanings = [*found.values, *([] if found.number_with_letter is None else [found.number_with_letter])]
    return any(_is_equal(value, other, digits, expected, found) for value in expected.values for other in meanings)


def _is_same_in_base(expected: Reading, found: Reading) -> bool | None:
    if expected.based and found.based:
        return int(*expected.based) == int(*found.based) and expected.based[1] == found.based[1]
    based, other = (expected, found) if expected.based else (found, expected)
    digits, base = based.based or ("0", 10)
    if not other.values:
        return False
    plain = (int(digits, base), int(digits) if digits.isdecimal() else None)
    return None if other.values[0] in plain else False


def _is_same_quantity(expected: Reading, found: Reading) -> bool | None:
    one, other = expected.quantity, found.quantity
    if one and other:
        units = [[unit for _, unit in parts] for parts in (one, other)]
        if units[0] == units[1]:
            return [number for number, _ in one] == [number for number, _ in other]
        return False if len(one) == len(other) == 1 else None
    parts, single = (one, found) if one else (other, expected)
    assert parts is not None
    if len(parts) > 1:
        return None if single.values else False
    hour, _, minutes = parts[0][0].partition(":")
    text = single.text.strip("$ ")
    return text in (parts[0][0], f"0{parts[0][0]}") or (minutes == "00" and text == hour)


def _is_equal(value: Any, other: Any, digits: int, expected: Reading, found: Reading) -> bool:
    from math_verify import verify
    from sympy import FiniteSet

    is_set, is_other_set = (isinstance(_last_side(side), FiniteSet) for side in (value, other))
    if (is_set and not is_other_set and expected.is_braced) or (is_other_set and not is_set and found.is_braced):
        return False  # a set in braces is no interval, no point and no number
    places = _decimal_places((value, other), digits)
    try:
        is_equal = verify([value], [other], float_rounding=places, timeout_seconds=None, raise_on_error=True)
    except Exception:  # two things that sympy cannot compare are not equal
        return False
    return bool(is_equal) and not _are_apart(value, other, digits)


def _last_side(value: Any) -> Any:
    from sympy import Eq

    return value.rhs if isinstance(value, Eq) else value


def _decimal_places(values: tuple[Any, ...], digits: int) -> int:
    """Return the places after the point that ``digits`` significant digits of the smallest decimal below 1 take."""
    from sympy import Float

    sizes = [abs(float(number)) for value in values for number in value.atoms(Float)]
    return max((_places(size, digits) for size in sizes if size), default=digits)


def _places(size: float, digits: int) -> int:
    return digits if size >= 1 else digits - 1 - math.floor(math.log10(size))


def _are_apart(value: Any, other: Any, digits: int) -> bool:
    """Return whether both are numbers that differ within their digits; what is tiny is not equal to all that is."""
    from sympy import Expr, Float

    sides = [_last_side(side) for side in (value, other)]
    if not all(isinstance(side, Expr) and side.is_number for side in sides) or sides[0] == sides[1]:
        return False
    try:
        first, second = (complex(side.evalf(PRECISION)) for side in sides)
    except (TypeError, ValueError, OverflowError):
        return False
    largest = max(abs(first), abs(second))
    if not 0 < largest < 1 or not math.isfinite(largest):
        return False
    has_decimals = any(side.has(Float) for side in sides)
    allowed = 0.51 * 10.0 ** -_places(largest, digits) if has_decimals else 1e-9 * largest
    return abs(first - second) > 2 * allowed
