"""Plots show what their tables hold, on shared and symmetric scales, without text on text; alt text has the numbers."""

import itertools

import numpy
import pandas
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from influence_kit.errors import UserError
from influence_kit.reading import figures

SIZES = [118_000, 472_000, 1_900_000, 7_600_000]


def curve(**columns) -> list[dict]:
    shares = numpy.geomspace(1e-4, 1, 12)
    return [
        columns | {"share_of_sequences": s, "share_of_influence": s**0.3, "low": s**0.35, "high": s**0.25}
        for s in shares
    ]


def bounded(rows, value="estimate") -> pandas.DataFrame:
    return pandas.DataFrame([row | {"low": row[value] * 0.8, "high": row[value] * 1.3} for row in rows])


def tails(panels: int):
    values = {f"panel {i}": numpy.random.default_rng(i).pareto(1.5, 3000) * 1e-6 for i in range(panels)}
    points = pandas.concat([figures.ccdf_points(v).assign(panel=p) for p, v in values.items()])
    fits = [
        {"panel": p, "xmin": 1e-5, "alpha": 2.5, "alpha_low": 2.4, "alpha_high": 2.6, "mu": -11, "sigma": 1}
        for p in values
    ]
    return points, pandas.DataFrame(fits).assign(p_value=[0.0, 0.3, 0.5, 0.7, 0.9][:panels])


def all_figures():
    names = ("words", "concept", "language")
    yield figures.ccdf_panels(*tails(5))
    curves = sum((curve(group=s, kind="trained") for s in SIZES), curve(group="untrained", kind="control"))
    yield figures.coverage_curve(
        pandas.DataFrame(curves), pandas.DataFrame(curve(null="Gaussian") + curve(null="Laplace"))
    )
    lifts = bounded([{"tier": n, "parameters": s, "estimate": 1.0 + i} for i, n in enumerate(names) for s in SIZES])
    yield figures.estimate_points(lifts, hue="tier", ylabel="lift (times)", references={"no effect": 1, "ceiling": 4})
    bars = bounded([{"label": f"method {i}", "estimate": 1e-5 * 10**i, "kind": n} for i, n in enumerate(names)])
    yield figures.estimate_bars(bars, xlabel="score (rank correlation)", reference={"chance": 0}, hue="kind")
    steps = [
        {"model": s, "tokens": 10.0**k, "split": p, "loss": 9.0 - k} for s in SIZES for k in range(4, 8) for p in "ab"
    ]
    yield figures.loss_curves(bounded(steps, "loss"), {"entropy": 1})
    languages = itertools.product(SIZES[:2], ("German", "Turkish", "English"), ("German", "Turkish", "English"))
    cells = [
        {"size": s, "query_language": a, "sequence_language": b, "value": 4.0 if a == b else 0.5}
        for s, a, b in languages
    ]
    yield figures.language_matrix(bounded(cells, "value"), unit="lift (times)", neutral=1, log=True, panel="size")
    scores = numpy.random.default_rng(0).standard_t(2, 3000) * 1e-6
    yield figures.score_histogram(pandas.DataFrame({"influence": scores, "panel": ["a", "b", "c"] * 1000}), "panel")


@pytest.mark.parametrize("number", range(7))
def test_no_text_overlaps_and_axes_are_labelled(number, monkeypatch):
    fig = next(itertools.islice(all_figures(), number, None))
    drawn: list[Text] = []  # ticks beyond an axis' limits exist too, but are never drawn
    draw = Text.draw
    FigureCanvasAgg(fig).draw()  # constrained layout settles
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer)))
    fig.canvas.draw()
    texts = {id(text): text for text in drawn if text.get_visible() and text.get_text().strip()}.values()
    shown = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(shown) > 10
    for one, box in shown:
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, one
    for (one, a), (two, b) in itertools.combinations(shown, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 2 or up < 3, f"{one!r} overlaps {two!r}"
    assert 6.9 <= fig.get_figwidth() <= 9
    axes = [ax for ax in fig.axes if ax.get_visible()]
    assert fig.get_supxlabel() or axes[-1].get_xlabel() or axes[0].get_xlabel()
    assert fig.get_supylabel() or axes[0].get_ylabel() or number == 3  # a forest plot's rows name themselves


def test_scales_are_shared_and_symmetric():
    *_, matrix, histogram = all_figures()
    low, high = histogram.axes[0].get_xlim()
    assert low == -high and len({ax.get_xlim() for ax in histogram.axes}) == 1
    meshes = [ax.collections[0] for ax in matrix.axes[:2]]
    norms = {(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes}
    assert len(norms) == 1 and numpy.isclose(numpy.prod(norms.pop()), 1)  # symmetric about a lift of 1


def test_intervals_and_fit_are_drawn_where_the_table_says():
    points, fits = tails(1)
    ax = figures.ccdf_panels(points, fits).axes[0]
    line = next(line for line in ax.lines if line.get_label().startswith("power law"))
    x, y = line.get_xdata(), line.get_ydata()
    assert x[0] == fits.xmin[0] and numpy.isclose(numpy.log(y[-1] / y[0]) / numpy.log(x[-1] / x[0]), 1 - 2.5)
    assert "KS p < 0.001" in ax.get_title(loc="left")
    table = bounded([{"parameters": s, "estimate": 2.0} for s in SIZES])
    bars = figures.estimate_points(table, ylabel="lift").axes[0].collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [(1.6, 2.6)] * 4


def test_ccdf_points_are_shares_of_the_positive():
    points = figures.ccdf_points([3.0, -1.0, 1.0, 2.0, 0.0, 4.0])
    assert dict(zip(points.influence, points.ccdf, strict=True)) == {4.0: 0.25, 3.0: 0.5, 2.0: 0.75, 1.0: 1.0}
    assert len(figures.ccdf_points(numpy.arange(1, 10**5))) <= 400


def test_alt_text_has_range_extremes_and_trend():
    table = bounded([{"tier": t, "parameters": s, "estimate": e} for t, es in
                     {"near": (1e-5, 2.0, 3.0, 4.5), "far": (4.0, 1.0, 2.0, 3.0)}.items()
                     for s, e in zip(SIZES, es, strict=True)])  # fmt: skip
    text = figures.describe(table, "estimate", what="Lift by size", by="tier", x="parameters", unit="times")
    assert text.startswith(
        "Lift by size. near: 4 values from 1e-5 times [8e-6, 1.3e-5] at parameters 118k to 4.5 times"
    )
    assert "rises along parameters (rank correlation 1.00)" in text and "far: 4 values from 1 times" in text
    assert "no steady trend along parameters (rank correlation -0.20)" in text


def test_wrong_tables_are_named():
    with pytest.raises(UserError, match="'high'"):
        figures.estimate_bars(pandas.DataFrame({"label": ["a"], "estimate": [1], "low": [0]}), xlabel="x")
    with pytest.raises(UserError, match="no rows"):
        figures.score_histogram(pandas.DataFrame({"influence": []}))
    with pytest.raises(UserError, match="log=False"):
        cells = pandas.DataFrame({"query_language": ["a"], "sequence_language": ["a"], "value": [-1.0]})
        figures.language_matrix(cells, unit="x", log=True)
