"""Numbers of any writing rewritten to plain ones: ASCII digits, 1e5, 3/4, 1 1/2; what is no number loses its digits."""

import unicodedata

import regex

SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+")
PLAIN_SIGNS = str.maketrans(
    {"\u2212": "-", "\ufe63": "-", "\uff0d": "-", "\u2013": "-", "\uff0b": "+", "\uff05": "%", "\u066a": "%"}
)
"""Minus signs, plus signs and per cent signs of other scripts; the en dash is often typed for a minus."""
DIGIT = regex.compile(r"(?![0-9])\p{Nd}")
VULGAR_FRACTION = regex.compile(r"(?<whole>[0-9])?(?<fraction>[\u00bc-\u00be\u2150-\u215e])")
SUPERSCRIPT_POWER = regex.compile(r"(?<=[0-9])[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
POWER_OF_TEN = regex.compile(
    r"(?:(?<=[0-9])\s?(?:[x*\u00d7\u00b7]|\\times|\\cdot)\s?|(?<one>(?<![0-9.,^*]|\^[{(])))"
    r"10\s?(?:\^|\*\*)[{(]?(?<exponent>[+-]?[0-9]+)[})]?"
)
NARROW_BLANKS = r"\u00a0\u202f\u2009\u2007"
EMPHASIS = [
    regex.compile(r"(?<![0-9\p{L})\]}*\\])\*\*(?=[^\s*])(?<inside>[^\n*]{1,200}?)(?<=[^\s*])\*\*(?!\*)"),
    regex.compile(
        r"(?<![\p{L}\p{N}_\\})\]])(?<mark>__?)(?=[^\s_])(?<inside>[^\n_]{1,200}?)(?<=[^\s_])(?P=mark)(?![\p{L}\p{N}_])"
    ),
]
"""Markdown's bold and italics; a power has an operand before its two asterisks."""
WRAPPED = regex.compile(r"\s?\\(?:text\w*|mathrm|mathbf|mathit|mathsf|mbox)\s*\{([^{}]*+)\}")
LATEX_BLANK = regex.compile(r"(?<=[0-9])(?:\\[,:; ]|~)(?=[0-9]{3}(?![0-9]))")
NO_BLANK = regex.compile(r"\\!\s?")
DEGREE = regex.compile(r"\^?\s?\{?\s?\\(?:circ|degree)(?![A-Za-z])\s?\}?")
ALONE = regex.compile(r"(?<=^\s{0,9}|[{$]\s?)[0-9]{1,3}(?: [0-9]{3}){2,}+(?=\s{0,9}$|\s?[}$])")
"""Blanks separate thousands in a number that stands alone, and several times: 100 200 in a text are two numbers."""
FRACTION = regex.compile(
    r"(?<outer>[+-])?(?:(?<whole>[0-9])\s?)?\\[dtc]?frac\s?(?:\{\s?(?<top>[+-]?\s?[0-9.,]++)\s?\}|(?<top>[0-9]))"
    r"\s?(?:\{\s?(?<bottom>[+-]?\s?[0-9.,]++)\s?\}|(?<bottom>[0-9]))"
)
ARGUMENT = r"(?:\{(?:[^{}]{1,99}+|\{[^{}]{0,99}+\}){0,9}+\}|[0-9A-Za-z])"
FORMULA = regex.compile(
    rf"\\[dtc]?(?:frac|binom)\s?{ARGUMENT}\s?{ARGUMENT}?|\\sqrt\s?(?:\[[^\[\]]{{0,20}}\])?\s?{ARGUMENT}"
    rf"|\\(?:overline|bar|dot)\s?{ARGUMENT}|\\(?:pi|infty)(?![A-Za-z])|[\u03c0\u221e]|(?<![A-Za-z])pi(?![A-Za-z])"
    rf"|\\(?:log|ln|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)(?![A-Za-z])(?:\s?[_^]\s?{ARGUMENT})?\s?(?:{ARGUMENT}|\(?-?[0-9.]+)?"
    r"|\u221a\s?(?:\([^()]{0,99}\)|[0-9.]*+)"
)
MASK = "\ue000"
"""Stands for a formula: a letter of no script."""
TIMES = r"\s?(?:\\cdot|\\times|[*\u00b7\u00d7])?\s?"
OPERAND = r"[0-9][0-9.,]*+(?:/[0-9]++)?"
MULTIPLE = regex.compile(rf"(?:(?<![0-9.,/])-?{OPERAND}{TIMES})?+{MASK}(?:(?:(?=\S){TIMES})(?<!\s){OPERAND})?+")
PLUS_MINUS = regex.compile(
    rf"(?:(?<![0-9.,/])(?:{OPERAND}|{MASK})\s?)?+(?:\\pm(?![A-Za-z])|\\mp(?![A-Za-z])|[\u00b1\u2213])\s?(?:{OPERAND}|{MASK})"
)
NO_NUMBER = regex.compile(
    rf"{MASK}|[<>\u2264\u2265\u2260\u2208]|\\(?:[lg](?:e|t|eq|eqslant)|neq?|in|cup|cap|cdot|times)(?![A-Za-z])"
    r"|[0-9][xyznie](?![A-Za-z0-9+-])|(?:[0-9)\]]|(?<![A-Za-z])[a-ln-zA-Z])\s?\^|[0-9A-Za-z]\s?_"
    r"|(?<![A-Za-z\\])[A-Za-z]\s?/\s?[0-9]|[0-9]\s?/\s?[A-Za-z](?![A-Za-z])"
    r"|(?<![0-9A-Za-z\\])[A-Za-z]\s?[-+*]|[-+*]\s?[A-Za-z](?![A-Za-z$])"
)
"""What makes a formula of a reference: relations, letters to calculate with, powers, products."""


UNIT_POWER = regex.compile(r"(?<=[A-Za-z])\s?\^\s?\{?[1-3]\}?")


def is_formula(plain: str) -> bool:
    """Return whether a text, after `with_plain_digits`, is no number with a unit but something to work out."""
    return NO_NUMBER.search(plain) is not None


def with_plain_digits(text: str, decimal: str) -> str:
    """Return the text with ASCII digits and signs, powers of ten as 1e5, fractions as 1/2 or 3 1/2.

    Roots, logarithms, multiples of pi, what a plus-minus sign stands before, and fractions of anything but numbers
    become one letter: none of their numbers is the number of the answer.
    """
    if not text.isascii():
        thousands = "," if decimal == "." else "."
        text = text.translate(PLAIN_SIGNS).replace("\u066b", decimal).replace("\u066c", thousands)
        text = SUPERSCRIPT_POWER.sub(lambda m: "^" + m.group().translate(SUPERSCRIPTS), text)
        text = DIGIT.sub(lambda m: str(unicodedata.decimal(m.group())), text)
        text = VULGAR_FRACTION.sub(_spelled_fraction, text)
    for pattern in EMPHASIS if "**" in text or "_" in text else ():
        text = pattern.sub(r"\g<inside>", text)
    if decimal == ".":
        text = ALONE.sub(lambda m: m.group().replace(" ", "\u202f"), text)
    if "\\" in text or "{,}" in text:
        text = NO_BLANK.sub("", text.replace("{,}", ",")).replace("\\%", "%").replace("\\$", "$")
        text = LATEX_BLANK.sub("\u202f", WRAPPED.sub(r"\1", DEGREE.sub("\u00b0", text)))
        text = FRACTION.sub(_plain_fraction, text)
    text = PLUS_MINUS.sub(MASK, MULTIPLE.sub(MASK, FORMULA.sub(MASK, text)))
    if "10" not in text:
        return text
    return str(POWER_OF_TEN.sub(lambda m: f"{'' if m['one'] is None else '1'}e{m['exponent']}", text))


def _spelled_fraction(match: "regex.Match[str]") -> str:
    whole = f"{match['whole']} " if match["whole"] else ""
    return whole + unicodedata.normalize("NFKC", match["fraction"]).replace("\u2044", "/")


def _plain_fraction(match: "regex.Match[str]") -> str:
    """Return the fraction with its signs, before it, above and below the line, as one before it."""
    top, bottom = ("".join(part.split()) for part in (match["top"], match["bottom"]))
    is_negative = (top[:1] == "-") != (bottom[:1] == "-")
    has_inner = top[:1] in "+-" or bottom[:1] in "+-"
    if match["whole"] and has_inner:
        return MASK
    outer = match["outer"] or ""
    if has_inner:
        outer = ("+" if is_negative else "-") if outer == "-" else ("-" if is_negative else outer)
    whole = f"{match['whole']} " if match["whole"] else ""
    return f"{outer}{whole}{top.lstrip('+-')}/{bottom.lstrip('+-')}"
