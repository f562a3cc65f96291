"""What verify writes down: named checks with counts, and the exact rows that are wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import polars as pl

from pipeline.errors import GrpoError
from pipeline.reading import shorten

PART = "_part"
"""Column that carries a row's file while rows are compared."""

CHECKS: Mapping[str, str] = {
    "manifests": "every manifest can be read and adds up to its own digest; no artifact is half there",
    "files": "every file has the bytes and SHA-256 of its manifest, and no other file lies beside it",
    "counts": "rows and drops are as many as the manifest says",
    "schema": "columns, types and nulls are those of the documented schema",
    "inputs": "every input exists, has the digest that the manifest names, and stands where this stage takes it from",
    "config": "settings in the manifests are those of config.resolved.json",
    "policies": "tokenizer and tensor shapes pass unchanged from a policy to its successor, steps add up in states",
    "prompt ids": "a prompt's id is the hash of its task, messages and reference answer",
    "prompt split": "a prompt belongs to the split it was drawn for, and is dropped only for its length",
    "held out": "no question of the evaluation is among the training prompts",
    "sampling plan": "ids, prompts, seeds, settings and policies of the answers follow from prompts, config and inputs",
    "groups": "ids are unique, and the members of a group share one prompt",
    "policy digests": "the policies that wrote answers exist as inputs of the stage",
    "lengths": "lists that run along the tokens have their length",
    "logprobs": "log probabilities are finite and not positive",
    "token ids": "token ids lie in the policy's vocabulary",
    "text": "token ids decode to the stored text",
    "endings": "finish_reason and stop_reason agree with the tokens",
    "rewards": "every answer has one reward or error of each function, and no other row is there",
    "advantages": "recomputed from the rewards, they are those stored",
    "checks": "recomputed from the rows, they are those stored, and nothing has trained that one of them holds",
    "batches": "recomputed from answers and advantages, rows, order, drops and denominators are those stored",
    "records": "training records cover the batches' rows, and the optimizer steps are their sums",
    "evaluations": "answers follow from the held-out prompts; is_correct follows from the reward",
    "metrics": "recomputed from the artifacts, the figures are those of metrics.parquet",
}
"""Every check in the order of the table, with what it proves."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Where:
    """The place of an artifact: its path below the run, its dataset, and its iteration where it has one."""

    path: str
    dataset: str
    iteration: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    check: str
    where: Where
    found: str
    part: str | None = None
    row: str | None = None
    """completion_id, or prompt_id, or the other key of the row."""
    num_rows: int = 1
    """More than one where the rows are too many to name each."""


@dataclass(slots=True)
class Tally:
    """How often a check was made, and how often it failed."""

    checked: int = 0
    wrong: int = 0
    pruned: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Ledger:
    """What was checked, and what is wrong: of each check and artifact ``limit`` rows are named, all are counted."""

    limit: int = 20
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in CHECKS})
    problems: list[Problem] = field(default_factory=list)
    notes: dict[tuple[str, str], int] = field(default_factory=dict)
    """(check, why it could not be made) -> how often."""
    pruned: list[tuple[Where, str]] = field(default_factory=list)
    """Files that `grpo prune` dropped."""

    @property
    def is_fine(self) -> bool:
        return not self.problems

    def checked(self, check: str, count: int = 1) -> None:
        """Count what was looked at."""
        self.tallies[check].checked += count

    def wrong(self, check: str, where: Where, found: str, *, part: str | None = None, row: str | None = None) -> None:
        """Note one wrong thing."""
        self.tallies[check].wrong += 1
        self.problems.append(Problem(check, where, found, part, row))

    def wrong_rows(
        self, check: str, where: Where, rows: Sequence["WrongRow"], count: int, *, sources: Sequence[Where] = ()
    ) -> None:
        """Note wrong rows of which some are named; ``sources`` are what they were derived from anew."""
        derived = f" (derived from {', '.join(source.path for source in sources)})" if sources else ""
        named = rows[: self.limit]
        self.tallies[check].wrong += count
        self.problems += [Problem(check, where, row.found + derived, row.part, row.row) for row in named]
        if count > len(named):
            rest = count - len(named)
            self.problems.append(Problem(check, where, f"{rest:,} more rows like these", num_rows=rest))

    def attempt(self, check: str, where: Where, do: Callable[[], T]) -> T | None:
        """Return what a check returns; whatever it raises is a finding: what is looked at may be anything.

        None when it raised.
        """
        try:
            return do()
        except (Exception, pl.exceptions.PanicException) as error:
            self.wrong(check, where, f"cannot be checked: {describe(error)}")
            return None

    def skipped(self, check: str, reason: str) -> None:
        """Note that a check could not be made here: neither right nor wrong."""
        self.tallies[check].skipped += 1
        self.notes[check, reason] = self.notes.get((check, reason), 0) + 1


def describe(error: BaseException) -> str:
    """Return an error of ours as it is, and the kind and first line of any other."""
    lines = str(error).strip().splitlines() or [""]
    return str(error) if isinstance(error, GrpoError) else f"{type(error).__name__}: {lines[0]}"


@dataclass(frozen=True, slots=True)
class WrongRow:
    """A row that is wrong, by its key."""

    row: str
    part: str | None
    found: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that no row of a dataset may be."""

    check: str
    is_wrong: pl.Expr
    """True or null = wrong."""
    found: str
    columns: tuple[str, ...] = ()
    """Shown with the row."""


