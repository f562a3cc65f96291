"""Where the mathematics of an answer stand: in a box, between dollars, or in prose."""

from bisect import bisect_left
from typing import NamedTuple

import regex

from stages.rewards.answers.units import COMPOUND

BOX = regex.compile(r"\\f?box(?:ed)?\s*+(?=(?<brace>\{)|(?<single>\w)\b)")
BRACE = regex.compile(r"\\.|[{}]", regex.DOTALL)
DELIMITER = regex.compile(r"\\[()\[\]]|\$\$|\\\$|\$")
CLOSED_BY = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
NAMED = regex.compile(r"\\(?:begin|end|text\w*|math\w*|operatorname|mbox)\s*\{[^{}]*+\}")
PROSE = regex.compile(
    r"(?<![\\\p{L}])(?!(?:sin|cos|tan|cot|log|ln|exp|sqrt|pi|or|and|d\p{L})\b)\p{L}{2,}|\p{Han}|\n\s*\n"
)
"""A word: whoever writes one means his text to be read, not typeset."""
MARKED = regex.compile(r"(?<mark>\*{1,3}|_{1,2}|`)(?<inside>[^*_`\s](?:[^*`]*[^*`\s])?)(?P=mark)\.?")
TAG = regex.compile(r"</?[A-Za-z][A-Za-z_]{0,30}>|<<[^<>\n]{1,200}>>")
"""<think>, and GSM8K's notes for a calculator, <<9*2=18>>18."""
LEADING = regex.compile(
    r"\A(?:\s|[-=]{1,3}>|=|[\u2192\u21d2\u2248\u2234]|\\(?:approx|implies|to|therefore|[Rr]ightarrow)(?![A-Za-z]))++"
)
"""What leads to a result: "= 60" in "5 dozen = 60 eggs"."""
ANCHORS = (
    regex.compile(r"####"),
    regex.compile(r"(?i)\bfinal answer\b[^.\n]{0,60}?(?:\bis\b|\bare\b|[:=])"),
    regex.compile(r"(?i)\banswers?\b[^.\n]{0,60}?(?:\bis\b|\bare\b|[:=])"),
)
"""What announces the answer, the strongest first."""
EMPHASIS, PUNCTUATION = "*_`\"'", ".,;:!?"
ANNOUNCED_WITHIN = 20
"""Characters between an announcement and the answer."""
WORD = regex.compile(r"[^\s\p{Lo}\u3000-\u303f\uff0c\uff1a\uff1b]+")
MATHEMATICAL = regex.compile(
    r"[\p{N}^=\u221a\u221e\u03c0]|\\[a-zA-Z]|^[-+*/<>()\u2212\u00d7\u00f7\u00b1\u2264\u2265|]+$|^(?:pi|sqrt\(.*)$"
)
VARIABLE = regex.compile(r"[b-zB-HJ-Z]")
"""A letter that is no English word of its own."""
TELLS_SOMETHING = regex.compile(r"\p{N}|\\[a-zA-Z]|[\u03c0\u221e]|\p{L}\s*[=^<>]")
JOINS_NUMBERS = regex.compile(r"\s*(?:,\s*)?(?:and|or)\s+")
JOINS_FORMULAS = regex.compile(r"\s*(?:,|;|(?:,\s*)?(?:and|or)\b)\s*")


class Candidate(NamedTuple):
    """A piece of mathematics in prose, without its delimiters."""

    start: int
    end: int
    text: str
    is_delimited: bool


def mathematics_of(answer: str) -> str | None:
    """Return the mathematics that are the answer, or None when there are none.

    The last box; without one all of an answer that is nothing but mathematics; else, in prose, what follows "####",
    "final answer is" or "answer is", and otherwise the last mathematics, with what "and" or "or" joins to them.
    """
    if BOX.search(answer):
        found = _last_box(answer)
    else:
        found = _in_prose(answer) if is_prose(answer) else _bare_formula(answer)
    return found and (LEADING.sub("", found) or None)


def words_of(answer: str) -> str:
    """Return what an answer in words says: its last box, else the line that "answer is" announces, else its first."""
    box = _last_box(answer)
    if box is not None:
        return box
    last = max((match.end() for anchor in ANCHORS for match in anchor.finditer(answer)), default=0)
    return answer[last:].strip().partition("\n")[0].strip(EMPHASIS + PUNCTUATION + " ")


def is_prose(text: str) -> bool:
    """Return whether the text has more than mathematics: words, or several delimited pieces."""
    spans = _delimited(text)
    outside = _cut(text, spans)
    if spans:
        return bool(outside.strip(" \n\t.,*_#"))
    return PROSE.search(NAMED.sub("", text)) is not None


def _bare_formula(answer: str) -> str | None:
    """Return an answer that is nothing but mathematics without delimiters and Markdown around."""
    spans = _delimited(answer)
    text = ", ".join(span.text for span in spans) or MARKED.sub(
        r"\g<inside>", answer.strip().removeprefix("####").strip()
    )
    return text.strip() or None


def _last_box(text: str) -> str | None:
    """Return the content of the last box that is closed, None when there is none or nothing in it."""
    closed_at: dict[int, int] = {}
    opened: list[int] = []
    for brace in BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closed_at[opened.pop()] = brace.start()
    for box in reversed(list(BOX.finditer(text))):
        if box["single"]:
            return str(box["single"])
        if box.end() in closed_at:
            return text[box.end() + 1 : closed_at[box.end()]].strip() or None
    return None


