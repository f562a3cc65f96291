"""An answer's mathematics rewritten to the LaTeX that the parser reads whole: nothing of them is left out unsaid."""

import unicodedata
from fractions import Fraction

import regex

from stages.rewards.answers.units import without_unit


class Unreadable(ValueError):
    """Part of the text has no meaning here; what the rest says is then not the answer."""


SUPERSCRIPT = regex.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
VULGAR = regex.compile(r"[\u00bc-\u00be\u2150-\u215e]")
ROOT_SIGN = regex.compile(r"\u221a\s*+(?=[0-9A-Za-z({])(?:\{([^{}]*+)\}|\(([^()]*+)\)|([0-9]++|[A-Za-z]))")
SIGNS = {
    "\u2212": "-", "\u2013": "-", "\ufe63": "-", "\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ", "\u2217": "*", "\u2215": "/", "\u2044": "/", "\u00b1": r"\pm ", "\u221e": r"\infty ",
    "\u2264": r"\le ", "\u2a7d": r"\le ", "\u2265": r"\ge ", "\u2a7e": r"\ge ", "\u2260": r"\ne ",
    "\u2248": r"\approx ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u2208": r"\in ",
    "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}", "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}", "\u03c0": r"\pi ", "\u00b0": r"^\circ", "\u066a": r"\%", "\u2019": "'", "\u2032": "'",
}  # fmt: skip
LOOKS = regex.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lrm]?|boldsymbol|bm|rm|bf|it)(?![A-Za-z])|\\!|\\\$|\$|\p{Sc}"
)
"""What changes the looks only, and currencies, which count no more than other units."""
BLANK = regex.compile(r"(?<!\\)\\(?:quad|qquad|thinspace|[,:; >])|~|\s+")
DOUBLED = regex.compile(r"\\\\(?=[a-zA-Z])")
SAME = [
    (regex.compile(pattern), text)
    for pattern, text in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:infin|infty)(?![A-Za-z])", r"\\infty"),
        (r"\\(?:leqslant|leqq|leq|le)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geqslant|geqq|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:ast|star)(?![A-Za-z])|(?<!\*)\*(?!\*)", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\[lr]vert(?![A-Za-z])|\\mid(?![A-Za-z])", "|"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"(?:\^\s*)?\\degrees?(?![A-Za-z])", r"^\\circ"),
        (r"\\log\s?_\s?([0-9])\s?(?=[0-9])", r"\\log_{\1} "),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\(?:mathbb|Bbb)\s*([NZQRC])(?![A-Za-z])", r"\\mathbb{\1}"),
        (r"(?<!\\)%", r"\\%"),
        (r"\s*(?:\bpercent|\bpct|\bper\s?cent)\b", r"\\%"),
        (r"\{\s*([^{}]*?)\s*\\choose\s*([^{}]*?)\s*\}", r"\\binom{\1}{\2}"),
    )
]
NAMES = regex.compile(
    r"\\(?:begin|end)\s*\{\s*[a-zA-Z]*matrix\s*\}|\\(?:begin|end)\s*\{\s*array\s*\}(?:\{[clr|]*\})?|\\(?:mathbb|overline|bar|vec|hat|tilde)\{[A-Za-z]+\}"
)
WORDED = regex.compile(
    r"\\(?:text\w*|mathrm|mathit|mathbf|mathsf|mathup|mathnormal|mbox|hbox|operatorname)\s*\{([^{}]*+)\}"
)
LIST_WORDS = regex.compile(r"\s*,?\s*(?:and|or|und|oder)\s*")
CHOICES = regex.compile(r"\s*\(?([A-Za-z])\)?(?:\s*,\s*\(?([A-Za-z])\)?)*\s*")
OPERATORS = ("gcd", "lcm", "floor", "ceil", "arsinh", "arcosh", "artanh", "arcsinh", "arccosh", "arctanh")
FUNCTION = r"arcsin|arccos|arctan|arccot|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|min|max"
BARE_FUNCTION = regex.compile(rf"(?<![\\A-Za-z])(?=(?:{FUNCTION})(?![A-Za-z]))")
BARE_ROOT = regex.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*+)\)|(?=\{))")
GROUPED_BY_COMMAS = regex.compile(r"(?<![0-9.,(\[]|\\\{)[0-9]{1,3}(?:,[0-9]{3})++(?![0-9,])")
ONE_NUMBER = regex.compile(r"[+-]?\s*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?:\\%)?")
GROUPED = regex.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\{,\}|,?\\[,:; !]\s?|[\u2009\u202f\u00a0~ ])[0-9]{3})+(?![0-9,])")
BRACED_COMMA = regex.compile(r"(?<=[0-9])\{,\}(?=[0-9]{3}(?![0-9]))")
SCIENTIFIC = regex.compile(r"(?<![A-Za-z0-9_\\])([0-9]++(?:\.[0-9]++)?)[eE]([+-]?[0-9]++)(?![0-9A-Za-z.])")
REPEATING = regex.compile(r"(?<![0-9.,])([0-9]*+)\.([0-9]*+)\\(?:overline|bar|dot)\s*\{?([0-9]++)\}?")
SHORT_FRACTION = regex.compile(r"\\(frac|binom)\s*([0-9A-Za-z])?\s*(?(2)(?:([0-9A-Za-z])|(?=\{))|)")
SHORT_BOTTOM = regex.compile(r"(\\(?:frac|binom)\s*\{[^{}]*+\})\s*([0-9A-Za-z])")
SHORT_ROOT = regex.compile(r"\\sqrt\s*([0-9A-Za-z])")
MIXED = regex.compile(r"(?<![0-9.,^_{}/])([0-9]++) ([0-9]++)\s?/\s?([0-9]++)(?![0-9.,/^])")
IMPROPER = regex.compile(r"(?<=[0-9])\s*(?=\\frac\s*\{([0-9]++)\}\s*\{([0-9]++)\})")
TIMES_BRACKET = regex.compile(r"\\[A-Za-z]+|[0-9](?=\s*\()|\)(?=\s*[0-9])|[a-eijk-zA-EI-OR-Z](?=\()")
"""Where a product needs its sign: the parser takes 2(3) for a mixed number, x(x+1) for a function of x."""
IMAGINARY = regex.compile(r"(?<![A-Za-z\\_])i(?![A-Za-z])|(?<=(?<![A-Za-z\\])[a-zA-Z])i(?![A-Za-z])")
DEGREES = regex.compile(
    r"(?:([0-9]++(?:\.[0-9]++)?)|(?<![A-Za-z\\])([A-Za-z]))\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))"
)
LEFT_OUT = regex.compile(
    r"\\(?:sum|prod|int|lim|det|phantom|xrightarrow|overset|underset|pmod|bmod|mod|implies|iff|to|[Rr]ightarrow|equiv|sim"
    r"|[lc]?dots|partial|operatorname|begin\s*\{\s*(?:cases|align(?:ed)?)[*]?\s*\})(?![A-Za-z])"
    r"|\.\.\.|\u2026|'|[0-9|})\]]\s*_|\^\s*\{?\s*(?:T|\\top|\\prime)(?![A-Za-z])|(?<!_)[0-9]\s+[0-9]"
    r"|[0-9]\s?/\s?[0-9]++\s?(?:[A-Za-z(]|\\(?:pi|sqrt|frac|sin|cos|tan|ln|log|theta|alpha)(?![A-Za-z]))"
    r"|(?<![\\A-Za-z])(?:[A-Za-z]{4,}|(?:for|the|are|has|not|but|all|any|is|if|of|at|by)(?![A-Za-z]))"
)
"""What the parser would drop, misread or work at without end: signs after a number, sums, 1/2x, words."""


