"""Every published method written down step by step for one matrix, as its paper states it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isogrid.optim.subspaces import drawn_from


def signed(basis: Tensor) -> Tensor:
    """Columns whose largest entry is positive: the one convention that the methods leave open."""
    basis = basis.clone()
    for j in range(basis.shape[1]):
        if basis[basis[:, j].abs().argmax(), j] < 0:
            basis[:, j] *= -1
    return basis


def exact(gradient: Tensor, rank: int) -> Tensor:
    return signed(torch.linalg.svd(gradient)[0][:, :rank])


def sketched(gradient: Tensor, rank: int, size: int, rounds: int, refresh: int, seed: int = 0) -> Tensor:
    """Section 3.1: Gaussian range finder, power iterations, small SVD."""
    omega = torch.randn(gradient.shape[1], size, generator=drawn_from(seed, 0, refresh), dtype=gradient.dtype)
    q = torch.linalg.qr(gradient @ omega).Q
    for _ in range(rounds):
        q = torch.linalg.qr(gradient.mT @ q).Q
        q = torch.linalg.qr(gradient @ q).Q
    return signed((q @ torch.linalg.svd(q.mT @ gradient, full_matrices=False)[0])[:, :rank])


class Definition:
    """One matrix W (m, n); `step` takes its gradient. Right-sided methods work on the transpose."""

    def __init__(self, weight: Tensor, lr: float, decay: float, rank: int, refresh: int, **options):
        self.right = weight.shape[0] >= weight.shape[1]  # std: the short side
        self.w = weight.clone()
        self.lr, self.decay, self.refresh, self.options = lr, decay, refresh, options
        self.r = min(rank, *weight.shape)
        self.t, self.number = 0, 0
        self.m = self.v = self.p = self.norm = None

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        turned = self.w.mT if self.right else self.w
        self.w = self.update(turned.clone(), gradient.mT if self.right else gradient)
        self.w = self.w.mT if self.right else self.w

    def moments(self, coordinates: Tensor, beta1: float, beta2: float) -> None:
        if self.m is None:
            self.m, self.v = torch.zeros_like(coordinates), torch.zeros_like(coordinates)
        self.m = beta1 * self.m + (1 - beta1) * coordinates
        self.v = beta2 * self.v + (1 - beta2) * coordinates * coordinates

    def carry(self, new: Tensor, beta1: float, beta2: float) -> None:
        c1, c2 = 1 - beta1 ** (self.t - 1), 1 - beta2 ** (self.t - 1)
        c = new.mT @ self.p
        self.v = c2 * ((c * c) @ (self.v / c2 - (self.m / c1) ** 2) + ((c @ self.m) / c1) ** 2).abs()
        self.m = c @ self.m


class RSVDAdam(Definition):
    """Section 3: always the rows, coupled or decoupled decay, moments kept."""

    def __init__(self, weight, lr, decay, rank, refresh, *, fraction, decoupled, svt=False):
        super().__init__(weight, lr, decay, rank, refresh)
        self.right, self.decoupled, self.svt = False, decoupled, svt
        self.r = max(1, math.floor(fraction * min(weight.shape)))

    def update(self, w, g):
        if not self.decoupled:
            g = g + self.decay * w
        if (self.t - 1) % self.refresh == 0:
            size = min((2 if self.svt else 1) * self.r + 4, *g.shape)
            self.p = sketched(g, self.r, size, 1, self.number)
            self.number += 1
        self.moments(self.p.mT @ g, 0.9, 0.999)
        d = self.v.sqrt() / math.sqrt(1 - 0.999**self.t) + 1e-8
        if self.decoupled:
            w = w * (1 - self.lr * self.decay)
        return w - self.lr / (1 - 0.9**self.t) * (self.p @ (self.m / d))


class GaLore(Definition):
    """Section 4, conventions of its code: eps beside the uncorrected root, decay last."""

    carried = False

    def basis(self, g):
        return exact(g, self.r)

    def stored(self):
        """Hook of the quantised variant."""

    def due(self):
        return (self.t - 1) % self.refresh == 0

    def update(self, w, g):
        if self.due():
            new = self.basis(g)
            if self.carried and self.p is not None:
                self.carry(new, 0.9, 0.999)
            self.p = new
            self.number += 1
        r = self.p.mT @ g
        self.moments(r, 0.9, 0.999)
        n = self.m / (self.v.sqrt() + 1e-6)
        step = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        w = w - step * self.combined(g, r, n)
        self.stored()
        return w * (1 - self.lr * self.decay)

    def combined(self, g, r, n):
        return self.options.get("scale", 0.25) * (self.p @ n)

    def limit(self, s):
        norm = s.norm()
        if self.norm is None:
            self.norm = norm
            return s
        divisor = max(float(norm / (self.norm + 1e-8)), 1.01) / 1.01
        self.norm = norm / divisor
        return s / divisor


class GoLore(GaLore):
    carried = True

    def basis(self, g):
        drawn = torch.randn(g.shape[0], self.r, generator=drawn_from(0, 0, self.draw()), dtype=g.dtype)
        return torch.linalg.qr(drawn).Q

    def draw(self):
        return -1 - self.number if self.right else self.number


class Fira(GaLore):
    """Section 6.1; ``code`` takes the residual from the scaled projection."""

    def combined(self, g, r, n):
        scale = self.options.get("scale", 0.25)
        phi = n.norm(dim=0, keepdim=True) / (r.norm(dim=0, keepdim=True) + 1e-8)
        inside = self.p @ r * (scale if self.options.get("code") else 1.0)
        return scale * (self.p @ n) + self.limit((g - inside) * phi)


class Apollo(GaLore):
    """Section 6.2."""

    def basis(self, g):
        draw = -1 - self.number if self.right else self.number
        return torch.randn(g.shape[0], self.r, generator=drawn_from(0, 0, draw), dtype=g.dtype) / math.sqrt(self.r)

    def combined(self, g, r, n):
        scale = self.options.get("scale", 1.0)
        if self.options.get("whole"):
            phi = n.norm() / (r.norm() + 1e-8)
        else:
            phi = n.norm(dim=0, keepdim=True) / (r.norm(dim=0, keepdim=True) + 1e-8)
        if self.options.get("front"):
            return self.limit(g * phi * math.sqrt(scale))
        return self.limit(g * phi) * math.sqrt(scale)


class Normalized(GaLore):
    """Isogrid's own: channels of the short side at unit size, subspace from a sketch, residual damped."""

    def update(self, w, g):
        b1, b2, eps = 0.9, 0.999, 1e-8
        if self.t == 1:
            self.q = torch.zeros(g.shape[0], 1, dtype=g.dtype)
        self.q = b2 * self.q + (1 - b2) * (g * g).mean(1, keepdim=True)
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        g = g / ((self.q / c2).sqrt() + eps)
        if (self.t - 1) % self.refresh == 0:
            draw = -1 - self.number if self.right else self.number
            new = sketched(g, self.r, min(self.r + 4, *g.shape), 0, draw)
            if self.p is not None:
                self.carry(new, b1, b2)
            self.p, self.number = new, self.number + 1
        r = self.p.mT @ g
        self.moments(r, b1, b2)
        root = (self.v / c2).sqrt() + eps
        n = (self.m / c1) / root
        damping = n.norm() / (r / root).norm()
        residual = damping * (g - self.p @ r)
        if self.options.get("limited"):
            residual = self.limit(residual)
        return w * (1 - self.lr * self.decay) - self.lr * (self.p @ n + residual)


