"""Sizes that don't divide: padding, and the splitting of a size into sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isogrid.errors import IsogridError

# A pair of sides more skewed than this is avoided by padding the size up to the next one that has a better pair.
WORST_SKEW = 4


def pad_matrix(target: Tensor, out_features: int, in_features: int) -> Tensor:
    """Zero rows and columns appended to a matrix up to the given sizes."""
    return torch.nn.functional.pad(target, (0, in_features - target.shape[1], 0, out_features - target.shape[0]))


def balanced_pair(n: int) -> tuple[int, int]:
    """(small, large): divisor pair nearest the root, of the first size from n up whose sides differ at most 4-fold."""
    while True:
        large, small = nearest_pair(n)
        if large <= WORST_SKEW * small:
            return small, large
        n += 1


def greedy_pair(n: int) -> tuple[int, int]:
    """(small, large): prime factors in ascending order, each to the smaller product (the reference's rule)."""
    products = [1, 1]
    divisor = 2
    while n > 1:
        if divisor * divisor > n:
            divisor = n
        while n % divisor == 0:
            products[products.index(min(products))] *= divisor
            n //= divisor
        divisor += 1
    return min(products), max(products)


def nearest_pair(n: int) -> tuple[int, int]:
    """(large, small): the divisor pair nearest the root."""
    small = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return n // small, small


def stride_order(n: int, blocks: int) -> Tensor:
    """``(n,)`` int64: every ``blocks``-th index from 0 on, then from 1 on, …: deals n things out to blocks in turn.

    Place ``c · (n / blocks) + i`` holds ``i · blocks + c``. As the input order of a `Permuted` Monarch it is what the
    Fourier transform needs (Dao et al. 2022, the permutation of Cooley and Tukey).

    Raises:
        IsogridError: ``blocks`` does not divide n.
    """
    if blocks < 1 or n % blocks:
        raise IsogridError(f"{n} things can't be dealt out to {blocks} equal blocks; take a divisor of {n}")
    return torch.arange(n).view(n // blocks, blocks).T.reshape(-1)


def nearest_sides(n: int, parts: int) -> list[int]:
    """``parts`` near-equal divisors with product n, descending."""
    sides: list[int] = []
    for left in range(parts, 1, -1):
        root = n ** (1 / left)
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        side = min(divisors, key=lambda d: (abs(math.log(d / root)), -d))
        sides.append(side)
        n //= side
    return sorted([*sides, n], reverse=True)
