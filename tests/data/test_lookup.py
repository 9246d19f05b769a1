from pathlib import Path

import pytest

from isogrid.data import DatasetNotFoundError, data_folders, find_dataset
from isogrid.errors import IsogridError


def make(folder: Path, name: str, file: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / file).touch()
    return folder / name


def test_the_named_folder_is_the_only_one(tmp_path, monkeypatch):
    make(tmp_path / "variable", "kodak", "01.png")
    monkeypatch.setenv("ISOGRID_DATA", str(tmp_path / "variable"))
    assert find_dataset("kodak") == tmp_path / "variable" / "kodak"
    with pytest.raises(DatasetNotFoundError):
        find_dataset("kodak", tmp_path / "elsewhere")


def test_places_are_tried_in_order(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("ISOGRID_DATA", str(tmp_path / "variable"))
    shared = make(tmp_path / "shared" / "data", "kodak", "01.png")
    assert find_dataset("kodak") == shared
    own = make(project / "data", "kodak", "01.png")
    assert find_dataset("kodak") == own
    named = make(tmp_path / "variable", "kodak", "01.png")
    assert find_dataset("kodak") == named
    assert data_folders()[:3] == [tmp_path / "variable", project / "data", tmp_path / "shared" / "data"]


def test_a_folder_without_its_file_does_not_count(tmp_path):
    (tmp_path / "kodak").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"kodak/01\.png"):
        find_dataset("kodak", tmp_path)


def test_error_names_places_and_remedies(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        find_dataset("wikitext2", tmp_path)
    message = str(caught.value)
    assert "'wikitext2'" in message
    assert str(tmp_path) in message
    assert "--data" in message
    assert "ISOGRID_DATA" in message


def test_unknown_name_lists_what_there_is():
    with pytest.raises(IsogridError, match=r"'wikitext3' is unknown.*wikitext2"):
        find_dataset("wikitext3")
