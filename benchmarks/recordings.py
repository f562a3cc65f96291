"""Compares two recordings of `digests.py`: byte for byte, or their rows and answers in any order, without ids."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import zip_longest
from typing import Any

TIME = re.compile(r"(^|_)seconds?$|_per_second$|^started_at$")
"""Columns and keys that no two runs share."""
ID = re.compile(r"_id$|^(reward_recipe|recipe|digest|policy_digest|bytes)$")
"""Columns and keys that --content leaves out: ids, and the size of files that hold some."""
HEX = re.compile(r"(?<![\w.])(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{8,64}\b")
"""Ids in texts."""
ORDER = ("optimizer_step", "microbatch", "row", "loss_denominator")
"""Columns of batches that say in which order rows train; the order hangs on ids."""
REORDERED = "the training order alone"
FIRST = "(of equal inputs) "
"""Before what did not merely follow from another difference; it sorts before all datasets."""


def parsed(text: str) -> Iterator[tuple[str, Any]]:
    """Yield each line, and what it says where it is a JSON object."""
    for line in text.splitlines():
        row = None
        if line.startswith("{"):
            with suppress(ValueError):
                row = json.loads(line)
        yield line, row


def without(value: Any, names: re.Pattern[str]) -> Any:
    """Return JSON-like data without keys of these names."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if not names.search(key)}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def count(recording: dict[str, Any]) -> str:
    return f"{len(recording['artifacts'])} artifacts, {len(recording['texts'])} commands and configs"


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return a line for each kind of difference."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, one, two in pairs(a["artifacts"], b["artifacts"], kinds):
        keys = ("stage", "dataset", "stage_version", "rows", "drops", "recipe", "content", "digest")
        changed = [key for key in keys if one.get(key) != two.get(key)]
        for key in ("config", *(("inputs",) if "recipe" in one else ()), *(() if one["table"] else ("files",))):
            changed += [f"{key}.{name}" for name in differing(one.get(key), two.get(key))]
        if one["table"] != two["table"]:
            changed.append(f"columns {', '.join(differing(one['table']['columns'], two['table']['columns']))}")
        if changed:
            first = FIRST if one["inputs"] == two["inputs"] else ""
            kinds[f"{first}{one['dataset']}: {', '.join(changed)}"].append(name)
    return [*grouped(kinds), *text_changes(a["texts"], b["texts"], str.splitlines)]


def pairs(a: dict[str, Any], b: dict[str, Any], kinds: dict[str, list[str]]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the artifacts of both recordings; note in ``kinds`` those that only one has."""
    for name in sorted({*a, *b}):
        if name in a and name in b:
            yield name, a[name], b[name]
        else:
            kinds[f"only in the {'first' if name in a else 'second'} recording"].append(name)


def differing(one: dict[str, Any] | None, two: dict[str, Any] | None) -> list[str]:
    one, two = one or {}, two or {}
    return sorted(key for key in {*one, *two} if one.get(key) != two.get(key))


def compare_content(a: dict[str, Any], b: dict[str, Any], *, may_reorder: bool) -> tuple[list[str], list[str]]:
    """Return the differences of rows, checkpoints and answers, whatever their ids and order; and the excused ones.

    With ``may_reorder`` batches may differ in the training order, and what was made of such batches in everything.
    """
    of_digest = {found["digest"]: name for name, found in a["artifacts"].items() if "digest" in found}
    reordered: set[str] = set()
    errors, excused = defaultdict(list), defaultdict(list)
    changed = {name: content_changes(one, two) for name, one, two in pairs(a["artifacts"], b["artifacts"], errors)}
    if may_reorder:
        reordered = {name for name, what in changed.items() if what == REORDERED}

    @cache
    def follows(name: str) -> bool:
        """Return whether the artifact was reordered, or made of one that was."""
        inputs = [of_digest[digest] for digest in a["artifacts"][name]["inputs"].values()]
        return name in reordered or any(map(follows, inputs))

    for name, what in changed.items():
        is_first = not any(changed[of_digest[digest]] for digest in a["artifacts"][name]["inputs"].values())
        if what:
            kind = f"{FIRST if is_first else ''}{a['artifacts'][name]['dataset']}: {what}"
            (excused if follows(name) else errors)[kind].append(name)
    commands = ({key: said for key, said in found["texts"].items() if key.startswith("grpo ")} for found in (a, b))
    texts = text_changes(*commands, anonymous)
    return [*grouped(errors), *([] if reordered else texts)], [*grouped(excused), *(texts if reordered else [])]


def content_changes(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Say what of an artifact's files or rows changed, ids and order left out; nothing when nothing did."""
    if one["table"] is None:
        return ", ".join(differing(one["files"], two["files"]))
    if one["table"]["rows"] == two["table"]["rows"]:
        return ""
    if one["dataset"] == "batches" and one["table"]["rows_without_order"] == two["table"]["rows_without_order"]:
        return REORDERED
    values = [{name: hashes["sorted"] for name, hashes in facts["table"]["columns"].items()} for facts in (one, two)]
    names = [name for name in differing(*values) if not ID.search(name)]
    return f"columns {', '.join(names)}" if names else "equal columns, in other rows"


def anonymous(text: str) -> list[str]:
    """Return the lines without ids, in an order that hangs on none; and without the rows that an audit names, which
    it chooses by their ids."""
    lines = []
    for line, row in parsed(text):
        if row is not None:
            kept = {key: value for key, value in row.items() if not (key == "rows" and isinstance(value, list))}
            line = json.dumps(without(kept, ID))
        lines.append(HEX.sub("#", line))
    return sorted(lines)


def text_changes(a: dict[str, Any], b: dict[str, Any], lines: Callable[[str], list[str]]) -> list[str]:
    """Return a line for each command that ended in another way or said something else, with its first other line."""
    found = []
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            found.append(f"{name}: only in the {'first' if name in a else 'second'} recording")
            continue
        one, two = a[name], b[name]
        if one["exit"] != two["exit"]:
            found.append(f"{name}: ended with {one['exit']}, now with {two['exit']}")
        both = zip_longest(lines(one["text"]), lines(two["text"]), fillvalue="(nothing)")
        others = [(was, now) for was, now in both if was != now]
        if others:
            found.append(f"{name}: {len(others)} other lines\n    - {others[0][0][:300]}\n    + {others[0][1][:300]}")
    return found


def grouped(kinds: dict[str, list[str]]) -> list[str]:
    return [f"{what}: {len(names)} artifacts, {', '.join(names[:4])}" for what, names in sorted(kinds.items())]
