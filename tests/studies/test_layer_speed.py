"""The benchmark of layers: what it times and how it judges. Times are given; that they are taken is tried once."""

import math

import pytest
import torch

from isogrid import StructuredLinear
from isogrid.errors import IsogridError
from isogrid.formats import as_format
from isogrid.report import read_json
from isogrid.studies import layer_speed, layer_tables


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A suite of one small width, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISOGRID_SPEED", str(tmp_path / "speed"))
    monkeypatch.setattr(layer_speed, "WIDTHS", (48,))
    monkeypatch.setattr(layer_speed, "FORMATS", {0.5: ("monarch(blocks=4)", "low_rank")})
    monkeypatch.setattr(layer_speed, "ROWS", (1, 3))
    monkeypatch.setattr(layer_speed, "JUDGED_FROM_MS", 0.0)
    monkeypatch.setattr("isogrid.evaluation.tuning.COLD_BYTES", 2**14)
    monkeypatch.setattr("isogrid.evaluation.tuning.MOST_ROUNDS", 1)
    return tmp_path


def row(**changes):
    """A point as `_measured` gives it."""
    given = {
        "format": "monarch(blocks=4, rank=2)",
        "keep": 0.5,
        "out": 32,
        "in": 32,
        "rows": 16,
        "dtype": "float32",
        "direction": "forward",
        "threads": 1,
        "label": "a point",
        "promise": 2.0,
        "ms": {"dense": 4.0, "ours": 2.5, "published": 5.0, "einsum": 10.0, "portable": 2.0},
        "dense_gmacs": 1.0,
        "speedup": 1.6,
        "efficiency": 0.8,
        "memory": None,
        "auto": {"value": 0.6, "lower": 0.5, "upper": 0.7},
        "plan": "structured",
        "scaling": {},
        "judged": True,
        "small": True,
    }
    return given | changes


def test_the_points_of_the_default_suite():
    points = list(layer_speed._points(False, False, (1,)))
    # Five formats at two sizes, three widths, two dtypes: forward at one row, both directions at 16 and 256.
    assert len(points) == 5 * 2 * 3 * 2 * 5
    assert sum(layer_speed._estimate(point, 31) for point in points) < 40 * 60
    for point in points:
        fmt, whole = as_format(point["format"]), point["out"] * point["in"]
        assert fmt.cost(point["out"], point["in"]).parameters <= point["keep"] * whole
    more = list(layer_speed._points(False, False, (1, 2)))
    assert {point["rows"] for point in more if point["threads"] == 2} == {256}
    assert len(more) == len(points) + 5 * 2 * 3 * 2 * 2
    assert {point["rows"] for point in layer_speed._points(False, False, (2,))} == {1, 16, 256}
    full = list(layer_speed._points(True, False, (1,)))
    assert {(point["out"], point["in"]) for point in full} > {(576, 1536), (3072, 768)}


def test_a_run_and_its_continuation(small, monkeypatch):
    said = []
    result = layer_speed.run_layer_speed(small / "out", quick=True, say=said.append)
    assert len(result["rows"]) == 2 * 2 * 3
    forward = [row for row in result["rows"] if row["direction"] == "forward"]
    for found in forward:
        assert set(found["ms"]) == {"dense", "ours", "auto", "published", "einsum", "portable"}
        assert found["auto"]["lower"] <= found["auto"]["value"] <= found["auto"]["upper"]
        assert found["plan"] in ("dense", "structured")
        assert found["speedup"] == pytest.approx(found["ms"]["dense"] / found["ms"]["ours"])
    assert all(row["auto"] is None for row in result["rows"] if row["direction"] != "forward")
    assert (small / "out" / "efficiency.png").stat().st_size > 1000
    assert "## Never slower" in (small / "out" / "table.md").read_text()
    assert list((small / "speed").glob("speed-*.json"))  # its times are kept for `plan`

    def again(*_):
        raise AssertionError("a finished point was measured again")

    monkeypatch.setattr(layer_speed, "_measured", again)
    assert layer_speed.run_layer_speed(small / "out", quick=True, say=said.append)["rows"] == result["rows"]
    assert read_json(small / "out" / "data.json")["rows"] == result["rows"]


