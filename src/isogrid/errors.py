"""The errors and warnings Isogrid raises by its own hand.

All errors are ``ValueError``s, so a caller who knows nothing of Isogrid still catches them as bad input.
"""


class IsogridError(ValueError):
    """Bad input; the message names the layer or file, the value and the remedy."""


class BudgetError(IsogridError):
    """No member of the format fits into the budget."""


class CheckpointError(IsogridError):
    """A checkpoint is incomplete, corrupt, or belongs to another model."""


class IsogridWarning(UserWarning):
    """The work goes on, but the result is weaker than the caller may expect."""