def plain_latex(text: str) -> str:
    """Return the mathematics in the parser's LaTeX, without the unit at their end.

    Raises:
        Unreadable: when part of the text could not be taken over.
    """
    text = _in_ascii(text)
    text = DOUBLED.sub(r"\\", text) if "matrix" not in text else text
    text = GROUPED.sub(lambda m: "".join(c for c in m.group() if c.isdigit()), BRACED_COMMA.sub("", text.strip()))
    text = LOOKS.sub("", text)
    text = BLANK.sub(" ", text).strip().rstrip(".,;")
    for pattern, same in SAME:
        text = pattern.sub(same, text)
    text = without_unit(text.strip())
    text = WORDED.sub(_worded, text)
    text = regex.sub(r"(?<![A-Za-z\\])(?:,\s*)?(?:and|or)(?![A-Za-z])", " , ", text)
    text = regex.sub(r",(?:\s*,)+", ",", text).strip().strip(",").strip()
    text = BARE_FUNCTION.sub(r"\\", BARE_ROOT.sub(lambda m: r"\sqrt" + ("" if m[1] is None else f"{{{m[1]}}}"), text))
    text = SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", REPEATING.sub(_repeating, text))
    text = SHORT_BOTTOM.sub(r"\1{\2}", SHORT_FRACTION.sub(_short_fraction, text))
    text = SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = IMPROPER.sub(lambda m: r"\cdot " if int(m[1]) >= int(m[2]) else "", text)
    text = TIMES_BRACKET.sub(lambda m: m.group() if m.group()[0] == "\\" else rf"{m.group()}\cdot ", text)
    if r"\circ" in text:
        has_angles = regex.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text) is not None
        text = DEGREES.sub(lambda m: rf"(\frac{{{m[1] or m[2]}\pi}}{{180}})" if has_angles else m[1] or m[2], text)
        text = regex.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", "", text) if not has_angles else text
    text = IMAGINARY.sub("I", text)
    if text.endswith(r"\%") and not text[-3:-2].isdigit():
        text = rf"({text[:-2]})\cdot\frac{{1}}{{100}}"
    if "," in text and _has_thousands(text):
        text = text.replace(",", "")
    if LEFT_OUT.search(NAMES.sub("", text)) or not text:
        raise Unreadable(text)
    return text


