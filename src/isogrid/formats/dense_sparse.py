"""DSFormer: a small dense matrix times a semi-structured sparse one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, Pattern, squared_norm
from isogrid.fitting.dictionaries import (
    fit_codes_and_atoms,
    matching_pursuit,
    procrustes,
    singular_start,
    spread_start,
    unit_atoms,
)
from isogrid.fitting.metric import cholesky
from isogrid.fitting.wrapped_core import times_blocks
from isogrid.formats.base import Format
from isogrid.formats.budget import Cost
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.sizes import pad_matrix
from isogrid.formats.sparse import SemiStructured
from isogrid.formats.start import Component, gaussian_start
from isogrid.formats.traits import Traits
from isogrid.kernels import one_stage, pack_mask, scattered, sparse_product, unpack_mask

# Rows times atoms times the square of a row's atoms, up to which matching pursuit is tried beside Procrustes.
PURSUIT_WORK = 2**30


@dataclass(frozen=True)
class DenseSparse(Format):
    """``W = codes · blockdiag(dictionary)``: each row is a few of the ``atoms`` of each run of in / blocks inputs.

    Low rank forces all rows into one subspace; here every row takes its own choice of directions, one of every
    ``ratio`` (DSFormer, Chand et al. 2023). The codes are a semi-structured matrix with ``ceil(atoms / ratio)`` of
    every ``atoms`` entries, held as values and a mask.

    Attributes:
        atoms: rows of the dictionary of one block; None until `sized`.
        ratio: atoms for each one that a row uses; 1 is low rank in every block of columns.
        blocks: number of runs of inputs with a dictionary of their own.
    """

    atoms: int | None = None
    ratio: int = 2
    blocks: int = 1

    name: ClassVar[str] = "dense_sparse"
    size_field: ClassVar[str] = "atoms"
    traits: ClassVar[Traits] = Traits(linear_in_factors=True)

    def __post_init__(self) -> None:
        for what, value in (("ratio", self.ratio), ("blocks", self.blocks)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise IsogridError(f"dense_sparse: {what} is a positive integer, got {value!r}")

    def size_limit(self, out_features: int, in_features: int) -> int:
        """Where a row uses as many atoms as a block's matrix has rank: every matrix is a member."""
        return self.ratio * min(out_features, -(-in_features // self.blocks))

    def keep(self, out_features: int, in_features: int) -> int:
        """Atoms of a block that a row uses."""
        atoms = require_rank(self, self.atoms, self.size_limit(out_features, in_features))
        return -(-atoms // self.ratio)

    def codes(self, out_features: int, in_features: int) -> SemiStructured:
        """The format of the codes."""
        keep = self.keep(out_features, in_features)
        assert self.atoms is not None
        return SemiStructured(keep, self.atoms)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``dictionary (blocks, atoms, in_block)``, the codes' ``values (out · blocks · keep,)`` and ``mask``."""
        atoms = require_rank(self, self.atoms, self.size_limit(out_features, in_features))
        return {
            "dictionary": Factor((self.blocks, atoms, -(-in_features // self.blocks))),
            **self.codes(out_features, in_features).factors(out_features, self.blocks * atoms),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """What each atom meets of the input, then the codes."""
        return sparse_product(one_stage(x, factors["dictionary"]), factors["values"], factors["mask"])

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """``codes · blockdiag(dictionary)``."""
        blocks, atoms, _ = factors["dictionary"].shape
        codes = scattered(factors["values"], factors["mask"], blocks * atoms)
        return one_stage(codes, factors["dictionary"].mT, features=in_features)

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """The dictionary; the codes have no dense stage."""
        blocks, atoms, in_block = self.factors(out_features, in_features)["dictionary"].shape
        return [Component("dictionary", in_block, atoms, blocks * atoms)]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """The dictionary, and the codes' cost: their zeros save bytes, not operations."""
        dictionary = self.factors(out_features, in_features)["dictionary"]
        hidden = dictionary.shape[0] * dictionary.shape[1]
        codes = self.codes(out_features, in_features).cost(out_features, hidden, dtype)
        return codes + Cost(dictionary.numel, dictionary.numel, dictionary.numel * dtype.itemsize * 8)

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Gaussian atoms under codes as they start alone."""
        stages = self.components(out_features, in_features)
        hidden = stages[0].outputs
        self.codes(out_features, in_features).initialize(factors, out_features, hidden, generator)
        gaussian_start(
            factors, {"dictionary": self.factors(out_features, in_features)["dictionary"]}, stages, generator
        )
        last = in_features - (self.blocks - 1) * stages[0].fan_in
        if 0 < last < stages[0].fan_in:
            factors["dictionary"][-1].mul_(math.sqrt(stages[0].fan_in / last))  # it has fewer inputs than the others

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        alternations: int = 15,
        rounds: int = 20,
        tolerance: float = 1e-3,
        **options: Any,
    ) -> Factors:
        """Codes and atoms in turn, block by block of the inputs; then exact descent on the error of all together.

        Under a metric each block is fitted to its whitened columns, and the descent knows how blocks are coupled.
        Solvers: default, the better of those that are affordable, then the descent; "procrustes": orthonormal atoms and
        the largest coefficients (COMPOT); "omp": matching pursuit and least-squares atoms; "projection" ignores the
        metric. The descent goes on from a start; the others begin at its atoms, and end with the start where it is
        better. Options: ``alternations`` (15), ``rounds`` (20, at most) and ``tolerance`` (1e-3) of the descent.
        """
        require_solver(self, solver, ("default", "procrustes", "omp", "projection"))
        if alternations < 0 or rounds < 0:
            raise IsogridError(
                f"dense_sparse: its fit takes 0 rounds or more, got alternations={alternations}, rounds={rounds}"
            )
        m, n = target.shape
        keep, atoms = self.keep(m, n), self.atoms
        assert atoms is not None
        used = None if solver == "projection" else metric
        if start is None:
            begin = self._block_by_block(target, used, solver, keep, alternations, generator)
        else:
            blocks = start["dictionary"]
            hidden = self.blocks * atoms
            begin = scattered(start["values"], start["mask"], hidden), unpack_mask(start["mask"], hidden), blocks
            if solver in ("procrustes", "omp"):
                again = self._block_by_block(target, used, solver, keep, alternations, generator, atoms_from=blocks)
                begin = min(
                    (again, begin), key=lambda one: squared_norm(target - times_blocks(one[0], one[2], n), used)
                )
        codes, mask, dictionary = begin
        if solver in ("default", "projection"):
            width = self.blocks * dictionary.shape[2]
            moment = torch.eye(n, dtype=target.dtype, device=target.device) if used is None else used.matrix
            codes, mask, dictionary = fit_codes_and_atoms(
                pad_matrix(target, m, width),
                pad_matrix(moment, width, width),
                begin,
                Pattern(keep, atoms),
                rounds=rounds,
                tolerance=tolerance,
                generator=generator,
                on_step=on_step,
            )
            beyond = torch.arange(width, device=dictionary.device).view(self.blocks, 1, -1) >= n
            dictionary = dictionary.masked_fill(beyond, 0)
        flat, codes = unit_atoms(dictionary.flatten(0, 1), codes)
        return {"dictionary": flat.view(dictionary.shape), "values": codes[mask], "mask": pack_mask(mask)}

    def _block_by_block(
        self,
        target: Tensor,
        metric: Metric | None,
        solver: str,
        keep: int,
        alternations: int,
        generator: torch.Generator,
        atoms_from: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``codes``, ``mask`` and ``dictionary`` of each block alone, its columns whitened."""
        n = target.shape[1]
        atoms, side = self.atoms, -(-n // self.blocks)
        assert atoms is not None
        dictionary = target.new_zeros(self.blocks, atoms, side)
        codes, masks = [], []
        for block in range(self.blocks):
            part = slice(min(block * side, n), min((block + 1) * side, n))
            columns = target[:, part]
            root = None if metric is None else cholesky(metric.matrix[part, part])
            white = columns if root is None else columns @ root
            begin = None if atoms_from is None else atoms_from[block, :, : part.stop - part.start]
            if begin is not None and root is not None:
                begin = begin @ root
            code, mask, found = self._alternated(white, solver, atoms, keep, alternations, generator, begin)
            if root is not None and part.stop > part.start:
                found = torch.linalg.solve_triangular(root, found, upper=False, left=False)
            dictionary[block, :, : part.stop - part.start] = found
            codes.append(code)
            masks.append(mask)
        return torch.cat(codes, dim=1), torch.cat(masks, dim=1), dictionary

    @staticmethod
    def _alternated(
        white: Tensor,
        solver: str,
        atoms: int,
        keep: int,
        alternations: int,
        generator: torch.Generator,
        begin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, side = white.shape
        if not side:
            mask = torch.zeros(rows, atoms, dtype=torch.bool, device=white.device)
            mask[:, :keep] = True
            return white.new_zeros(rows, atoms), mask, white.new_zeros(atoms, 0)
        found = []
        if atoms <= side and solver != "omp":
            found.append(procrustes(white, atoms, keep, alternations, begin))
        affordable = rows * atoms * keep**2 <= PURSUIT_WORK
        if solver != "procrustes" and (affordable or not found or solver == "omp"):
            if begin is not None:
                starts = [unit_atoms(begin, begin.new_zeros(0, atoms))[0]]
            else:
                starts = [spread_start(white, atoms, generator)]
                if atoms <= side:
                    starts.append(singular_start(white, atoms))
            found += [matching_pursuit(white, start, keep, alternations) for start in starts]
        if not found:
            raise IsogridError(
                f"dense_sparse: orthonormal atoms are no more than the {side} inputs of a block, got atoms={atoms}; "
                "take fewer, or the solver 'omp'"
            )
        return min(found, key=lambda trial: float((white - trial[0] @ trial[2]).square().sum()))
