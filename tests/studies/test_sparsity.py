"""The table of sparse matrices: which rows it has, at which sizes, and that rows are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isogrid import IsogridError, select_layers
from isogrid.compress import count_parameters, dense_parameters
from isogrid.formats import Armor, SemiStructured
from isogrid.studies import sparsity
from isogrid.studies.sparsity import AT_BYTES, METHODS, WRAPPED, bits_of, methods_of, planned, run_sparsity
from tests import models

LAYERS = {"square": nn.Linear(256, 256), "tall": nn.Linear(256, 640), "wide": nn.Linear(640, 256)}


def test_sizes_are_those_of_the_rungs() -> None:
    line = bits_of(planned(methods_of(["armor"])[0], LAYERS), LAYERS)
    for method in methods_of(()):
        plan = planned(method, LAYERS)
        if method.rung != AT_BYTES:
            assert set(plan.members.values()) == {SemiStructured(2, 4)}
            assert bits_of(plan, LAYERS) == 9
            continue
        assert bits_of(plan, LAYERS) <= line
        assert bits_of(plan, LAYERS) >= 0.9 * line or method.key in ("gptq", "trit_planes"), "whole numbers of bits"
        for name, member in plan.members.items():
            m, n = LAYERS[name].weight.shape
            assert member.cost(m, n, torch.bfloat16).bytes <= WRAPPED.cost(m, n, torch.bfloat16).bytes
    assert isinstance(WRAPPED, Armor)


def test_methods_are_chosen_by_name() -> None:
    assert [one.key for one in methods_of(["wanda", "magnitude"])] == ["magnitude", "wanda"]
    with pytest.raises(IsogridError, match="sparsity has no method 'magic'; it has magnitude"):
        methods_of(["magic"])
    assert len({one.key for one in METHODS}) == len(METHODS)


def test_a_table_of_a_small_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    windows = torch.randint(3, models.VOCABULARY, (12, 24), generator=models.generator(0))
    monkeypatch.setattr(sparsity, "load_pretrained", lambda _: (models.llama(), None))
    monkeypatch.setattr(sparsity, "_windows", lambda tokenizer, data, name, count: windows[:count])
    chosen = ["magnitude", "sparsegpt", "sweeps", "armor"]
    result = run_sparsity(tmp_path / "out", methods=chosen, quick=True, say=lambda _: None)
    errors = {row["label"]: row["error"] for row in result["rows"]}
    assert errors["ARMOR, outputs' error"] < errors["Exact sweeps"] < errors["SparseGPT"] < errors["Magnitude"]
    model = models.llama()
    selected = dense_parameters(
        {name: layer for name, layer in select_layers(model).items() if ".0." in name or ".1." in name}
    )
    whole = 2 * count_parameters(model)
    assert result["dense"]["bytes"] == whole
    for row in result["rows"]:  # numbers, masks and all at 16 bits, and so is what stands beside the layers
        assert row["bytes"] == pytest.approx(whole - 2 * selected + row["bits"] * selected / 8, abs=1)
    again = run_sparsity(tmp_path / "out", methods=chosen, quick=True, say=lambda _: None)
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in result["rows"]]
    assert "Bits an entry" in (tmp_path / "out" / "table.md").read_text()
