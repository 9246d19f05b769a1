"""The matrices that formats are compared on, with the errors that were documented for them.

Gaussian of side 1296: the thesis' published single draw (Camenisch 2025), its absolute errors divided by 1296, the
expected norm; the draw matters in the third digit only. Gaussian of side 256 and the picture: documented for the very
matrices drawn here. First layer: trained here, as the thesis trained its own; its errors are published for another
training run and stand beside ours for the order of the formats, not for their digits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.data import load_cifar10
from isogrid.formats import (
    Blast,
    BlockTensorTrain,
    Format,
    Kronecker,
    LowRank,
    LowRankLight,
    Sparse,
    TensorTrain,
)
from isogrid.formats.sizes import nearest_pair


@dataclass(frozen=True)
class Entry:
    """One member of a format in the table of a target.

    Attributes:
        label: name of the row.
        format: the member.
        published: documented relative error, or None.
        theory: relative error that the law of large Gaussian matrices gives, or None.
        options: of the fit.
        deal: rows are dealt into runs first: row ``a · (out / deal) + j`` goes to place a of run j. The thesis' slices
            take strided rows, ours contiguous ones.
    """

    label: str
    format: Format
    published: float | None = None
    theory: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    deal: int = 1


@dataclass(frozen=True)
class Target:
    """A matrix to write in every format.

    Attributes:
        title: of its table.
        described: what it is, in words.
        matrix: makes it, float64; takes the folder of data sets.
        entries: makes its rows; takes whether few will do.
        same_matrix: whether the documented errors are of this very matrix.
    """

    title: str
    described: str
    matrix: Callable[[Path | None], Tensor]
    entries: Callable[[bool], Iterator[Entry]]
    same_matrix: bool


def thesis_monarch(blocks: int, out_features: int, in_features: int, error: float, law: float | None = None) -> Entry:
    """The thesis' Monarch: slices of ``blocks`` strided rows and ``in / blocks`` columns, each of rank one."""
    grid = BlockTensorTrain(1, out_factors=(out_features // blocks, blocks), in_factors=(blocks, in_features // blocks))
    return Entry("Monarch (rank one)", grid, error, law, deal=blocks)


def thesis_train(rank: int, out_features: int, in_features: int, error: float, law: float | None = None) -> Entry:
    """The thesis' Block Tensor-Train: strided rows, the larger divisor of both sizes first."""
    large, small = nearest_pair(out_features)
    grid = BlockTensorTrain(rank, out_factors=(small, large), in_factors=nearest_pair(in_features))
    return Entry("Block Tensor-Train, strided rows", grid, error, law, deal=large)


def gaussian(side: int) -> Callable[[Path | None], Tensor]:
    """A square matrix of independent standard normals: float32 numbers of torch's generator at seed 0."""
    return lambda _: torch.randn(side, side, generator=torch.Generator().manual_seed(0)).double()


def picture(_: Path | None) -> Tensor:
    """The documented picture, 128 x 192: waves, a disc and a lozenge."""
    y, x = torch.meshgrid(
        torch.arange(128, dtype=torch.float64) / 128, torch.arange(192, dtype=torch.float64) / 192, indexing="ij"
    )
    disc = 0.25 * ((x - 0.55) ** 2 + (y - 0.45) ** 2 < 0.04)
    lozenge = 0.3 * ((x - 0.2).abs() + (y - 0.7).abs() < 0.12)
    return 0.5 + 0.3 * (12 * x + 4 * y**2).sin() + 0.15 * (25 * x * y).cos() + disc - lozenge


def first_layer(data_dir: Path | None) -> Tensor:
    """``(128, 3072)``: first weights of a perceptron 3072-128-128-10 after five epochs of Adam on CIFAR-10's pixels."""
    pictures, labels = load_cifar10("train", data_dir=data_dir)
    rows = pictures.flatten(1).float() / 127.5 - 1
    source = torch.Generator().manual_seed(0)
    sizes = (3072, 128, 128, 10)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        for value in linear.parameters():
            with torch.no_grad():
                value.copy_((2 * torch.rand(value.shape, generator=source) - 1) / math.sqrt(fan_in))
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        for batch in torch.randperm(len(rows), generator=source).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows[batch]), labels[batch]).backward()
            optimizer.step()
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return weight.detach().double()