class LDAdam(Definition):
    """Section 5.1."""

    b1, b2, rho = 0.908, 0.99, 0.908

    def update(self, w, g):
        k = self.t - 1
        if k == 0:
            self.e = torch.zeros_like(g)
        g = g + self.e if self.options["feedback"] else g
        if k == 0:
            draw = -1 if self.right else 0
            new = sketched(g, self.r, min(self.r + 4, *g.shape), 1, draw)
            self.p, self.m = torch.zeros_like(new), torch.zeros(self.r, g.shape[1], dtype=g.dtype)
            self.v = torch.zeros_like(self.m)
        else:
            b = self.rho * (self.p @ self.m) / (1 - self.b1**k) + (1 - self.rho) * g
            new = torch.linalg.qr(b @ (b.mT @ self.p)).Q
        r, m_old, p_old = new.mT @ g, self.m, self.p
        if k > 0:
            self.carry(new, self.b1, self.b2)
        self.e = g - new @ r + self.b1 / (1 - self.b1) * (p_old @ m_old - new @ self.m)
        self.p = new
        self.moments(r, self.b1, self.b2)
        w = w * (1 - self.lr * self.decay)
        n = (self.m / (1 - self.b1**self.t)) / ((self.v / (1 - self.b2**self.t)).sqrt() + 1e-8)
        return w - self.lr * (self.p @ n)


