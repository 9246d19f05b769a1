"""Several processes that train one model: the same steps as one, and one opinion of times."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isogrid import IsogridError
from isogrid.compress.team import Team
from tests.compress.team_program import pruned

PROGRAM = Path(__file__).with_name("team_program.py")


def run_two(folder: Path) -> list[list[dict]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = PROGRAM.parents[2]
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    told |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    programs = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            env=os.environ | told | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for program in programs:
        said, _ = program.communicate(timeout=300)
        assert program.returncode == 0, said[-4000:]
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_prune_and_train_as_one(tmp_path):
    one = pruned(None)
    first, second = run_two(tmp_path)
    for alone, ours, theirs in zip(one, first, second, strict=True):
        assert ours["units"] == theirs["units"] == alone["units"]
        assert ours["milliseconds"] == theirs["milliseconds"]
        assert ours["after"] == theirs["after"] == pytest.approx(alone["after"], rel=1e-6)
        for key, value in alone["state"].items():
            assert torch.equal(ours["state"][key], theirs["state"][key])
            assert torch.allclose(ours["state"][key], value, rtol=1e-5, atol=1e-7)


class TwoProcesses:
    """What `Team` reads of an accelerator that it asks nothing of."""

    num_processes, mixed_precision = 2, "no"

    def __init__(self, rank: int, mixed_precision: str = "no") -> None:
        self.process_index, self.mixed_precision = rank, mixed_precision


def test_shares_are_all():
    shares = [Team(TwoProcesses(rank)).share(range(7)) for rank in (0, 1)]
    assert sorted([*shares[0], *shares[1]]) == list(range(7))
    assert Team().share(range(7)) == range(7)


def test_scaled_gradients_are_refused():
    with pytest.raises(IsogridError, match="mixed_precision is 'no' or 'bf16'"):
        Team(TwoProcesses(0, "fp16"))
