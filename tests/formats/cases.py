"""Which members of which formats the tests run over, and how to make their inputs.

Members of every registered format are found by themselves; `VARIANTS` adds those whose hyper-parameters a budget does
not reach. Testing a new format is adding a line here, or none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isogrid import (
    Armor,
    Blast,
    BlockDense,
    BlockDiagonal,
    BlockTensorChain,
    BlockTensorTrain,
    Budget,
    BudgetError,
    Capped,
    Circulant,
    Dense,
    DenseSparse,
    Format,
    IsogridError,
    Kronecker,
    LowRank,
    LowRankLight,
    Metric,
    Monarch,
    Permuted,
    Product,
    Quantized,
    SemiStructured,
    Sparse,
    Stored,
    Sum,
    TensorTrain,
    TritPlanes,
)
from isogrid.formats import new_factors, registered

SHAPES: dict[str, tuple[int, int]] = {
    "square": (12, 12),
    "tall": (24, 10),
    "wide": (10, 24),
    "prime": (13, 7),
    "row": (1, 9),
    "column": (9, 1),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KEEPS = (0.3, 0.6, 1.0)

VARIANTS: dict[str, tuple[Format, ...]] = {
    "armor": (Armor(block=4), Armor(block=5, keep=1, of=3), Armor(block=1)),
    "blast": (Blast(rank=5, blocks=3),),
    "block_dense": (BlockDense(rank=1, blocks=3), BlockDense(rank=1, blocks=1)),
    "block_diagonal": (BlockDiagonal(blocks=3, shuffle=True), BlockDiagonal(blocks=5)),
    "capped": (Capped(LowRank(rank=1)), Capped(Dense())),
    "dense_sparse": (
        DenseSparse(atoms=4, ratio=3),
        DenseSparse(atoms=3, blocks=2),
        DenseSparse(atoms=2, ratio=1, blocks=5),
    ),
    "kronecker": (Kronecker(terms=2),),
    "tensor_train": (TensorTrain(rank=2, cores=3),),
    "quantized": (Quantized(bits=3, group=5), Quantized(bits=1), Quantized(bits=8, group=None)),
    "semi_structured": (SemiStructured(keep=1, of=5), SemiStructured(keep=5, of=10)),
    "sparse": (Sparse(density=1.0),),
    "stored": (
        Stored(Dense()),
        Stored(Permuted(Sum((LowRank(rank=1), Monarch(blocks=2)))), TritPlanes(planes=1, group=4)),
        Stored(Capped(Kronecker()), TritPlanes(packing="base_three")),
        Stored(LowRank(rank=5), TritPlanes(planes=3, group=5)),
        Stored(Sparse(density=0.5)),
    ),
    "trit_planes": (
        TritPlanes(planes=1, group=5),
        TritPlanes(planes=3, group=4),
        TritPlanes(group=7, packing="base_three"),
        TritPlanes(planes=3, packing="base_three"),
    ),
    "block_tensor_chain": (BlockTensorChain(rank=2, cores=4), BlockTensorChain(rank=3, cores=2)),
    "block_tensor_train": (
        BlockTensorTrain(rank=2, factorization="greedy"),
        BlockTensorTrain(rank=5, out_factors=(4, 7), in_factors=(5, 5)),  # padded both ways, rank above a block's side
    ),
    "low_rank": (LowRank(rank=1),),
    "low_rank_light": (LowRankLight(rank=1),),
    "monarch": (
        Monarch(blocks=2),
        Monarch(blocks=3, rank=2),
        Monarch(blocks=5),  # slices of mixed rank, some of rank zero
        Monarch(blocks=4, rank=7),  # rank above a slice's side
    ),
    "product": (
        Product((Monarch(blocks=3),)),
        Product((Permuted(Monarch(blocks=2)), Sum((Dense(), Circulant()))), widths=(5,)),
        Product((LowRank(rank=1), Circulant(), Capped(Dense()))),
    ),
    "permuted": (Permuted(LowRankLight(rank=1)), Permuted(Sum((LowRank(rank=1), Monarch(blocks=2))))),
    "sum": (
        Sum((Monarch(blocks=3),)),
        Sum((LowRank(rank=1), Monarch(blocks=2, rank=1), LowRankLight(rank=1))),
        Sum((Dense(), Permuted(Monarch(blocks=3)))),
    ),
}

# What a product may lose against float64, in the norm of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def prototypes(name: str) -> tuple[Format, ...]:
    """The format's default, where it has one, and its variants."""
    cls = registered()[name]
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return (*(() if required else (cls(),)), *VARIANTS.get(name, ()))


def suits(fmt: Format, out_features: int, in_features: int) -> bool:
    """Whether a matrix of these sizes can be written in the format."""
    try:
        fmt.factors(out_features, in_features)
    except IsogridError:
        return False
    return True


