"""What a server sent: read up to a limit, as an answer or as a message, and without the API key.

The key is struck out of decoded text, where JSON's escapes can no longer hide it, in the forms that a server or a proxy
may give it in its messages: escaped again, in a URL, in HTML, in other letters.
"""

import json
import re
import zlib
from collections.abc import Callable
from typing import Any

import httpx

from stages.rewards.judge.cache import Answer

MOST_BYTES = 4 << 20
"""Of a response, decompressed; a long judgement has some thousands."""
SHOWN_CHARACTERS = 300
LONG_KEY = 16
"""From this length on, a key is no word: it is then struck out in capitals and small letters alike."""

Strike = Callable[[str], str]


async def read_body(response: httpx.Response) -> str:
    """Return the body of a streamed response.

    Raises:
        ValueError: when it is larger than `MOST_BYTES`, or compressed in a way that nobody asked for.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise ValueError(f"the server sends Content-Encoding {encoding!r}: expected none")
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS) if encoding == "gzip" else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        try:
            body += inflate.decompress(chunk, MOST_BYTES + 1 - len(body)) if inflate else chunk
        except zlib.error as error:
            raise ValueError(f"the server sends what is not gzip ({error})") from error
        if len(body) > MOST_BYTES:
            raise ValueError(f"the server's response is larger than {MOST_BYTES:,} bytes: expected a chat completion")
    return body.decode("utf-8", "replace")


def make_strike(key: str) -> Strike:
    """Return a function that replaces the key in a text; without a key the text stays."""
    if not key:
        return lambda text: text
    pattern = re.compile("".join(map(_written, key)), re.IGNORECASE if len(key) >= LONG_KEY else 0)
    return lambda text: pattern.sub("<API key>", text)


def _written(character: str) -> str:
    """Return a pattern of the ways to write a character."""
    code = f"(?i:{ord(character):02x})"
    forms = (
        rf"\\{{0,8}}{re.escape(character)}",  # the bounds keep the search linear
        rf"\\{{1,8}}(?:[uU]00|[xX]){code}",
        rf"%(?:25){{0,8}}{code}",
        rf"&\#(?:{ord(character)}|[xX]{code});",
    )
    return f"(?:{'|'.join(forms)})"


def read_answer(text: str, strike: Strike) -> Answer | None:
    """Return the answer in a response's body; None when the body is no chat completion."""
    try:
        found = json.loads(text)
        choice = found["choices"][0]
        content = choice["message"].get("content")
        if content is None:  # a refusal has words of its own; a reasoning model that was cut has none
            content = choice["message"].get("refusal") or ""
        if not isinstance(content, str):
            return None
        usage = found.get("usage") or {}
        return Answer(
            text=strike(_storable(content)),
            finish_reason=_text(choice.get("finish_reason"), strike),
            served_model=_text(found.get("model"), strike),
            num_prompt_tokens=_count(usage.get("prompt_tokens")),
            num_completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def read_message(text: str, strike: Strike) -> str:
    """Return the message in an error's body, in either of the two usual forms, else the body; cut, for people."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return shown(text, strike)
    error = found.get("error", found) if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return shown(message if isinstance(message, str) else text, strike)


def shown(text: str, strike: Strike) -> str:
    """Return a text of a server for a message: without the key, and cut after that."""
    text = strike(_storable(text))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair, which no file can


def _text(value: Any, strike: Strike) -> str | None:
    return strike(_storable(value)) if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 63 else None
