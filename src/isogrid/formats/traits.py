"""What a fit promises."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What a format's own fit guarantees; every declared trait is proven by the test suite.

    Attributes:
        exact_on_members: the fit of a matrix inside the format is that matrix.
        optimal: without a metric the fit is the global minimum.
        optimal_under_metric: with any metric the fit is the global minimum.
        monotone_in_budget: a larger budget never gives a larger error.
        linear_in_factors: the matrix is linear in each weight factor alone.
    """

    exact_on_members: bool = False
    optimal: bool = False
    optimal_under_metric: bool = False
    monotone_in_budget: bool = False
    linear_in_factors: bool = False
