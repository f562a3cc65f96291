"""LaTeX to sympy with latex2sympy2_extended, which reads a grammar: no text is evaluated, and none is skipped."""

from functools import lru_cache
from typing import Any

from stages.rewards.answers.latex import Unreadable

CLOSE = 0.01
"""How far, as a share, the two sides of an approximation may lie apart."""


@lru_cache(maxsize=256)
def expression(latex: str) -> Any:
    """Return the sympy expression of all of the LaTeX.

    Raises:
        Unreadable: when the parser stumbles over a part, or leaves one out.
    """
    left, approximately, right = latex.partition(r"\approx")
    if approximately:
        return _approximated(expression(left.strip()), expression(right.strip()), latex)
    from math_verify.grader import should_treat_as_complex
    from sympy import Basic, MatrixBase

    try:
        value = _grammar()(is_real=not should_treat_as_complex(latex), convert_degrees=False).parse(latex)
    except Exception:  # the parser raises all sorts of errors
        raise Unreadable(latex) from None
    if not isinstance(value, Basic | MatrixBase) or not _takes_all(latex):
        raise Unreadable(latex)
    return value


@lru_cache(maxsize=1)
def _grammar() -> Any:
    """Return the parser's class, but with numbers made from their digits: its own evaluates them as Python."""
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from sympy import Float, Integer, Number

    class Grammar(_Latex2Sympy):  # type: ignore[misc]
        def parse_number(self, text: str) -> Number:
            digits = text.replace(",", "")
            return Integer(int(digits)) if digits.isdecimal() else Float(digits)

    return Grammar


def _takes_all(latex: str) -> bool:
    """Return whether the parser's first step, which may skip signs, skips nothing but blanks."""
    from antlr4 import InputStream
    from latex2sympy2_extended.antlr_parser import PSLexer

    taken = sum(len(token.text) for token in PSLexer(InputStream(latex)).getAllTokens())
    return taken >= len("".join(latex.split()))


def _approximated(left: Any, right: Any, latex: str) -> Any:
    """Return what is approximated: the left side, or the right one where the left is but a name."""
    from latex2sympy2_extended import is_expr_of_only_symbols
    from sympy import Eq

    if is_expr_of_only_symbols(left):
        return right
    value = left.rhs if isinstance(left, Eq) else left
    try:
        is_near = bool(abs(float(value) - float(right)) <= CLOSE * max(1.0, abs(float(right))))
    except (TypeError, ValueError, OverflowError, AttributeError):
        is_near = False
    if not is_near:
        raise Unreadable(latex)
    return left
