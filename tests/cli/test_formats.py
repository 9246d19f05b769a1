import json
import subprocess
import sys

import pytest

from isogrid.cli import main
from isogrid.formats import registered


def run(monkeypatch, capsys, *args):
    """(exit code, standard output, standard error) of the command."""
    monkeypatch.setattr(sys, "argv", ["isogrid", "formats", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def test_one_format_in_detail(monkeypatch, capsys):
    code, printed, _ = run(monkeypatch, capsys, "monarch(blocks=2)", "--out-features", 64, "--in-features", 64)
    assert code == 0
    assert "two block-diagonal matrices" in printed
    assert "optimal" in printed
    assert "monarch(blocks=2, rank=8)" in printed
    assert "2 x 16 x 32" in printed
    assert "monarch(blocks=2, rank=2) at 16 x 16" in printed
    assert "████████████████░░░░░░░░░░░░░░░░" in printed


@pytest.mark.parametrize("name", list(registered()))
def test_every_format_has_its_page(monkeypatch, capsys, name):
    code, printed, _ = run(monkeypatch, capsys, name)
    assert code == 0
    assert printed.startswith(f"{name}:")
    code, printed, _ = run(monkeypatch, capsys, name, "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["name"] == name
    assert found["anatomy"]["format"] == name


def test_an_unknown_name_meets_its_near_ones(monkeypatch, capsys):
    code, _, said = run(monkeypatch, capsys, "monach")
    assert code == 2
    assert "did you mean 'monarch'" in said


@pytest.mark.filterwarnings("always::isogrid.IsogridWarning")
def test_hyper_parameters_that_suit_no_small_size_leave_the_rest(monkeypatch, capsys):
    code, printed, said = run(monkeypatch, capsys, "kronecker(out_factors=[32, 24])")
    assert code == 0
    assert "outer  weight" in printed
    assert "no picture of kronecker" in said


def test_pictures_are_written(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, printed, _ = run(monkeypatch, capsys, "--out", tmp_path, "--json")
    assert code == 0
    listed = json.loads(printed)
    assert {entry["name"] for entry in listed} == set(registered())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.png" for name in registered())
    one = tmp_path / "one"
    code, printed, _ = run(monkeypatch, capsys, "low_rank", "--out", one)
    assert code == 0
    assert "low_rank.png" in printed
    assert [path.name for path in one.iterdir()] == ["low_rank.png"]


def test_the_package_is_the_command():
    found = subprocess.run([sys.executable, "-m", "isogrid", "formats", "--help"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "formats" in found.stdout
