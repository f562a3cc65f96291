"""Texts as words, characters and short sequences of them, one row per sequence, without a Python loop over texts."""

import polars as pl

NUM_HASHES = 64
BANDS = 8
"""Two texts of Jaccard similarity s share a band of 8 hashes with probability 1 - (1 - s^8)^8: 0.77 for 0.8, 0.03 for
0.5."""


def normalized(text: pl.Expr) -> pl.Expr:
    """Return letters and digits only, in lower case, words set apart and framed by single spaces."""
    return pl.format(" {} ", text.str.to_lowercase().str.replace_all(r"[^\p{L}\p{N}]+", " ").str.strip_chars(" "))


def names_reference(text: pl.Expr, reference: pl.Expr) -> pl.Expr:
    """Return whether the text contains the reference as whole words; null where there is none."""
    wanted = normalized(reference)
    is_told = wanted.str.contains(r"\S")
    return pl.when(is_told).then(normalized(text).str.contains(wanted, literal=True))


def plain(text: pl.Expr) -> pl.Expr:
    """Return the text in lower case with single spaces; signs stay."""
    return text.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars(" ")


def words(text: pl.Expr) -> pl.Expr:
    """Return the words of a text as a list, without signs."""
    bare = normalized(text).str.strip_chars(" ")
    return pl.when(bare == "").then(pl.lit([], dtype=pl.List(pl.String))).otherwise(bare.str.split(" "))


def sequences(frame: pl.DataFrame, units: str, length: int, key: str = "row") -> pl.DataFrame:
    """Return key and ``sequence``, a row for each run of ``length`` neighbours in the list column ``units``."""
    flat = frame.select(key, unit=units).explode("unit", empty_as_null=False)
    neighbours = [pl.col("unit").shift(-step).alias(f"unit_{step}") for step in range(length)]
    same = pl.col(key).shift(1 - length) == pl.col(key)
    whole = flat.select(key, *neighbours, is_inside=same.fill_null(length == 1))
    joined = pl.concat_str([f"unit_{step}" for step in range(length)], separator="\x1f")
    return whole.filter("is_inside").select(key, sequence=joined)


def signatures(frame: pl.DataFrame, units: str, length: int = 3) -> pl.DataFrame:
    """Return row and the minimum of each hash over its sequences: MinHash (Broder 1997)."""
    shingles = sequences(frame, units, length)
    hashes = [pl.col("sequence").hash(seed).min().alias(f"hash_{seed}") for seed in range(NUM_HASHES)]
    return shingles.group_by("row", maintain_order=True).agg(hashes)


def similarity(left: str, right: str) -> pl.Expr:
    """Return the estimated Jaccard similarity of two signatures joined with these suffixes."""
    equal = [(pl.col(f"hash_{i}{left}") == pl.col(f"hash_{i}{right}")).cast(pl.Int32) for i in range(NUM_HASHES)]
    return pl.sum_horizontal(equal) / NUM_HASHES


def bands(signed: pl.DataFrame) -> pl.DataFrame:
    """Return row, band and bucket: texts that share a bucket are probably near-duplicates."""
    width = NUM_HASHES // BANDS
    buckets = [
        pl.struct([f"hash_{i}" for i in range(band * width, (band + 1) * width)]).hash().alias(str(band))
        for band in range(BANDS)
    ]
    return signed.select("row", *buckets).unpivot(index="row", variable_name="band", value_name="bucket")


def repeated_share(frame: pl.DataFrame, min_words: int, min_characters: int) -> pl.DataFrame:
    """Return row and the share of its sequences that stood in it before, for every text that is long enough.

    Sequences are word 3-grams from ``min_words`` words, else pairs of characters.
    """
    split = frame.with_columns(units=words(pl.col("completion")))
    long = split.filter(pl.col("units").list.len() >= min_words)
    short = split.filter(pl.col("units").list.len() < min_words).with_columns(
        units=pl.col("completion").str.strip_chars().str.split("")
    )
    short = short.filter(pl.col("units").list.len() >= min_characters)
    found = pl.concat([sequences(long, "units", 3), sequences(short, "units", 2)])
    share = 1 - pl.col("sequence").n_unique() / pl.len()
    return found.group_by("row", maintain_order=True).agg(repeated=share)
