"""The most memory that a step needs at once: what tensors take while it runs, intermediates and room included."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy


def peak_step_bytes(step: Callable[[], object]) -> int:
    """The most bytes on the CPU, beyond those before, that a call held at any time; what it returns counts.

    The allocator's own record, every block of memory asked for and given back: not the process' resident memory, which
    keeps what was freed. The call runs in a thread of its own, whose native products have no working room left from
    before; the room of torch's further threads is not counted.
    """
    found: list[int] = []
    failed: list[BaseException] = []

    def measure() -> None:
        # The one profiler that tells these in their order and without a word on the standard error output.
        _enable_profiler_legacy(
            ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
        )
        kept: object = None
        try:
            kept = step()
        except BaseException as error:
            failed.append(error)
        finally:
            events = _disable_profiler_legacy()
        held = most = 0
        for event in (event for some in events for event in some if event.kind() == "memory_alloc"):
            held += event.cpu_memory_usage()
            most = max(most, held)
        found.append(most)
        del kept

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def training_peak_bytes(layer: nn.Module, x: Tensor) -> int:
    """`peak_step_bytes` of a forward and a backward pass, the gradients of parameters and input among it.

    Args:
        layer: any module; its gradients are dropped before and after.
        x: its input.
    """
    x = x.detach().clone().requires_grad_()
    gradient = torch.randn_like(layer(x).detach())

    def drop() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    def step() -> None:
        layer(x).backward(gradient)

    drop()
    try:
        return peak_step_bytes(step)
    finally:
        drop()


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of the tensors that a call keeps for its backward pass, each storage once; parameters are among them."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address comes twice

    def pack(value: Tensor) -> Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        call()
    return sum(sizes.values())
