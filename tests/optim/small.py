"""What the tests of the optimizer share: a small network of every kind of parameter, and a loop."""

import torch
from torch import nn

from isogrid.optim import PRESETS

SMALL = {"rank": 2}
PRESET_OPTIONS = {
    name: {"fraction": 0.5} if name == "top_r" else {} if name in ("rsvd_adam", "apollo_mini") else SMALL
    for name in PRESETS
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Conv1d(1, 3, 5), nn.Flatten(), nn.Linear(24, 4)).to(dtype)


def loss_of(model, seed):
    model_in = torch.randn(5, 6, generator=generator(seed)).to(next(model.parameters()).dtype)
    hidden = torch.tanh(model[0](model_in)).unsqueeze(1)
    return model[4](model[2](hidden).flatten(1)).square().mean() + model[0].weight.sum() * 0.01


def train(model, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def matrix(rows=6, columns=9, seed=0, dtype=torch.float32):
    return nn.Parameter(torch.randn(rows, columns, generator=generator(seed)).to(dtype))
