"""Units of measure: behind a number they do not count; a length or time in two units is read whole."""

import regex

COMMON = (
    "mm|cm|dm|km|mg|kg|gm|ml|cl|lb|lbs|oz|ft|mi|yd|hr|hrs|min|mins|sec|secs|ms|mph|kmph|kph|Hz|kHz|MHz|kW|kWh|kJ|kN|Pa"
    "|kPa|eV|mol|deg|rad|sq|cu|cc|hp|nm|kB|MB|GB|TB"
)
LONG_WORDS = (
    "(?:square|cubic|per|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|inch(?:es)?|foot|feet|yards?"
    "|miles?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|degrees?|dollars?|cents?|units?|radians?)"
)
LETTERS = "mgslhtJNVWAKCF"
NO_UNITS = "and|or|if|for|where|when|with|because|since|so|mod|to|sin|cos|tan|log|sqrt|exp|gcd|lcm|max|min"
WRAPPED = rf"\\(?:text\w*|mathrm|mbox|hbox)\s*\{{(?!\s*[^\W{LETTERS}]\s*\}})(?<words>[^{{}}0-9=+<>]*+)\}}"
BARE = rf"(?<![A-Za-z\\])(?<words>(?:{COMMON})|[A-Za-z]{{3,}}+)"
LAST_UNIT = regex.compile(
    rf"(?r)\s*(?:{WRAPPED}|{BARE}|(?<=/\s?)(?<words>[{LETTERS}]))\.?(?:\s?\^\s?(?:[1-3]|\{{\s?-?[1-3]\s?\}}))?\s*$"
)
LETTER_BEFORE_SLASH = regex.compile(rf"(?r)(?<=[0-9}}]\s?)(?<words>[{LETTERS}])\s*$")
CONNECTION = regex.compile(r"(?r)(?:\s|\.(?=\s)|/|\\cdot(?![A-Za-z])|-(?=\s*$))+$")
JOINING = regex.compile(rf"\W*(?:{NO_UNITS})\b", regex.IGNORECASE)
KNOWN = regex.compile(rf"(?:[\s./-]|\b(?:{COMMON}|{LONG_WORDS}|[{LETTERS}])\b)*", regex.IGNORECASE)
AFTER_NUMBER = regex.compile(r"[0-9)}\]%]\s*$|\\circ\s*$")
AFTER_SYMBOL = regex.compile(r"\\pi\s*$|(?<![A-Za-z])[A-Za-z]\s*$")
MOST_WORDS = 8

SMALL_UNITS = {
    "'": "foot", "ft": "foot", "feet": "foot", "foot": "foot", '"': "inch", "''": "inch", "in": "inch",
    "inch": "inch", "inche": "inch", "h": "hour", "hr": "hour", "hour": "hour", "min": "minute", "minute": "minute",
    "s": "second", "sec": "second", "second": "second", "lb": "pound", "pound": "pound", "oz": "ounce",
    "ounce": "ounce", "yd": "yard", "yard": "yard", "mile": "mile", "day": "day", "week": "week", "month": "month",
    "year": "year", "dollar": "dollar", "cent": "cent", "degree": "degree",
}  # fmt: skip
UNIT_IN_PROSE = (
    r"(?:feet|foot|ft|inch(?:es)?|yards?|miles?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?"
    r"|pounds?|lbs?|ounces?|oz|dollars?|cents?)"
)
"""Those of SMALL_UNITS to look for in prose, where "in" and single letters are mostly something else."""
COMPOUND = regex.compile(
    rf"(?<![\p{{L}}\p{{N}}.,])[0-9]++\s?{UNIT_IN_PROSE}\b(?:,?\s(?:and\s)?[0-9]++\s?{UNIT_IN_PROSE}\b){{1,3}}"
)
"""A length or a time in two units: "2 feet 3 inches"."""
PART = regex.compile(
    r"\s*(?:(?:,|\band\b|\\text\s*\{\s*,?\s*and\s*\})\s*)?(?<number>-?[0-9]++(?:\.[0-9]++)?)(?:\s|\\[,;: ]|~)*"
    r"(?:\\(?:text|mathrm|mbox)\s*\{\s*(?<unit>[A-Za-z]++)\.?[\s,]*(?:and)?\s*\}|(?<unit>[A-Za-z]++|''|['\"])\.?,?)\s*"
)
TIME = regex.compile(
    r"(?i)(?<hours>[0-9]{1,2})(?::(?<minutes>[0-9]{2}))?(?:\s|~|\\[,;: ])*+(?:\\(?:text|mathrm|mbox)\s*\{\s*)?"
    r"(?<half>[ap])\.?\s?m\b\.?\s*\}?"
)


def without_unit(text: str) -> str:
    """Return the LaTeX without the unit of measure at its end, if a number or formula stands before."""
    rest, is_known = text, True
    for _ in range(MOST_WORDS):
        match = LAST_UNIT.search(rest) or (LETTER_BEFORE_SLASH.search(rest) if rest != text else None)
        if match is None or JOINING.match(match["words"]):
            break
        is_known &= KNOWN.fullmatch(match["words"]) is not None
        before = rest[: match.start()]
        rest = CONNECTION.sub("", before)
        if AFTER_NUMBER.search(rest):
            return str(rest.strip())
    return rest.strip() if rest != text and is_known and AFTER_SYMBOL.search(rest) else text


def quantity(text: str) -> tuple[tuple[str, str], ...] | None:
    """Return the numbers and units of "2 feet 3 inches" or "3:30 p.m.", None when the text is nothing of the kind."""
    time = TIME.fullmatch(text.strip())
    if time:
        return ((f"{int(time['hours'])}:{time['minutes'] or '00'}", time["half"].lower() + "m"),)
    parts, end = [], 0
    while end < len(text):
        part = PART.match(text, end)
        unit = part and SMALL_UNITS.get(part["unit"].lower(), SMALL_UNITS.get(part["unit"].lower().removesuffix("s")))
        if not part or unit is None:
            return None
        parts.append((part["number"], unit))
        end = part.end()
    return tuple(parts) if len(parts) > 1 else None
