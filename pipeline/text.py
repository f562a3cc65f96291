"""Text that others wrote, as people may see it: what steers a terminal, reorders or hides is written as an escape.

Completions, prompts, names, errors: all of them can hold what a terminal or a browser obeys. Escapes are Python's:
``\\x1b``, ``\\u202e``, ``\\U000e0041``.
"""

import json
import re
from typing import Any

STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Controls but newline and tab; line and paragraph separators; lone surrogates; what Unicode calls ignorable by default
(direction marks, zero width, tags), but for the two signs that choose how an emoji looks; what XML forbids."""
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
"""To the last @ before a path: a password may hold one."""
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U(000[0-9a-f]{5}))")


def visible(text: object) -> str:
    """Return the text with escapes for the characters that steer or hide; newlines and tabs stay.

    Twice is the same as once. A backslash stays as it is: `escaped` is for programs that want the text back.
    """
    return STEERING.sub(_escape, str(text))


def one_line(text: object) -> str:
    """Return the text visible and in one line."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def without_login(text: object) -> str:
    """Return the text without the user and password of the URLs in it."""
    return _LOGIN.sub("", str(text))


def json_text(value: Any, **options: Any) -> str:
    """Return JSON that holds the very value, with JSON's escapes for the characters that steer or hide."""
    text = json.dumps(value, **{"ensure_ascii": False, "default": str, **options})
    return STEERING.sub(lambda found: json.dumps(found[0])[1:-1] if found[0] != "\x7f" else "\\u007f", text)


def escaped(text: str) -> str:
    """Return the text visible, and so that `restored` gives it back: ``\\x5c`` where it has an escape's form itself."""
    return visible(_ESCAPE.sub(lambda found: found[0] if _meaning(found) is None else f"\\x5c{found[0][1:]}", text))


def restored(text: str) -> str:
    """Return the text that `escaped` was given."""
    return _ESCAPE.sub(lambda found: _meaning(found) or found[0], text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _meaning(found: re.Match[str]) -> str | None:
    """Return the character that an escape stands for, None where `visible` never writes that escape."""
    character = chr(int(found[1] or found[2] or found[3], 16))
    return character if found[0] == "\\x5c" or visible(character) == found[0] else None
