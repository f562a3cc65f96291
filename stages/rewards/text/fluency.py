"""Rewards against degenerate text: loops, and the wrong language. Surface errors are in `stages.rewards.text.surface`.

They find what is plainly broken, and do not tell good prose from fair prose. All work is in proportion to the length of
the answer: a policy that has collapsed writes until it is cut, again and again.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from pipeline.errors import RewardError
from stages.rewards.base import Score, check_range, deciding_arguments
from stages.rewards.words import IS_UNSPACED, clipped, ngrams, prose, words

MOST_PERIOD = 64
"""Longest unit of a loop, in words and in characters; each possible length costs a pass over the answer."""

SPACING = regex.compile(r"(?<!\s)\s{1,32}+(?!\s)")
"""White space between words, lines and paragraphs, indentation included; a longer run is a loop like any other."""

VARIETIES = {"ar": ("ary", "arz"), "no": ("nn",), "zh": ("wuu", "yue")}
"""Languages that the detector tells apart and that share their writing so far that short texts get confused."""


def repetition(
    completion: str, length: int = 4, least_copies: int = 3, least_copies_of_characters: int = 6, tolerance: float = 0.0
) -> Score:
    """Return 1 minus the largest of three shares, each 0 where nothing is said again and near 1 in a loop.

    ngrams: 1 - distinct / all n-grams of ``length`` words. Blind to order and distance: finds sentences that come
    again after a while.

    word_loops: the share of words that only continue a loop, a unit of 1 to 64 words that stands ``least_copies`` times
    or more in a row; the first copy is not counted.

    character_loops: the same for characters, and ``least_copies_of_characters``; up to 32 spaces or line ends in a row
    count as one. Finds loops without words (!!!!!!, emoji) and within one (hahahaha); rules and tables of Markdown
    count as well, with the share of the answer that they take.

    A share up to ``tolerance`` costs nothing; from there the reward falls in a straight line. Common English prose of
    some hundred words repeats a few 4-grams. The detail names the longest loop and the most frequent n-gram. An empty
    answer repeats nothing and gets 1.
    """
    check_range("length", length, 1)
    check_range("least_copies", least_copies, 2)
    check_range("least_copies_of_characters", least_copies_of_characters, 2)
    if not 0 <= tolerance < 1:
        raise RewardError(f"the tolerance {tolerance} is not 0 to under 1: correct it in the reward's arguments")
    tokens = words(completion)
    text = SPACING.sub(" ", completion)
    ngram_counts = Counter(ngrams(tokens, length))
    num_ngrams = max(len(tokens) - length + 1, 0)
    indices: dict[str, int] = {}
    word_loops, word_loop = _loops(np.array([indices.setdefault(t, len(indices)) for t in tokens]), least_copies)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    character_loops, character_loop = _loops(codes, least_copies_of_characters)
    shares = {
        "ngrams": 1 - len(ngram_counts) / num_ngrams if num_ngrams else 0.0,
        "word_loops": word_loops,
        "character_loops": character_loops,
    }
    detail: dict[str, Any] = {"num_words": len(tokens), "shares": {k: round(v, 6) for k, v in shares.items()}}
    if word_loop:
        start, period, copies = word_loop
        detail["word_loop"] = {"unit": clipped(" ".join(tokens[start : start + period]), 200), "copies": copies}
    if character_loop:
        start, period, copies = character_loop
        detail["character_loop"] = {"unit": text[start : start + period], "copies": copies}
    if ngram_counts:
        ngram, count = max(ngram_counts.items(), key=lambda item: item[1])  # the first one of the most frequent
        if count > 1:
            detail["ngram"] = {"words": clipped(" ".join(ngram), 200), "count": count}
    excess = max(0.0, max(shares.values()) - tolerance) / (1 - tolerance)
    return Score(1 - excess, detail)


def language(
    completion: str,
    language: str | None = None,
    candidates: Sequence[str] | None = None,
    least_letters: int = 20,
    least_probability: float = 0.0,
) -> Score:
    """Return 1 when the answer as a whole is in the language, else 0; null where it is too short to tell.

    ``language`` is a code such as en, de or zh, as argument or metadata key; of en-GB only en counts. Arabic, Chinese
    and Norwegian include the varieties in `VARIETIES`. The detector is py3langid with its model of some 140 languages;
    ``candidates`` restricts it to those that can occur, which helps most for short answers. Too short is under
    ``least_letters`` letters, where one of a script without spaces counts three: a Chinese character says more than a
    Latin letter. Code between backticks is left out.

    The probability is a calibrated guess: among 140 languages a right answer may have 0.3. Null when it is under
    ``least_probability``, and null without a language. An answer in two languages is taken for that which fills more.
    """
    if not language:
        return Score(None, {"reason": "no language is given, as argument or in the metadata"})
    detector = _detector(_codes(candidates))
    expected = _known(language, detector)
    text = prose(completion)
    num_letters = sum(3 if IS_UNSPACED.match(c) else 1 for c in text if c.isalpha())
    if num_letters < least_letters:
        reason = f"{num_letters} letters, fewer than {least_letters}: too short to tell"
        return Score(None, {"expected": expected, "reason": reason})
    detected, probability = detector.classify(text)
    detail = {"expected": expected, "detected": detected, "probability": round(float(probability), 4)}
    if probability < least_probability:
        return Score(None, {**detail, "reason": f"probability under {least_probability}: cannot tell"})
    return Score(float(detected in (expected, *VARIETIES.get(expected, ()))), detail)


def language_identity(**arguments: Any) -> dict[str, object]:
    """Return the arguments with the version of the detector, whose model is part of the package.

    Raises:
        RewardError: when the detector does not know a language.
    """
    decides = deciding_arguments(language, arguments)
    candidates = _codes(decides["candidates"])
    detector = _detector(candidates)
    known = _known(decides["language"], detector) if decides["language"] else None
    return {**decides, "language": known, "candidates": candidates, "py3langid": version("py3langid")}


def _loops(values: npt.NDArray[Any], least_copies: int) -> tuple[float, tuple[int, int, int] | None]:
    """Return the share of values that only continue a loop, and start, period and whole copies of the longest loop."""
    num_values = len(values)
    changes = np.zeros(num_values + 1, dtype=np.int64)
    longest, best = 0, None
    for period in range(1, min(MOST_PERIOD, num_values // least_copies) + 1):
        edges = np.zeros(num_values - period + 2, dtype=np.int8)
        edges[1:-1] = values[period:] == values[:-period]
        steps = np.diff(edges)
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        is_loop = ends - starts >= (least_copies - 1) * period
        starts, ends = starts[is_loop], ends[is_loop]
        changes[starts + period] += 1
        changes[ends + period] -= 1
        if len(starts) and (ends - starts).max() > longest:
            first = int((ends - starts).argmax())
            longest = int(ends[first] - starts[first])
            best = (int(starts[first]), period, (longest + period) // period)
    repeated = int(np.count_nonzero(np.cumsum(changes[:-1])))
    return repeated / max(num_values, 1), best


@lru_cache(maxsize=16)
def _detector(candidates: tuple[str, ...] | None) -> Any:
    # imported here: it loads numpy tables that the other rewards do not need
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = sorted(set(candidates or ()) - set(detector.labels))
    if unknown:
        raise RewardError(
            f"candidates has {unknown}, which the detector cannot find; expected some of {sorted(detector.labels)}: "
            "correct the candidates"
        )
    detector.set_languages(candidates)
    return detector


def _known(language: str, detector: Any) -> str:
    code = _code(language)
    if code not in detector.labels:
        raise RewardError(
            f"language is {language!r}, which the detector cannot find; expected one of {sorted(detector.labels)}: "
            "correct the language, or the candidates"
        )
    return code


def _codes(languages: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(sorted({_code(language) for language in languages})) if languages else None


def _code(language: str) -> str:
    primary = language.strip().lower().replace("_", "-").partition("-")[0]
    return "no" if primary == "nb" else primary
