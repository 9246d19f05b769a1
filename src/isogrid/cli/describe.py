"""What ``isogrid formats`` says and draws about a format."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

from isogrid.errors import BudgetError, IsogridError, IsogridWarning
from isogrid.formats import Budget, Format
from isogrid.formats.anatomy import anatomy, small_sizes
from isogrid.report import block_picture, block_text, format_count, save_figure


def describe(fmt: Format, out_features: int, in_features: int, keep: float) -> dict[str, Any]:
    """Name, summary, traits, the largest member within the budget, its share and factors; None where none fits.

    Raises:
        IsogridError: keep is not a fraction.
    """
    member: Format = fmt
    kept: float | None = None
    factors: list[dict[str, Any]] | None = None
    try:
        member = fmt.sized(out_features, in_features, Budget.keep(keep, out_features, in_features))
    except BudgetError:
        pass
    else:
        kept = member.cost(out_features, in_features).parameters / (out_features * in_features)
        factors = [
            {"name": name, "role": spec.role, "shape": list(spec.shape)}
            for name, spec in member.factors(out_features, in_features).items()
        ]
    return {
        "name": fmt.name,
        "summary": (sys.modules[type(fmt).__module__].__doc__ or type(fmt).__doc__ or "").strip().splitlines()[0],
        "member": member.label(),
        "kept": kept,
        "traits": [field.name for field in dataclasses.fields(fmt.traits) if getattr(fmt.traits, field.name)],
        "out_features": out_features,
        "in_features": in_features,
        "keep": keep,
        "factors": factors,
    }


def small_anatomy(fmt: Format, out_features: int, in_features: int, keep: float, longest: int) -> dict[str, Any]:
    """The anatomy of a member small enough to see: of these proportions, within the budget where one is.

    Raises:
        IsogridError: the format has no member at the small sizes.
    """
    sizes = small_sizes(out_features, in_features, longest)
    whole = sizes[0] * sizes[1]
    # Where the smallest member is above the budget, as dense always is, that member.
    budgets = [Budget.keep(keep, *sizes), *(Budget(parameters=whole * times) for times in (1, 2, 4, 16))]
    for budget in budgets:
        try:
            return anatomy(fmt.sized(*sizes, budget), *sizes)
        except BudgetError as error:
            refusal: IsogridError = error
    raise refusal


def try_small_anatomy(
    fmt: Format, out_features: int, in_features: int, keep: float, longest: int
) -> dict[str, Any] | None:
    """`small_anatomy`, or None with a warning: hyper-parameters may suit the sizes asked for and no small ones."""
    try:
        return small_anatomy(fmt, out_features, in_features, keep, longest)
    except IsogridError as error:
        warnings.warn(f"no picture of {fmt.label()}: {error}", IsogridWarning, stacklevel=2)
        return None


def draw(described: dict[str, Any], folder: Path) -> Path:
    """Write ``<name>.png``, whole or not at all.

    Raises:
        IsogridError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    return save_figure(block_picture(described), folder / f"{described['format']}.png")


def detail_page(entry: dict[str, Any], width: int) -> str:
    """One format for the terminal; ``entry`` is `describe`'s with the ``anatomy`` of a small member, or None."""
    sizes = f"{entry['out_features']} x {entry['in_features']}"
    lines = [f"{entry['name']}: {entry['summary'].replace('``', '')}"]
    lines.append(f"its fit guarantees: {', '.join(entry['traits']).replace('_', ' ') or 'nothing'}")
    if entry["factors"] is None:
        lines.append(f"no member within {entry['keep']:g} of {sizes}")
    else:
        whole = entry["out_features"] * entry["in_features"]
        parameters = round(entry["kept"] * whole)
        lines.append(
            f"within {entry['keep']:g} of {sizes}: {entry['member']}, {format_count(parameters)} parameters, "
            f"{entry['kept']:.3f} of dense"
        )
        long = max(len(factor["name"]) for factor in entry["factors"])
        for factor in entry["factors"]:
            shape = " x ".join(map(str, factor["shape"])) or "one number"
            lines.append(f"  {factor['name'].ljust(long)}  {factor['role'].ljust(9)}  {shape}")
    small = entry["anatomy"]
    lines.append("")
    if small is None:
        return "\n".join([*lines, "no member is small enough to draw"])
    lines.append(
        f"{small['label']} at {small['out_features']} x {small['in_features']}, {small['share']:.2f} of dense; entries "
        "by the blocks they depend on, once a factor:"
    )
    return "\n".join([*lines, "", block_text(small, width=width)])
