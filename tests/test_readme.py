import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from isogrid.data import pretrained_folder
    from isogrid.errors import IsogridError

    try:
        pretrained_folder("smollm2-135m")
    except IsogridError as missing:
        pytest.skip(str(missing))
    (block,) = re.findall(r"<!-- a test runs this block -->\n```python\n(.*?)```", README.read_text(), re.S)
    code = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(code) <= 10, "ten lines, imports left out"
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["report"].achieved_keep <= 0.8
    assert (tmp_path / "smollm2-light" / "model.safetensors").is_file()


def test_links_lead_somewhere():
    folder = README.parent
    for path in [README, *folder.glob("*.md"), *folder.glob("docs/*.md"), *folder.glob("results/**/*.md")]:
        targets = re.findall(r"\]\(([^)#]+)", path.read_text())
        gone = [one for one in targets if "://" not in one and not (path.parent / one).exists()]
        assert gone == [], path


def test_documents_name_no_local_paths():
    for path in (README, README.parent / "CONTRIBUTING.md", README.parent / "CHANGELOG.md"):
        assert not re.search(r"/(home|root|tmp|work)/", path.read_text()), path