def _has_thousands(text: str) -> bool:
    """Return whether all commas separate thousands: in a number, or in an equation, where 1,000 is no list."""
    if ONE_NUMBER.fullmatch(text):
        return True
    return "=" in text and "," not in GROUPED_BY_COMMAS.sub("", text)


def _in_ascii(text: str) -> str:
    if text.isascii():
        return text
    text = ROOT_SIGN.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m.group()).replace(chr(0x2212), '-')}}}", text)
    text = VULGAR.sub(_vulgar, text)
    text = "".join(SIGNS.get(letter, letter) for letter in text)
    return unicodedata.normalize("NFKC", text)


def _vulgar(match: "regex.Match[str]") -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _worded(match: "regex.Match[str]") -> str:
    """Return what stands in \\text{} as mathematics: a number, a letter, letters of choices, "and"."""
    words = str(match[1]).strip()
    if not words or LIST_WORDS.fullmatch(words):
        return " , " if words else " "
    if CHOICES.fullmatch(words) and ("(" not in words or match.group() == match.string.strip()):
        return words.replace("(", "").replace(")", "")
    if words in OPERATORS or regex.fullmatch(FUNCTION, words):
        return rf"\{words} "
    if regex.fullmatch(r"[-+0-9.,/^*() ]+", words):
        return words
    if regex.match(r"[^{}]*\s*(?:=)", match.string[match.end() :]) and match.start() == 0 and words.isalpha():
        return words[0]
    raise Unreadable(words)


def _repeating(match: "regex.Match[str]") -> str:
    whole, start, cycle = match[1] or "0", match[2], match[3]
    scale = 10 ** len(start)
    value = Fraction(int(whole + start), scale) + Fraction(int(cycle), scale * (10 ** len(cycle) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _short_fraction(match: "regex.Match[str]") -> str:
    top, bottom = ("" if part is None else f"{{{part}}}" for part in (match[2], match[3]))
    return rf"\{match[1]}{top}{bottom}"
