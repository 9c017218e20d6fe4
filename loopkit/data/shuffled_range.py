"""The numbers below a length in a random order, each computed where it is read."""

from __future__ import annotations

from math import isqrt

import numpy
import torch

from loopkit.rng import mix

_ROUNDS = 8
_BLOCK = 1 << 14
_Digits = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint64]]


class ShuffledRange:
    """A permutation of ``range(length)`` that keeps no list, so it takes the same memory at any length.

    A number is two digits to a base, the square root of the length. A Feistel network permutes the
    pairs of digits: each round adds a hash of one digit to the other. A pair that stands for a number
    of ``length`` or more is permuted again until its number is below. Source: the generalised Feistel
    cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002. The
    hash of a round is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        length: how many numbers, from 1 to 2**62.
        seed: chooses the permutation.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self._base = numpy.uint64(isqrt(length - 1) + 1)
        self._keys = [numpy.uint64(mix(seed, number)) for number in range(_ROUNDS)]
        self._start, self._block = 0, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, positions: slice) -> torch.Tensor:
        """Return the numbers at some positions in a row: an int64 tensor, which is not to be changed.

        One block is kept, because calls of NumPy for a single batch would take longer than the batch.
        """
        low, high, _ = positions.indices(self.length)
        start = low - self._start
        if not 0 <= start <= high - self._start <= len(self._block):
            end = max(high, min(low + _BLOCK, self.length))
            self._start, self._block, start = low, self._computed(low, end), 0
        return self._block[start : start + max(high - low, 0)]

    def _computed(self, low: int, high: int) -> torch.Tensor:
        numbers = self._permuted(numpy.arange(low, high, dtype=numpy.uint64))
        while (outside := numpy.flatnonzero(numbers >= self.length)).size:
            numbers[outside] = self._permuted(numbers[outside])
        return torch.from_numpy(numbers.astype(numpy.int64))

    def _permuted(self, numbers: _Digits) -> _Digits:
        high, low = numpy.divmod(numbers, self._base)
        for key in self._keys:
            high, low = low, (high + _hash(low ^ key) % self._base) % self._base
        permuted: _Digits = high * self._base + low
        return permuted


def _hash(values: _Digits) -> _Digits:
    values = (values ^ values >> numpy.uint64(30)) * numpy.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> numpy.uint64(27)) * numpy.uint64(0x94D049BB133111EB)
    values ^= values >> numpy.uint64(31)
    return values
