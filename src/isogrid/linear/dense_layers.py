"""The dense linear layers that models have: torch's, and transformers' with its matrix transposed."""

from __future__ import annotations

from torch import Tensor, nn

from isogrid.errors import IsogridError


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` or a transformers ``Conv1D`` (a linear layer with W transposed)."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers to compare classes would cost every user seconds.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_matrix(module: nn.Module) -> Tensor:
    """The detached ``(out, in)`` matrix of an ``nn.Linear`` or ``Conv1D``.

    Raises:
        IsogridError: the module is neither.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if _is_conv1d(module):
        return module.weight.detach().mT  # type: ignore[operator]
    raise IsogridError(f"expected nn.Linear or transformers' Conv1D, got {type(module).__name__}")
