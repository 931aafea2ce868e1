"""A byte-pair vocabulary learned from the text itself, in plain Python: seconds for tens of megabytes.

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", section 3.2, on bytes as in
GPT-2.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

# Tokens never cross the borders of these chunks: a line break with the indentation after it, a word with the space
# before it, punctuation with the space before it, other white space. Every byte belongs to exactly one chunk.
CHUNKS = re.compile(rb"\n+ *| ?\w+| ?[^\w\s]+|\s+?")

Pair = tuple[int, int]


class BytePairs:
    """Tokens 0 to 255 are the bytes; token 256 + i stands for the i-th pair of earlier tokens. Without pairs, tokens
    are bytes.

    Args:
        pairs: in the order in which they were learned.
    """

    def __init__(self, pairs: Sequence[Sequence[int]] = ()) -> None:
        self.pairs: list[Pair] = [(left, right) for left, right in pairs]
        self.texts = [bytes([byte]) for byte in range(256)]
        for left, right in self.pairs:
            self.texts.append(self.texts[left] + self.texts[right])
        self.dtype = np.dtype(np.uint16 if self.pairs else np.uint8)
        self._ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self._known = _Known(self)

    @classmethod
    def learn(cls, text: bytes, vocab_size: int) -> BytePairs:
        """Learn pairs until there are ``vocab_size`` tokens, or no pair occurs twice.

        Args:
            text: a sample of the text to encode; a few million bytes are enough.
            vocab_size: number of tokens, at least 256.
        """
        counts = Counter(CHUNKS.findall(text)) if vocab_size > 256 else Counter()
        chunks = [list(chunk) for chunk in counts]
        weights = list(counts.values())
        total: Counter[Pair] = Counter()  # occurrences of each pair
        where: defaultdict[Pair, set[int]] = defaultdict(set)  # chunks that had the pair at some time
        for index, chunk in enumerate(chunks):
            for pair in pairwise(chunk):
                total[pair] += weights[index]
                where[pair].add(index)
        heap = [(-count, pair) for pair, count in total.items()]  # outdated entries are skipped when they come up
        heapq.heapify(heap)
        pairs: list[Pair] = []
        while heap and 256 + len(pairs) < vocab_size:
            count, best = heapq.heappop(heap)
            if -count != total[best]:
                continue
            if -count < 2:
                break
            new = 256 + len(pairs)
            pairs.append(best)
            changed: set[Pair] = set()
            for index in where.pop(best):
                old, merged = chunks[index], _merge(chunks[index], best, new)
                if len(merged) == len(old):
                    continue
                for pair in pairwise(old):
                    total[pair] -= weights[index]
                    changed.add(pair)
                for pair in pairwise(merged):
                    total[pair] += weights[index]
                    where[pair].add(index)
                    changed.add(pair)
                chunks[index] = merged
            for pair in changed:
                if total[pair] > 0:
                    heapq.heappush(heap, (-total[pair], pair))
        return cls(pairs)

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for [tokens], int64."""
        return np.array([len(text) for text in self.texts], dtype=np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        """Return the token numbers of ``text`` [T], in ``dtype``."""
        if not self.pairs:
            return np.frombuffer(text, dtype=self.dtype)
        return np.frombuffer(b"".join(map(self._known.__getitem__, CHUNKS.findall(text))), dtype=self.dtype)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of token numbers [T]; numbers that no token has stand for nothing."""
        return b"".join(self.texts[token] for token in tokens if token < len(self.texts))

    def _encode_chunk(self, chunk: bytes) -> list[int]:
        tokens = list(chunk)
        while len(tokens) > 1:
            rank = min(self._ranks.get(pair, len(self.pairs)) for pair in pairwise(tokens))
            if rank == len(self.pairs):
                break
            tokens = _merge(tokens, self.pairs[rank], 256 + rank)
        return tokens


class _Known(dict[bytes, bytes]):
    """Chunks already encoded: text to token numbers as raw memory. Text repeats itself, so most are found."""

    def __init__(self, owner: BytePairs) -> None:
        super().__init__()
        self.owner = owner

    def __missing__(self, chunk: bytes) -> bytes:
        encoded = np.array(self.owner._encode_chunk(chunk), dtype=self.owner.dtype).tobytes()
        self[chunk] = encoded
        return encoded


def _merge(tokens: list[int], pair: Pair, new: int) -> list[int]:
    """Return ``tokens`` with each occurrence of ``pair``, from left to right, replaced by ``new``."""
    merged = []
    index = 0
    while index < len(tokens):
        if tokens[index] == pair[0] and index + 1 < len(tokens) and tokens[index + 1] == pair[1]:
            merged.append(new)
            index += 2
        else:
            merged.append(tokens[index])
            index += 1
    return merged