def low_rank_law(fraction: float, points: int = 200_000) -> float:
    """Relative error of the best approximation of a large square Gaussian matrix by this fraction of its rank."""
    s = (torch.arange(points, dtype=torch.float64) + 0.5) * (2 / points)
    density = (4 - s**2).sqrt() / math.pi * (2 / points)  # of the singular values over the root of the side
    below = density.cumsum(0) <= 1 - fraction
    return math.sqrt(float((density * s**2)[below].sum()))


def sparse_law(density: float) -> float:
    """Relative error of a large Gaussian matrix without all but this share of its entries, the largest."""
    normal = torch.distributions.Normal(0.0, 1.0)
    t = float(normal.icdf(torch.tensor(1 - density / 2, dtype=torch.float64)))
    return math.sqrt(1 - density - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi))


# Mean relative tail of small Gaussian slices at side 1296: 36 x 36 beyond rank r, and b x 1296/b beyond rank one.
TRAIN_LAW = {1: 0.9475, 2: 0.8990, 4: 0.8091, 9: 0.6108}
GRID_LAW = {36: 0.9476, 16: 0.9380, 8: 0.9092, 4: 0.8435, 2: 0.6898}


def _large_gaussian(quick: bool) -> Iterator[Entry]:
    side = 1296
    for rank, error in {16: 1264.98, 64: 1180.33, 128: 1076.32, 256: 887.58, 384: 718.91}.items():
        yield Entry("Low rank", LowRank(rank), error / side, low_rank_law(rank / side))
    published = {16: 1264.98, 64: 1182.22, 128: 1078.27, 256: 888.41, 384: 721.94, 512: 570.04, 768: 315.45}
    for rank, error in published.items():
        yield Entry("Low-Rank Light", LowRankLight(rank), error / side, low_rank_law(rank / side))
    published = {1: 1227.78, 2: 1165.02, 4: 1048.37, 7: 889.34, 9: 791.78, 12: 655.73, 15: 531.14}
    for rank, error in published.items():
        yield thesis_train(rank, side, side, error / side, TRAIN_LAW.get(rank))
    published = {36: 1227.78, 24: 1224.49, 16: 1215.04, 8: 1177.98, 4: 1092.57, 3: 1030.98, 2: 893.11}
    for blocks, error in published.items():
        yield thesis_monarch(blocks, side, side, error / side, GRID_LAW.get(blocks))
    for rank, error in {64: 1180.11, 256: 887.11}.items():
        yield Entry("Tensor train", TensorTrain(rank), error / side)
    for first, error in {36: 1293.58, 12: 1290.06, 8: 1284.54, 4: 1254.04, 2: 1122.13}.items():
        pair = (first, side // first)
        yield Entry("Kronecker", Kronecker(1, out_factors=pair, in_factors=pair), error / side)
    for density, error in {0.01: 1239.53, 0.1: 969.91, 0.3: 603.07, 0.5: 346.13, 0.75: 118.64}.items():
        yield Entry("Sparse", Sparse(density), error / side, sparse_law(density))
    blast = {
        4: {16: 1262.87, 64: 1165.16, 256: 776.00},
        8: {16: 1262.57, 64: 1158.26, 256: 742.84},
        12: {16: 1257.78, 64: 1145.73, 256: 706.94, 480: 229.12},
    }
    for blocks, sizes in blast.items():
        for rank, error in sizes.items():
            if not quick or rank <= 64:
                options = {"sweeps": 100 if quick else 300, "polish": 0, "restarts": 1}
                yield Entry(f"BLAST {blocks} x {blocks}", Blast(rank, blocks), error / side, options=options)


def _small_gaussian(quick: bool) -> Iterator[Entry]:
    for rank, error in {16: 0.88791, 32: 0.78844, 64: 0.61089, 96: 0.45716}.items():
        yield Entry("Low rank", LowRank(rank), error)
        yield Entry("Low-Rank Light", LowRankLight(rank), error)
    for blocks, error in {2: 0.66723, 4: 0.81365, 8: 0.87154, 16: 0.88617, 32: 0.86986}.items():
        yield thesis_monarch(blocks, 256, 256, error)
    for rank, error in {1: 0.88617, 2: 0.78551, 4: 0.60730, 6: 0.45267}.items():
        yield thesis_train(rank, 256, 256, error)
    for terms, error in {1: 0.99253, 4: 0.97095, 16: 0.89034, 64: 0.61507}.items():
        yield Entry("Kronecker sum", Kronecker(terms), error)
    for density, error in {0.02: 0.9250, 0.05: 0.8491, 0.1: 0.7492, 0.25: 0.5275, 0.5: 0.2684}.items():
        yield Entry("Sparse", Sparse(density), error)
    blast = {
        2: {32: 0.763, 64: 0.540, 96: 0.323},
        4: {32: 0.737, 64: 0.476, 96: 0.220},
        8: {32: 0.695, 64: 0.395, 96: 0.128},
        16: {32: 0.582, 64: 0.204},
    }
    for blocks, sizes in blast.items():
        for rank, error in sizes.items():
            if not quick or rank == 64:
                yield Entry(f"BLAST {blocks} x {blocks}", Blast(rank, blocks), error, options=_thorough(quick))


def _picture(quick: bool) -> Iterator[Entry]:
    for rank, error in {4: 0.1167, 8: 0.0498, 16: 0.0253, 32: 0.0116}.items():
        yield Entry("Low rank", LowRank(rank), error)
        yield Entry("Low-Rank Light", LowRankLight(rank), error)
    for rank, error in {1: 0.1026, 2: 0.0276, 4: 0.0066}.items():
        yield thesis_train(rank, 128, 192, error)
        yield Entry("Block Tensor-Train", BlockTensorTrain(rank))
    for terms, error in {1: 0.1287, 4: 0.0342, 16: 0.0137}.items():
        yield Entry("Kronecker sum", Kronecker(terms), error)
    for blocks, error in {2: 0.390, 8: 0.181, 32: 0.057}.items():
        yield thesis_monarch(blocks, 128, 192, error)
    for blocks, rank, error in ((4, 4, 0.066), (8, 8, 0.024), (8, 16, 0.0116)):
        yield Entry(f"BLAST {blocks} x {blocks}", Blast(rank, blocks), error, options=_thorough(quick))
    yield Entry("Sparse", Sparse(0.1), 0.847)


def _first_layer(quick: bool) -> Iterator[Entry]:
    norm = 58.7  # of the thesis' own layer
    for rank, error in {16: 44.38, 32: 36.49, 64: 23.96, 96: 13.83}.items():
        yield Entry("Low rank", LowRank(rank), error / norm)
    for rank, error in {16: 44.61, 32: 36.52, 64: 24.07}.items():
        yield Entry("Low-Rank Light", LowRankLight(rank), error / norm)
    for blocks, error in {64: 48.40, 8: 48.03, 4: 45.21, 2: 36.93}.items():
        yield thesis_monarch(blocks, 128, 3072, error / norm)
    for rank, error in {1: 45.61, 2: 37.89, 3: 32.40, 6: 21.62}.items():
        yield thesis_train(rank, 128, 3072, error / norm)
        yield Entry("Block Tensor-Train", BlockTensorTrain(rank))
    for rank, error in {16: 40.62, 32: 30.75, 64: 18.13, 96: 9.05}.items():
        yield Entry("BLAST 8 x 8", Blast(rank, 8), error / norm, options=_thorough(quick))
    for density, error in {0.05: 45.81, 0.2: 30.20, 0.5: 13.19}.items():
        yield Entry("Sparse", Sparse(density), error / norm)


def _thorough(quick: bool) -> dict[str, Any]:
    return {} if quick else {"sweeps": 1000, "polish": 0, "restarts": 1}


TARGETS: dict[str, Target] = {
    "gaussian-256": Target(
        "How near each format comes to a Gaussian matrix, 256 x 256",
        "256 x 256 standard normals of torch's generator, seed 0",
        gaussian(256),
        _small_gaussian,
        True,
    ),
    "picture": Target(
        "How near each format comes to a smooth picture with edges, 128 x 192",
        "128 x 192 values of a formula: waves, a disc, a lozenge",
        picture,
        _picture,
        True,
    ),
    "first-layer": Target(
        "How near each format comes to a trained first layer on pixels, 128 x 3072",
        "first layer of a perceptron 3072-128-128-10 after five epochs of CIFAR-10, trained here",
        first_layer,
        _first_layer,
        False,
    ),
    "gaussian-1296": Target(
        "How near each format comes to a Gaussian matrix, 1296 x 1296",
        "1296 x 1296 standard normals of torch's generator, seed 0",
        gaussian(1296),
        _large_gaussian,
        False,
    ),
}
