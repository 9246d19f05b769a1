import math

import pytest
import torch
from PIL import Image

from isogrid.formats import LowRank, Sparse
from isogrid.studies import image_compression
from isogrid.studies.image_compression import compressed, formats_of_study, psnr


def smooth(height=24, width=32):
    """A picture like those of the thesis: waves and a disc."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    one = 0.5 + 0.3 * torch.sin(12 * x + 4 * y**2) + 0.15 * ((x - 0.55) ** 2 + (y - 0.45) ** 2 < 0.04)
    return torch.stack([one, one.flip(0), one.flip(1)]).clamp(0, 1).double()


def test_psnr_of_known_errors():
    picture = torch.full((3, 4, 4), 0.5)
    assert psnr(picture, picture + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(picture, picture) == math.inf


def test_compressed_counts_every_channel_and_stays_within_the_budget():
    picture = smooth()
    for fmt in (LowRank(), Sparse()):
        near, used = compressed(picture, fmt, 0.3, 0)
        assert near.shape == picture.shape
        assert used <= 0.3 * picture.numel()
        assert near.min() >= 0
        assert near.max() <= 1
    assert psnr(picture, compressed(picture, LowRank(), 0.3, 0)[0]) > psnr(
        picture, compressed(picture, Sparse(), 0.3, 0)[0]
    ), "smooth pictures are no sparse matrices"


def test_the_study_covers_the_formats_and_writes_its_sheet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray((smooth().permute(1, 2, 0) * 255).round().byte().numpy())
    monkeypatch.setattr(image_compression, "open_photographs", lambda *_, **__: {"waves": image})
    few = {name: fmt for name, fmt in formats_of_study().items() if name in ("low_rank", "kronecker", "sparse")}
    monkeypatch.setattr(image_compression, "formats_of_study", lambda: few)
    result = image_compression.run_image_compression(tmp_path / "out", say=lambda _: None)
    assert {row["format"] for row in result["rows"]} == set(few)
    by_keep = {row["requested_keep"]: row["quality"] for row in result["rows"] if row["format"] == "sparse"}
    assert by_keep[0.05] < by_keep[0.1] < by_keep[0.2]
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 5000


def test_every_format_of_the_library_has_its_row():
    assert {"low_rank", "low_rank_light", "monarch", "block_tensor_train", "blast", "kronecker"} <= set(
        formats_of_study()
    )
    assert not set(image_compression.WRAPPERS) & set(formats_of_study())