def sized(fmt: Format, out_features: int, in_features: int, keep: float) -> Format | None:
    """The member for a fraction of the dense parameters, or None; unlike `Budget.keep` the fraction may exceed one."""
    try:
        return fmt.sized(
            out_features, in_features, Budget(parameters=math.floor(keep * out_features * in_features + 1e-9))
        )
    except BudgetError:
        return None


def members(name: str, out_features: int, in_features: int) -> list[Format]:
    """Different members of a format for a matrix of these sizes, at least one."""
    found: list[Format] = []
    for prototype in prototypes(name):
        if suits(prototype, out_features, in_features):
            found.append(prototype)
    for keep in (*KEEPS, 1000.0):
        member = sized(prototypes(name)[0], out_features, in_features, keep)
        if member is not None:
            found.append(member)
    return list(dict.fromkeys(found))


def middle_member(name: str, out_features: int, in_features: int, keep: float = 0.6) -> Format:
    """One member of a format, of about the size a person would take."""
    for fraction in (keep, 1.0, 1000.0):
        member = sized(prototypes(name)[0], out_features, in_features, fraction)
        if member is not None:
            return member
    raise AssertionError(f"{name} has no member for {out_features} x {in_features}")


Case = tuple[Format, int, int]


def case_id(case: Case) -> str:
    """``monarch(blocks=3)-12x10``."""
    fmt, out_features, in_features = case
    return f"{fmt.label()}-{out_features}x{in_features}"


def every_member() -> list[Case]:
    """All members of all formats on all shapes."""
    return [(fmt, m, n) for name in registered() for m, n in SHAPES.values() for fmt in members(name, m, n)]


def fit_cases(shapes: Iterable[tuple[int, int]] = ((10, 12), (13, 7))) -> list[Case]:
    """Few members of all formats: for properties of fits, which take longer."""
    found: list[Case] = []
    for name in registered():
        for m, n in shapes:
            found.append((middle_member(name, m, n), m, n))
    return list(dict.fromkeys(found))


def with_trait(trait: str, shapes: Iterable[tuple[int, int]]) -> list[Case]:
    """Members, sized in the middle and all variants, of the formats that declare a trait."""
    found: list[Case] = []
    for name, cls in registered().items():
        if not getattr(cls.traits, trait):
            continue
        for m, n in shapes:
            found.append((middle_member(name, m, n), m, n))
            found += [(fmt, m, n) for fmt in VARIANTS.get(name, ()) if suits(fmt, m, n)]
    return list(dict.fromkeys(found))


def over(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrise a test over ``fmt, m, n``."""
    return pytest.mark.parametrize(("fmt", "m", "n"), cases, ids=[case_id(case) for case in cases])


def generator(seed: int = 0) -> torch.Generator:
    """A seeded source."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Independent standard normal numbers."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_factors(
    fmt: Format, m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The format's start, with gains away from one and every order of inputs or outputs shuffled."""
    source = generator(seed)
    factors = new_factors(fmt, m, n, dtype=dtype)
    fmt.initialize(factors, m, n, source)
    for name, spec in fmt.factors(m, n).items():
        if spec.role == "gain":
            factors[name].mul_(0.5 + torch.rand(spec.shape, generator=source))
        if spec.role == "index" and name.endswith("order"):
            factors[name].copy_(torch.randperm(spec.numel, generator=source))
    return factors


def uncounted(fmt: Format, m: int, n: int) -> int:
    """Multiply-adds that a counter of matrix products does not see: products with gains, and Fourier transforms."""
    if isinstance(fmt, Circulant):
        return fmt.cost(m, n).multiply_adds
    if isinstance(fmt, Product):
        return sum(uncounted(part, *shape) for part, shape in zip(fmt.parts, fmt.shapes(m, n), strict=True))
    if isinstance(fmt, Stored):
        return uncounted(fmt.inner, m, n)
    if isinstance(fmt, Sum):
        return sum(uncounted(term, m, n) for term in fmt.terms)
    return sum(spec.numel for spec in fmt.factors(m, n).values() if spec.role == "gain")


def trainable(fmt: Format, m: int, n: int) -> list[str]:
    """Names of the factors that are trained and hold numbers."""
    return [name for name, spec in fmt.factors(m, n).items() if spec.trainable and spec.numel]


def ill_conditioned(n: int, *, seed: int = 0, condition: float = 1e6) -> Metric:
    """A metric with random axes and eigenvalues from 1 down to 1 / condition."""
    axes = torch.linalg.qr(gaussian(n, n, seed=seed)).Q
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    return Metric((axes * values) @ axes.mT)


def metrics(n: int) -> Iterator[Metric | None]:
    """None, and an ill-conditioned metric."""
    yield None
    yield ill_conditioned(n, seed=5)


class LargestTensor(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, tuple | list) else (found,)
        self.numbers = max([self.numbers, *(one.numel() for one in made if isinstance(one, Tensor))])
        return found
