"""The ledger of an audit: stored rows are compared with recomputed ones."""

import polars as pl

from stages.inspect.verify.ledger import Ledger, compare


def test_compare_tells_what_became_of_each_row() -> None:
    expected = pl.DataFrame({"id": ["a", "b", "c", "d"], "x": [1.0, 2.0, 3.0, None]})
    now = pl.DataFrame({"id": ["a", "b", "b", "e", "d"], "x": [1.0, 2.5, 2.0, 5.0, None]})
    rows, count = compare(expected, now, ["id"], limit=9)
    assert [(r.row, r.found) for r in rows] == [
        ("c", "the row is missing"),
        ("e", "the row should not be there"),
        ("b", "the row stands twice"),
        ("b", "x is 2.5, expected 2.0"),
    ]
    assert count == 4


def test_compare_finds_rows_out_of_order_only_where_order_matters() -> None:
    expected = pl.DataFrame({"id": ["a", "b"]})
    rows, count = compare(expected, expected.reverse(), ["id"], limit=1)
    assert ([r.found for r in rows], count) == (["stands at row 0, expected 1"], 2)
    assert compare(expected, expected.reverse(), ["id"], limit=1, is_ordered=False) == ([], 0)


def test_compare_allows_the_tolerance_and_no_more() -> None:
    expected = pl.DataFrame({"id": ["a", "b"], "x": [100.0, float("nan")]})
    near = expected.with_columns(x=pl.Series([100.0 + 1e-8, float("nan")]))
    assert compare(expected, near, ["id"], limit=1, tolerance=1e-9) == ([], 0)
    assert compare(expected, near, ["id"], limit=1)[1] == 1


def test_a_ledger_of_nothing_is_fine() -> None:
    assert Ledger().is_fine