class TopR(Definition):
    """Section 7: the largest entries, then AdamW."""

    def update(self, w, g):
        g = g.contiguous()
        kept = torch.zeros_like(g)
        order = sorted(range(g.numel()), key=lambda i: -float(g.flatten()[i].abs()))
        for i in order[: math.floor(self.options["fraction"] * g.numel())]:
            kept.view(-1)[i] = g.flatten()[i]
        self.moments(kept, 0.9, 0.999)
        w = w * (1 - self.lr * self.decay)
        corrected = (self.v / (1 - 0.999**self.t)).sqrt() + 1e-8
        return w - self.lr * (self.m / (1 - 0.9**self.t)) / corrected


def table(signs: bool) -> list[float]:
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signs else 2 ** (i + 1)
        for j in range(count):
            middle = (0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (i - 6)
            values += [middle, -middle] if signs else [middle]
    return sorted(values)


def through_codes(values: Tensor, signs: bool) -> Tensor:
    """What is left of values that were stored in 8 bits, 256 at a time."""
    known = torch.tensor(table(signs), dtype=torch.float64)
    out = []
    for block in values.flatten().split(256):
        scale = block.abs().max().clamp(min=1e-12).float().double()
        nearest = ((block / scale)[:, None] - known).abs().argmin(1)
        out.append(known[nearest] * scale)
    return torch.cat(out).view(values.shape)


def through_bits(values: Tensor, bits: int) -> Tensor:
    """What is left of a basis that was stored in few bits, 256 entries at a time."""
    out = []
    for group in values.flatten().split(256):
        top = 2**bits - 1
        s = ((group.max() - group.min()) / top).clamp(min=1e-5).float().double()
        z = (-(group.min() / s).round()).clamp(0, top)
        out.append(s * (((group / s).round() + z).clamp(0, top) - z))
    return torch.cat(out).view(values.shape)


class QGaLore(GaLore):
    """Sections 4 (8-bit), 5 (adaptive gap) and Q-GaLore's projector."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gap, self.next, self.cosines = self.refresh, 0, []

    def due(self):
        return self.t - 1 >= self.next

    def basis(self, g):
        new = through_bits(exact(g, self.r), 4)
        if self.p is not None:
            a, b = self.p[:, 0], new[:, 0]
            self.cosines = [*self.cosines, float((a @ b).abs() / (a.norm() * b.norm()))][-self.options["queue"] :]
            if len(self.cosines) == self.options["queue"] and sum(self.cosines) / len(self.cosines) >= 0.4:
                self.gap *= 2
        self.next = self.t - 1 + self.gap
        return new

    def stored(self):
        # The state of a right-sided matrix is (m, r): blocks run along its rows.
        turn = (lambda x: x.mT) if self.right else (lambda x: x)
        self.m = turn(through_codes(turn(self.m).contiguous(), True))
        self.v = turn(through_codes(turn(self.v).contiguous(), False))
