"""Fast products that formats share."""

from isogrid.kernels.blocked import two_stage

__all__ = ["two_stage"]
