"""SQL conditions over rows, written by users: parsed by polars, and kept from reading anything but those rows."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

QUERY_WORDS = frozenset({"select", "from", "with", "values", "table"})
DISTINCT_FROM = re.compile(r"\bdistinct\s+from\b", re.IGNORECASE)
QUOTED = re.compile(r"""(?<![\w&$'"])(?:'(?:[^']|'')*'|"(?:[^"]|"")*")""")
"""Text and quoted names; before E'...' and the like a letter stands, and the quotation mark is left."""
CONDITION = re.compile(r"[\w\s.,()\[\]<>=!+*/%|~^:-]*")
FUNCTION = re.compile(r"(\w+)\s*\(")
WORDS_BEFORE_PARENTHESES = frozenset({"and", "or", "not", "in", "over", "when", "then", "else", "between", "by", "as"})
FUNCTIONS = frozenset(
    {"abs", "array_contains", "array_length", "avg", "cast", "ceil", "char_length", "coalesce", "count", "div"}
    | {"ends_with", "exp", "first", "floor", "greatest", "last", "least", "left", "length", "ln", "log10", "lower"}
    | {"max", "median", "min", "mod", "nullif", "octet_length", "pow", "regexp_like", "right", "round", "sign", "sqrt"}
    | {"starts_with", "stddev", "strpos", "substr", "sum", "trim", "try_cast", "upper", "variance"}
)
"""Functions whose result is no longer than what they are given."""
MOST_CHARACTERS = 2000


def parse_bounded(where: str) -> "pl.Expr":
    """Return the condition as an expression that takes no more memory than the rows; it may be a stranger's.

    Raises:
        ValueError: as `parse` does, or for a function or an operator that makes longer texts.
        polars.exceptions.PolarsError: when it is no SQL.
    """
    import polars as pl

    _check(where)
    if len(where) > MOST_CHARACTERS:
        raise ValueError(f"has {len(where):,} characters: expected {MOST_CHARACTERS:,} at most; shorten it")
    bare = QUOTED.sub(" quoted ", where).lower()  # a quoted name may be that of a function
    if unknown := sorted(set(FUNCTION.findall(bare)) - WORDS_BEFORE_PARENTHESES - FUNCTIONS):
        raise ValueError(f"calls {unknown[0]}, expected one of {', '.join(sorted(FUNCTIONS))}: use one of those")
    if "||" in bare:
        raise ValueError("joins texts with ||: compare the columns themselves")
    return pl.sql_expr(where)


def parse(where: str) -> "pl.Expr":
    """Return the condition as an expression. Nothing is read.

    Raises:
        ValueError: when there is more in it than a condition; the text continues a message that quotes the condition.
        polars.exceptions.PolarsError: when it is no SQL.
    """
    import polars as pl

    _check(where)
    return pl.sql_expr(where)


def _check(where: str) -> None:
    """Raise ValueError for a condition with a query in it: polars would open the files and URLs that it names.

    A query begins with one of QUERY_WORDS. Outside of plain quotes only characters are let through that cannot begin a
    comment or another kind of quotes, so that polars's parser takes the same parts for text as this one.
    """
    bare = QUOTED.sub(" ", where)
    words = set(re.findall(r"\w+", DISTINCT_FROM.sub(" ", bare).lower()))
    if words & QUERY_WORDS or not CONDITION.fullmatch(bare) or "--" in bare or "/*" in bare:
        raise ValueError(
            "is more than a condition over the columns (it holds a query, a comment or an open or unusual quotation "
            "mark): expected for example \"finish_reason = 'length'\""
        )