def _in_prose(text: str) -> str | None:
    found = _candidates(text)
    if not found:
        return None
    starts = [candidate.start for candidate in found]
    for anchor in ANCHORS:
        for announced in reversed(list(anchor.finditer(text))):
            index = bisect_left(starts, announced.end())
            if index < len(starts) and starts[index] - announced.end() <= ANNOUNCED_WITHIN:
                return _joined(text, found, index, index, JOINS_FORMULAS)
    last = first = len(found) - 1
    while first > 0:
        both = found[first].is_delimited and found[first - 1].is_delimited
        between = text[found[first - 1].end : found[first].start]
        if not (JOINS_FORMULAS if both else JOINS_NUMBERS).fullmatch(between):
            break
        first -= 1
    return _joined(text, found, first, last, JOINS_FORMULAS)


def _joined(text: str, found: list[Candidate], first: int, last: int, joins: "regex.Pattern[str]") -> str:
    """Return the candidates as a list, and those after them that are joined to them."""
    while last + 1 < len(found) and joins.fullmatch(text[found[last].end : found[last + 1].start]):
        last += 1
    return ", ".join(candidate.text for candidate in found[first : last + 1])


def _candidates(text: str) -> list[Candidate]:
    delimited = _delimited(text)
    plain = TAG.sub(lambda tag: "\n" * len(tag.group()), _cut(text, delimited))
    compound = [Candidate(m.start(), m.end(), m.group(), False) for m in COMPOUND.finditer(plain)]
    plain = _cut(plain, compound)
    return sorted([*delimited, *compound, *_plain_candidates(plain)])


def _cut(text: str, spans: list[Candidate]) -> str:
    """Return the text with blanks in place of the spans."""
    pieces, end = [], 0
    for span in spans:
        pieces += [text[end : span.start], "\n" * (span.end - span.start)]
        end = span.end
    return "".join([*pieces, text[end:]])


def _delimited(text: str) -> list[Candidate]:
    """Return what stands between \\( \\), \\[ \\], $$ $$ and $ $; text between two amounts of money is none of it."""
    found = []
    opened: regex.Match[str] | None = None
    for mark in DELIMITER.finditer(text):
        sign = mark.group()
        if opened is not None and CLOSED_BY[opened.group()] == sign:
            inside = text[opened.end() : mark.start()]
            if sign != "$" or _is_inline(inside, text[mark.end() : mark.end() + 1]):
                if inside.strip():
                    found.append(Candidate(opened.start(), mark.end(), inside.strip(), True))
                opened = None
                continue
            opened = mark
        elif sign in CLOSED_BY and (opened is None or opened.group() == "$"):
            opened = mark
    return found


def _is_inline(inside: str, after: str) -> bool:
    """Return whether it is a formula between dollars, not the text between two amounts of money."""
    is_tight = inside == inside.strip() or (inside[:1] == " " and inside[-1:] == " ")
    return bool(inside.strip()) and is_tight and not after.isdigit() and "\n" not in inside


def _plain_candidates(text: str) -> list[Candidate]:
    """Return the runs of words that are numbers, formulas and the operators between them."""
    found: list[Candidate] = []
    run: list[regex.Match[str]] = []
    depth = 0
    words = list(WORD.finditer(text))
    parts = [MATHEMATICAL.search(_bare(word)) is not None for word in words]
    for index, word in enumerate(words):
        gap = text[words[index - 1].end() : word.start()] if index else "\n"
        is_bullet = "\n" in gap and word.group() in ("-", "*", "+")
        beside = (index > 0 and parts[index - 1]) or (index + 1 < len(parts) and parts[index + 1])
        is_variable = beside and VARIABLE.fullmatch(_bare(word)) is not None
        is_ended = run and run[-1].group()[-1] in PUNCTUATION and depth <= 0
        if run and (is_ended or not gap.isspace() or "\n" in gap):
            found += _candidate(text, run)
            run, depth = [], 0
        if (parts[index] or is_variable) and not is_bullet:
            run.append(word)
            depth += sum((letter in "([{") - (letter in ")]}") for letter in word.group())
        elif run:
            found += _candidate(text, run)
            run, depth = [], 0
    return found + _candidate(text, run)


def _bare(word: "regex.Match[str]") -> str:
    """Return the word without Markdown's marks and the punctuation after it."""
    return str(word.group()).strip(EMPHASIS).rstrip(PUNCTUATION).strip(EMPHASIS)


def _candidate(text: str, run: list["regex.Match[str]"]) -> list[Candidate]:
    """Return the run as a candidate, unless it is nothing but operators and single letters."""
    if not run:
        return []
    start, end = run[0].start(), run[-1].end()
    raw = text[start:end]
    end -= len(raw) - len(raw.rstrip(EMPHASIS + PUNCTUATION))
    start += len(raw) - len(raw.lstrip(EMPHASIS))
    inside = text[start:end]
    for opening, closing in ("()", "[]"):
        if inside.count(opening) < inside.count(closing):
            inside = inside.removesuffix(closing)
        elif inside.count(opening) > inside.count(closing):
            inside = inside.removeprefix(opening)
    return [Candidate(start, end, inside, False)] if TELLS_SOMETHING.search(inside) else []