def test_more_threads_are_measured_beside_one(small, monkeypatch):
    monkeypatch.setattr(layer_speed, "SCALED_ROWS", 3)
    before = torch.get_num_threads()
    result = layer_speed.run_layer_speed(small / "out", quick=True, threads=(1, 2), say=lambda _: None)
    assert torch.get_num_threads() == before
    (scaled,) = {tuple(row["scaling"]) for row in result["rows"] if row["threads"] == 2}
    assert scaled == ("dense", "ours")
    assert all(not row["scaling"] for row in result["rows"] if row["threads"] == 1)
    assert "x one thread" in (small / "out" / "table.md").read_text()


@pytest.mark.parametrize("threads", [(), (0,), (1, -2)])
def test_bad_threads(threads, tmp_path):
    with pytest.raises(IsogridError, match="threads are numbers of 1 and more"):
        layer_speed.run_layer_speed(tmp_path, threads=threads, say=lambda _: None)


def test_only_what_is_slower_beyond_doubt_is_named():
    doubtful = row(auto={"value": 1.3, "lower": 1.04, "upper": 1.6})
    slow = row(label="the slow point", auto={"value": 1.1, "lower": 1.06, "upper": 1.2})
    rows = [row(), doubtful, slow, row(auto=None)]
    assert layer_speed.slower(rows) == [slow]
    result = {
        "title": "t",
        "command": "c",
        "created": "2026-01-01",
        "machine": {"cpu": "a", "torch": "b"},
        "settings": {"repeats": 31},
        "summaries": layer_tables.summaries(rows),
        "rows": rows,
    }
    page = layer_tables.markdown(result, [slow])
    assert "above 1.05: 1.\n\n- the slow point, 1 threads (structured): 1.100 of dense [1.060, 1.200]" in page
    page = layer_tables.markdown(result | {"rows": rows[:2]}, [])
    assert "above 1.05: none.\n\nThe nearest to it: a point, 1 threads (structured): 1.300 of dense" in page


def test_summaries_are_geometric_means_of_judged_points():
    other = row(efficiency=0.2, speedup=0.4, small=False, ms={"dense": 4.0, "ours": 1.0, "portable": 3.0})
    (found,) = layer_tables.summaries([row(), other, row(judged=False, efficiency=9.0)])
    assert found["points"] == 2
    assert found["efficiency"] == pytest.approx(math.sqrt(0.8 * 0.2))
    assert (found["of large blocks"], found["least, large blocks"], found["least, small blocks"]) == (
        pytest.approx(0.2),
        0.2,
        0.8,
    )
    assert found["over published"] == pytest.approx(2)  # of the one that has it
    assert found["over portable"] == pytest.approx(math.sqrt(0.8 * 3))
    assert found["over the best of these"] == pytest.approx(math.sqrt(0.8 * 3))
    assert found["x one thread"] is None
    rows = [row(threads=2, scaling={"ours": one, "dense": 2.0}) for one in (1.0, 4.0)]
    (found,) = layer_tables.summaries(rows)
    assert (found["x one thread"], found["least x one thread"]) == (pytest.approx(2), 1.0)


def test_products_are_portable_without_the_native_ones(monkeypatch):
    one, x = StructuredLinear(32, 32, "block_tensor_train(rank=2)", bias=False).eval(), torch.randn(3, 32)
    from isogrid.kernels import native_takes

    takes = native_takes(x, one.right, one.left)
    with torch.no_grad():
        wanted = one(x)
        with layer_speed.without_native():
            assert not native_takes(x, one.right, one.left)
            torch.testing.assert_close(one(x), wanted)
    assert native_takes(x, one.right, one.left) == takes
