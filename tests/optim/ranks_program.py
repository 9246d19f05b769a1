"""Run under several gloo ranks by `test_distributed`: trains a small model and writes what it got."""

from __future__ import annotations

import copy
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from isogrid.optim import PRESETS

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# State in 8 bits, on a layer wide enough for it.
CODED = tuple(f"{name}, 8bit" for name in ("default", "ldadam", "galore", "top_r", "q_galore"))
RUNS = (*PRESETS, *CODED)
STEPS, STOP, INPUTS = 8, 5, 20


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    # float64: an average over ranks differs from one batch in the last digit, and Adam makes much of that in directions
    # that a gradient does not have.
    torch.set_default_dtype(torch.float64)
    # 7 and 5 rows don't divide by two; (1, 5) leaves the second rank with nothing. No gradient has less than full rank:
    # what a basis holds beyond a gradient's rank is arbitrary.
    sizes = [INPUTS, 12, 7, 5, 1]
    if name in CODED:  # 21 blocks of 256 in the moments, 35 in a whole gradient: the ranks share the middle one
        sizes = [INPUTS, 448, 1]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make(name: str, model: nn.Module, in_backward: bool = False):
    name, _, coded = name.partition(", ")
    options: dict = {"in_backward": in_backward}
    if coded:
        options["state"] = "8bit"
    if name not in ("ldadam", "top_r"):
        options["refresh"] = 3
    if name not in ("rsvd_adam", "apollo_mini", "top_r"):
        options["rank"] = 12 if coded else 3
    if name == "top_r":
        options["fraction"] = 0.3
    return PRESETS[name](model.named_parameters(), 0.02, weight_decay=0.1, **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(16, INPUTS, generator=draw, dtype=torch.float64)
    return x, torch.randn(16, 1, generator=draw, dtype=torch.float64)


def train(model: nn.Module, optimizer, start: int, stop: int, rank: int, world: int) -> None:
    for step in range(start, stop):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def sharded(name: str) -> nn.Module:
    model = network(name)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def main(folder: Path) -> None:
    world = int(sys.argv[2])
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(sys.argv[3]), world_size=world)
    rank = int(sys.argv[3])
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in RUNS:
        if world == 1:
            model = network(name)
            train(model, make(name, model), 0, STEPS, 0, 1)
            found[name] = dict(model.state_dict())
            continue
        replica = DistributedDataParallel(network(name))
        optimizer = make(name, replica.module)
        train(replica, optimizer, 0, STEPS, rank, world)
        found[f"{name}/ddp"] = {key: value.clone() for key, value in replica.module.state_dict().items()}
        for in_backward in (False, True):
            model = sharded(name)
            optimizer = make(name, model, in_backward)
            train(model, optimizer, 0, STOP, rank, world)
            if not in_backward:
                weights = get_model_state_dict(model, options=FULL)
                # Gathered on the CPU, whole tensors are the live ones.
                kept = copy.deepcopy((weights, get_optimizer_state_dict(model, optimizer, options=FULL)))
            train(model, optimizer, STOP, STEPS, rank, world)
            found[f"{name}/fsdp{'/hooks' if in_backward else ''}"] = get_model_state_dict(model, options=FULL)
        resumed = sharded(name)
        again = make(name, resumed)
        objects = [kept]
        dist.broadcast_object_list(objects, src=0)
        set_model_state_dict(resumed, objects[0][0], options=FULL)
        set_optimizer_state_dict(resumed, again, objects[0][1], options=FULL)
        train(resumed, again, STOP, STEPS, rank, world)
        found[f"{name}/resumed"] = get_model_state_dict(resumed, options=FULL)
    torch.save(found, folder / f"found-{world}-{rank}.pt")
    if world > 1:
        dist.barrier()
        # Taken down in order, gloo now and then waits for a thread of its own that waits for Python.
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
