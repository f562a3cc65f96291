"""Messages of a process that is not trusted: one JSON value a line, of limited size.

A pickle would run what the sender likes in the process that reads it. JSON gives nothing but numbers, texts, lists and
dictionaries; what they say is checked by whoever takes them.
"""

import json
import os
from typing import Any

READ_BYTES = 1 << 20


class Inbox:
    """Reads messages from a descriptor, never waiting for the rest of one.

    Args:
        descriptor: of a pipe or socket; it stays the caller's.
        most_bytes: of one message.
    """

    def __init__(self, descriptor: int, most_bytes: int) -> None:
        self.descriptor = descriptor
        self.most_bytes = most_bytes
        self._begun: list[bytes] = []
        self._begun_bytes = 0

    def read(self) -> list[Any]:
        """Return the messages that are complete with what has come; waits only where nothing has come at all.

        Raises:
            EOFError: when the other end has closed or died.
            ValueError: when what came is no message.
        """
        try:
            data = os.read(self.descriptor, READ_BYTES)
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._begun.append(data)
        self._begun_bytes += len(data)
        lines: list[bytes] = []
        if b"\n" in data:
            *lines, rest = b"".join(self._begun).split(b"\n")
            self._begun, self._begun_bytes = [rest], len(rest)
        if max(self._begun_bytes, *map(len, lines), 0) > self.most_bytes:
            raise ValueError(f"a message of more than {self.most_bytes:,} bytes")
        return [_message(line) for line in lines]


def _message(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"what is no JSON ({type(error).__name__})") from error


def write(descriptor: int, message: Any) -> None:
    """Send a message of JSON's types; waits until all of it is on its way. Halves of surrogate pairs become "?"."""
    data = memoryview(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]
