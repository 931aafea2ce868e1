"""The byte-pair vocabulary: nothing is lost, and the frequent pairs are found."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from byte_pairs import CHUNKS, BytePairs

SOURCE = Path(random.__file__).read_bytes()
AWKWARD = [
    b"",
    b"\n",
    b" ",
    b"\t \r\n  x",
    bytes(range(256)),
    "größer → 大きい".encode(),
    b"a" * 7,
    b"  if x:\n\n\n    y",
]


@pytest.mark.parametrize("text", [*AWKWARD, SOURCE], ids=range(len(AWKWARD) + 1))
def test_every_byte_comes_back(text: bytes) -> None:
    pairs = BytePairs.learn(SOURCE, 400)
    assert b"".join(CHUNKS.findall(text)) == text
    tokens = pairs.encode(text)
    assert pairs.decode(tokens.tolist()) == text
    assert pairs.lengths[tokens].sum() == len(text)


def test_without_pairs_tokens_are_bytes() -> None:
    pairs = BytePairs.learn(SOURCE, 256)
    assert pairs.pairs == []
    assert pairs.encode(b"ab\xff").dtype == np.uint8
    assert pairs.encode(b"ab\xff").tolist() == [97, 98, 255]
    assert pairs.lengths.tolist() == [1] * 256


def test_pairs_are_learned_by_frequency() -> None:
    pairs = BytePairs.learn(b"abc abc abc abc ab ab xy", 260)
    # " a" and "ab" occur together: " a" 5 times, "ab" 6 times, so "ab" is first and swallows the "a".
    assert pairs.texts[256] == b"ab"
    assert pairs.texts[257] == b" ab"
    assert pairs.encode(b"ab ab").tolist() == [256, 257]


def test_learning_matches_the_definition() -> None:
    """The incremental counts choose the same pairs as counting everything anew for each merge."""
    text = SOURCE[:3000]
    chunks = [list(chunk) for chunk in CHUNKS.findall(text)]
    expected = []
    for new in range(256, 300):
        counts: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            for pair in pairwise(chunk):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        for index, chunk in enumerate(chunks):
            merged: list[int] = []
            for token in chunk:
                # "aaa" holds the pair (a, a) once from the left: the merged token is new and pairs no further
                if merged and (merged[-1], token) == best:
                    merged[-1] = new
                else:
                    merged.append(token)
            chunks[index] = merged
    assert BytePairs.learn(text, 300).pairs == expected


def test_learning_stops_when_no_pair_occurs_twice() -> None:
    assert BytePairs.learn(b"abcdef", 1000).pairs == []


def test_byte_pairs_shorten_source_code() -> None:
    pairs = BytePairs.learn(SOURCE, 1024)
    assert len(pairs.pairs) == 1024 - 256
    assert len(pairs.encode(SOURCE)) < 0.45 * len(SOURCE)
    assert pairs.encode(SOURCE).dtype == np.uint16


def test_a_token_that_was_never_learned_stands_for_nothing() -> None:
    assert BytePairs.learn(b"abab", 1024).decode([97, 900, 98]) == b"ab"
