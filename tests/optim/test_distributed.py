"""Two gloo ranks against one: DDP, FSDP2, steps during the backward pass, and a resume from a gathered state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optim.ranks_program import RUNS

PROGRAM = Path(__file__).with_name("ranks_program.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [(1, 0), (2, 0), (2, 1)]
    programs = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(world), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for world, rank in commands
    ]
    for program in programs:
        said, _ = program.communicate(timeout=300)
        assert program.returncode == 0, said[-4000:]
    load = [torch.load(folder / f"found-{world}-{rank}.pt", weights_only=True) for world, rank in commands]
    return load[0], load[1], load[2]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(runs, name):
    alone, first, second = runs
    kinds = [key for key in first if key.partition("/")[0] == name]
    assert f"{name}/ddp" in kinds
    for kind in kinds:
        for key, value in alone[name].items():
            assert (first[kind][key] - value).abs().max() <= 1e-6, (kind, key)
    for key, value in first[f"{name}/ddp"].items():
        assert torch.equal(value, second[f"{name}/ddp"][key]), "replicas never drift apart"


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_resumes_to_the_same_trajectory(runs, name):
    _, first, _ = runs
    for key, value in first[f"{name}/fsdp"].items():
        assert torch.equal(value, first[f"{name}/resumed"][key]), key
