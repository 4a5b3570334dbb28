"""Figures are written with the same bytes each time, with their table, alt text and provenance."""

import io
import xml.etree.ElementTree as ElementTree

import numpy
import pandas
import pyarrow.parquet
import pytest
from matplotlib import rcParams
from PIL import Image

from influence_kit.errors import UserError
from influence_kit.reading import figures, fonts
from influence_kit.reading.saved import save_figure

ALT = 'Lift: 1.5 at "118k" <b>&</b> größer'
PROVENANCE = {"stage": "scan", "seed": 3}


def table() -> pandas.DataFrame:
    sizes = [118_000, 472_000, 1_900_000]
    estimate = numpy.array([1.5, 1 / 3, 1e-5])
    return pandas.DataFrame(
        {"parameters": sizes, "estimate": estimate, "low": estimate * 0.9, "high": estimate * 1.2}
    ).assign(interval="t over seeds")


def save(folder, **changes):
    given = {"table": table(), "alt": ALT, "provenance": PROVENANCE, "name": "lift"} | changes
    fig = figures.estimate_points(table(), ylabel="lift (times)", references={"no effect": 1})
    return save_figure(fig, folder, **given)


def test_same_bytes_twice_and_nothing_half_written(tmp_path, monkeypatch):
    first = save(tmp_path / "a")
    monkeypatch.setitem(rcParams, "svg.hashsalt", "someone's matplotlibrc")
    monkeypatch.setitem(rcParams, "axes.linewidth", 7)
    second = save(tmp_path / "b")
    for kind in ("png", "svg", "parquet", "csv"):
        a, b = (open(getattr(saved, kind), "rb").read() for saved in (first, second))
        assert a == b and len(a) > 50, kind
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["lift.csv", "lift.parquet", "lift.png", "lift.svg"]


def test_every_file_carries_what_explains_it(tmp_path):
    saved = save(tmp_path)
    info = Image.open(saved.png).text
    assert (
        info["Description"] == ALT and info["Provenance"] == '{"seed": 3, "stage": "scan"}' and "Software" not in info
    )
    svg = open(saved.svg, encoding="utf-8").read()
    assert ElementTree.fromstring(svg).find("{http://www.w3.org/2000/svg}desc").text == ALT
    assert "<dc:date>" not in svg and "seed" in svg
    kept = pyarrow.parquet.read_table(saved.parquet)
    assert kept.schema.metadata == {b"influence_kit": b'{"seed": 3, "stage": "scan"}'}
    pandas.testing.assert_frame_equal(kept.to_pandas(), table())
    assert open(saved.csv).read().splitlines()[2].split(",")[1] == "0.333333333"  # 9 significant digits
    assert "1e-05" in open(saved.csv).read()


def test_notebook_output_has_alt_text_and_a_readable_width(tmp_path):
    data, metadata = save(tmp_path)._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"} and metadata["image/png"]["alt"] == ALT
    assert 700 <= metadata["image/png"]["width"] <= 900


def test_refuses_figures_that_nothing_explains(tmp_path):
    for changes in ({"alt": " "}, {"table": table()[:0]}, {"name": "../x"}):
        with pytest.raises(UserError):
            save(tmp_path, **changes)


def test_mixed_names_and_sizes_share_a_column(tmp_path):
    mixed = pandas.DataFrame({"group": [118_000, "untrained"], "value": [1.0, 2.0]})
    saved = save(tmp_path, table=mixed)
    assert pyarrow.parquet.read_table(saved.parquet)["group"].to_pylist() == ["118000", "untrained"]


@pytest.fixture
def fresh_fonts():
    fonts.fallbacks.cache_clear()
    yield
    fonts.fallbacks.cache_clear()


def test_font_named_by_the_user_draws_cjk(tmp_path, monkeypatch, fresh_fonts):
    path = tmp_path / "probe.ttf"
    path.write_bytes(probe_font())
    monkeypatch.setenv(fonts.VARIABLE, str(path))
    assert fonts.families("plain ÄÖÜ") == [fonts.BASE]
    assert fonts.families("한국 中文") == [fonts.BASE, "Probe"]
    drawn = []
    for label in ("한국", "中文", "plain"):
        rows = pandas.DataFrame(
            {"label": [label], "estimate": 1.0, "low": 0.5, "high": 2.0, "interval": "t over seeds"}
        )
        saved = save_figure(
            figures.estimate_bars(rows, xlabel="lift"), tmp_path, "f", table=rows, alt=ALT, provenance={}
        )
        drawn.append(numpy.asarray(Image.open(saved.png).convert("L")))
    # The probe font draws every character as a full square: DejaVu's hollow box for what it lacks has no such area.
    blocks = [(image[:, :120] < 60).sum() for image in drawn]
    assert min(blocks[:2]) > 2 * blocks[2]


def test_missing_font_is_one_warning_and_no_crash(tmp_path, monkeypatch, fresh_fonts):
    monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / "none.ttf"))
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt here
    monkeypatch.setattr(fonts, "_system", list)
    with pytest.warns(UserWarning, match="Chinese, Korean, Japanese.*none.ttf.*INFLUENCE_KIT_FONT") as caught:
        assert fonts.families("한국") == fonts.families("中文") == [fonts.BASE]
    assert len(caught) == 1


def probe_font() -> bytes:
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in "".join(fonts.PROBES.values())})
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", "square")})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": "Probe", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=1000)
    builder.setupPost()
    data = io.BytesIO()
    builder.save(data)
    return data.getvalue()


def test_intervals_without_their_seeds_are_refused(tmp_path):
    with pytest.raises(UserError, match="'lift' has intervals without their seeds"):
        save(tmp_path, table=table().drop(columns="interval"))
