"""Rewards for answers that speak of what the prompt asks, by the words that both share.

Both look at words, not at meaning: a synonym counts as missing, and an answer that repeats the question scores high.
Weigh them lightly, beside a reward for being right. Stop words are described in `stages.rewards.words`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import RewardError
from pipeline.files import sha256_file, user_path
from stages.rewards.base import Score, check_range, deciding_arguments
from stages.rewards.words import MOST_LISTED, content_words, stop_set, words

AVERAGE_WORDS = 100.0
"""Content words of an answer of usual length, where no corpus says otherwise."""

NO_WORDS = {"reason": "the prompt has no content words"}


class Corpus(NamedTuple):
    """What BM25 knows of a corpus."""

    num_documents: int
    average_words: float
    document_counts: Counter[str]
    """In how many documents a word occurs."""


def bm25(
    completion: str,
    prompt: str,
    corpus: str | None = None,
    corpus_key: str = "text",
    average_words: float | None = None,
    stop_words: str | Sequence[str] = "en",
    k1: float = 1.2,
    b: float = 0.75,
) -> Score:
    """Return the answer's BM25 score for the prompt's content words over the largest possible one: from 0 to under 1.

    The sum over the prompt's distinct words of idf * tf / (tf + k1 * (1 - b + b * length / average)), divided by the
    sum of idf (Robertson and Zaragoza 2009, with the idf of Lucene). An answer of average length that has each word
    once gets 1 / (1 + k1) = 0.4545; saying a word again helps less each time, and length costs. Null when the prompt
    has no content words.

    The idf comes from ``corpus``, never from the other answers, so that a reward does not depend on its batch: a text
    file with one document per line, or with the ending .jsonl one object per line, whose text is under ``corpus_key``.
    Each worker reads it once; some 10,000 documents are plenty. Without corpus every word has the idf 1. Average
    length, in content words, is ``average_words``, else the corpus's, else 100.
    """
    check_range("k1", k1, 0)
    check_range("b", b, 0, 1)
    check_range("average_words", average_words or 1, 1)
    wanted = list(dict.fromkeys(content_words(prompt, stop_words)))
    if not wanted:
        return Score(None, NO_WORDS)
    known = _read_corpus(corpus, corpus_key, stop_set(stop_words)) if corpus else None
    answer = content_words(completion, stop_words)
    average = average_words or (known.average_words if known else AVERAGE_WORDS)
    damping = k1 * (1 - b + b * len(answer) / average)
    counts = Counter(answer)
    weights = {word: _inverse_document_frequency(word, known) for word in wanted}
    # a word that is not there adds nothing, whatever the damping: with k1 = 0 it would be 0 / 0
    parts = {word: weights[word] * n / (n + damping) for word in wanted if (n := counts[word])}
    reward = sum(parts.values()) / sum(weights.values())
    strongest = sorted(parts, key=lambda word: -parts[word])[:MOST_LISTED]
    return Score(
        reward,
        {
            "num_words": len(answer),
            "matched": {word: {"count": counts[word], "idf": round(weights[word], 6)} for word in strongest},
            "missing": [word for word in wanted if word not in counts][:MOST_LISTED],
        },
    )


def bm25_identity(**arguments: Any) -> dict[str, object]:
    """Return the arguments with the corpus's digest in place of its path.

    Raises:
        RewardError: when the corpus cannot be used.
    """
    decides = deciding_arguments(bm25, arguments)
    if not (corpus := decides["corpus"]):
        return {**decides, "corpus": None, "corpus_key": None}
    _read_corpus(corpus, decides["corpus_key"], stop_set(decides["stop_words"]))
    return {**decides, "corpus": sha256_file(user_path(corpus))}


def coverage(completion: str, prompt: str, stop_words: str | Sequence[str] = "en", prefix: int = 0) -> Score:
    """Return the share of the prompt's distinct content words that the answer takes up; null when it has none.

    With ``prefix`` above 0 words count as equal when their first ``prefix`` characters are: a coarse way to match
    "calculated" with "calculation" that works for languages with endings, and needs no dictionary.
    """
    check_range("prefix", prefix, 0)
    wanted = list(dict.fromkeys(content_words(prompt, stop_words)))
    if not wanted:
        return Score(None, NO_WORDS)
    end = prefix or None
    said = {word[:end] for word in content_words(completion, stop_words)}
    covered = [word for word in wanted if word[:end] in said]
    missing = [word for word in wanted if word[:end] not in said]
    return Score(
        len(covered) / len(wanted),
        {"num_words": len(wanted), "covered": covered[:MOST_LISTED], "missing": missing[:MOST_LISTED]},
    )


def _inverse_document_frequency(word: str, corpus: Corpus | None) -> float:
    """Return ln(1 + (N - n + 0.5) / (n + 0.5)), which is above 0 for every word; 1 without a corpus."""
    if corpus is None:
        return 1.0
    count = corpus.document_counts[word]
    return math.log1p((corpus.num_documents - count + 0.5) / (count + 0.5))


@lru_cache(maxsize=8)
def _read_corpus(corpus: str, key: str, left_out: frozenset[str]) -> Corpus:
    path = user_path(corpus)
    if not path.is_file():
        raise RewardError(f"corpus is {corpus!r}, where no file is; expected a text or .jsonl file: correct the path")
    counts: Counter[str] = Counter()
    num_documents = num_words = 0
    for document in _documents(path, key):
        found = [word for word in words(document) if word not in left_out]
        counts.update(set(found))
        num_documents += 1
        num_words += len(found)
    if not num_words:
        raise RewardError(f"the corpus {corpus!r} has no content words; expected one document per line: give another")
    return Corpus(num_documents, num_words / num_documents, counts)


def _documents(path: Path, key: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if path.suffix != ".jsonl":
                yield line
                continue
            try:
                document = json.loads(line)[key]
            except (ValueError, KeyError, TypeError) as error:
                raise RewardError(
                    f"line {number} of the corpus {str(path)!r} is no JSON object with {key!r} "
                    f"({type(error).__name__}: {error}): correct the line, or name the key as corpus_key"
                ) from error
            yield str(document)
