"""Numbers as people read them."""

from __future__ import annotations

import math

ABSENT = "–"


def format_bytes(count: float | None) -> str:
    """Decimal units, as disks and file managers count: ``215_300_000`` -> ``"215.3 MB"``."""
    if count is None or not math.isfinite(count):
        return _not_finite(count)
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.99995 * size:  # 999_999 bytes are 1.0 MB, not 1000.0 kB
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float | None) -> str:
    """A number of parameters: exact below ten thousand, then ``"84.93 M"``."""
    if count is None or not math.isfinite(count):
        return _not_finite(count)
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if abs(count) >= 0.999995 * size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.2f} K" if abs(count) >= 1e4 else f"{count:,.0f}"


def format_quality(value: float | None) -> str:
    """Four digits or so at any size: ``0.8312``, ``31.40``, ``311.5``, ``1,204``, ``2.7e7``, ``inf``, ``nan``."""
    if value is None or not math.isfinite(value):
        return _not_finite(value)
    size = abs(value)
    if size >= 99_999.5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 999.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 99.995 else f"{value:.2f}" if size >= 1 else f"{value:.4f}"


def format_gap(value: float | None) -> str:
    """A difference of logarithms with its sign: ``"+0.123"``."""
    return _not_finite(value) if value is None or not math.isfinite(value) else f"{value:+.3f}"


def format_percent(fraction: float | None) -> str:
    """A fraction: ``0.5`` -> ``"50.0%"``."""
    return _not_finite(fraction) if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.1f}%"


def format_keep(keep: float | None) -> str:
    """A requested share with no more digits than were asked for: ``"75%"``, ``"12.5%"``."""
    return _not_finite(keep) if keep is None or not math.isfinite(keep) else f"{100 * keep:.5g}%"


def format_duration(seconds: float | None) -> str:
    """Seconds in the unit a person would choose: ``"0.4 s"``, ``"42 s"``, ``"3.4 min"``, ``"2.1 h"``."""
    if seconds is None or not math.isfinite(seconds):
        return _not_finite(seconds)
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3597 else f"{seconds / 3600:.1f} h"


def format_milliseconds(value: float | None) -> str:
    """A latency: ``"12.3 ms"``."""
    return _not_finite(value) if value is None or not math.isfinite(value) else f"{value:.1f} ms"


def format_ratio(value: float | None) -> str:
    """A speed as a multiple of another: ``"1.42×"``."""
    return _not_finite(value) if value is None or not math.isfinite(value) else f"{value:.2f}×"


def _not_finite(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def plain(value: object) -> str:
    """A setting as text: long integers get their separators, floats lose their tails."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