def apply_rules(ledger: Ledger, where: Where, frame: pl.LazyFrame, rules: Sequence[Rule], key: str) -> None:
    """Count the rows that break each rule, in one streaming pass, and name them in a second one if there are any."""
    sums = [rule.is_wrong.fill_null(True).sum().alias(f"_{index}") for index, rule in enumerate(rules)]
    counts = frame.select(pl.len().alias("_rows"), *sums).collect(engine="streaming").row(0, named=True)
    for check in dict.fromkeys(rule.check for rule in rules):
        ledger.checked(check, counts["_rows"])
    for index, rule in enumerate(rules):
        if counts[f"_{index}"]:
            shown = list(dict.fromkeys([PART, key, *rule.columns]))
            rows = frame.filter(rule.is_wrong.fill_null(True)).select(shown).head(ledger.limit).collect()
            named = [WrongRow(row[key], row[PART], rule.found + _values(row, rule.columns)) for row in rows.to_dicts()]
            ledger.wrong_rows(rule.check, where, named, counts[f"_{index}"])


def _values(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    shown = ", ".join(f"{name} is {shorten(row[name])}" for name in columns)
    return f": {shown}" if shown else ""


def compare(
    expected: pl.DataFrame,
    found: pl.DataFrame,
    keys: Sequence[str],
    *,
    limit: int,
    is_ordered: bool = True,
    tolerance: float = 0.0,
    hashed: Mapping[str, str] | None = None,
) -> tuple[list[WrongRow], int]:
    """Return the rows of ``found`` that differ from those expected, at most ``limit`` named, and their number.

    Missing, unexpected, repeated, altered and, where ``is_ordered``, misplaced rows differ. ``expected`` has the keys
    and the columns to compare; ``found`` has them too, and may have the file of each row in ``_part``. Floats may
    differ by ``tolerance``, relative. ``hashed`` says of columns that are fingerprints what it means when they differ.
    """
    columns = [name for name in expected.columns if name not in keys]
    if PART not in found.columns:
        found = found.with_columns(pl.lit(None, pl.String).alias(PART))
    if expected.height == found.height and is_ordered:
        renamed = expected.rename({name: f"_expected_{name}" for name in expected.columns})
        beside = pl.concat([found, renamed], how="horizontal")
        if not beside.select(pl.any_horizontal(_differ(expected, [*keys, *columns], tolerance)).any()).item():
            return [], 0
    rows: list[WrongRow] = []

    def note(wrong: pl.DataFrame, say: Callable[[dict[str, Any]], str]) -> int:
        rows.extend(WrongRow(_key(row, keys), row.get(PART), say(row)) for row in wrong.head(limit).to_dicts())
        return wrong.height

    is_repeat = found.select(pl.struct(keys).is_duplicated() & ~pl.struct(keys).is_first_distinct()).to_series()
    once = expected.with_row_index("_expected_position").rename({name: f"_expected_{name}" for name in columns})
    joined = (
        found.with_row_index("_position")
        .filter(~is_repeat)
        .join(once, on=keys, how="inner", nulls_equal=True, maintain_order="left")
    )
    missing = expected.join(found, on=keys, how="anti", nulls_equal=True, maintain_order="left")
    extra = found.join(expected, on=keys, how="anti", nulls_equal=True, maintain_order="left")
    altered = joined.filter(pl.any_horizontal(_differ(expected, columns, tolerance))) if columns else joined.clear()
    count = note(missing, lambda _: "the row is missing")
    count += note(extra, lambda _: "the row should not be there")
    count += note(found.filter(is_repeat), lambda _: "the row stands twice")
    count += note(altered, lambda row: _difference(row, columns, hashed or {}))
    if is_ordered and count == 0:
        moved = joined.filter(pl.col("_position") != pl.col("_expected_position"))
        count = note(moved, lambda row: f"stands at row {row['_position']}, expected {row['_expected_position']}")
    return rows[:limit], count


def _differ(expected: pl.DataFrame, columns: Sequence[str], tolerance: float) -> list[pl.Expr]:
    """Return for each column whether it differs from the expected one next to it."""
    unequal = []
    for name in columns:
        column, wanted = pl.col(name), pl.col(f"_expected_{name}")
        differs = column.ne_missing(wanted)
        if tolerance and expected.schema[name].is_float():
            is_close = (column - wanted).abs() <= tolerance * pl.max_horizontal(wanted.abs(), pl.lit(1.0))
            differs = differs & ~is_close.fill_null(False)
        unequal.append(differs)
    return unequal


def _key(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return " ".join(str(row[name]) for name in keys)


def _difference(row: Mapping[str, Any], columns: Sequence[str], hashed: Mapping[str, str]) -> str:
    changed = [
        hashed[name]
        if name in hashed
        else f"{name} is {shorten(row[name])}, expected {shorten(row[f'_expected_{name}'])}"
        for name in columns
        if row[name] != row[f"_expected_{name}"]
    ]
    return "; ".join(changed)
