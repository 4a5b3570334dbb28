"""Plots show what their tables hold, on symmetric scales, without text on text; alt text has the numbers."""

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
    return [columns | {"share_of_sequences": s, "estimate": s**0.3, "low": s**0.35, "high": s**0.25} for s in shares]


def bounded(rows, value="estimate") -> pandas.DataFrame:
    return pandas.DataFrame([row | {"low": row[value] * 0.8, "high": row[value] * 1.3} for row in rows])


def seeds_of(table: pandas.DataFrame) -> pandas.DataFrame:
    rows = table.drop(columns=["low", "high"])
    return pandas.concat([rows.assign(seed=n, estimate=rows["estimate"] * (0.9 + 0.05 * n)) for n in range(4)])


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
    yield figures.ccdf_panels(*tails(5), title="How heavy are the tails?")
    curves = sum((curve(group=s, kind="trained") for s in SIZES), curve(group="untrained", kind="control"))
    yield figures.coverage_curve(
        pandas.DataFrame(curves), pandas.DataFrame(curve(null="Gaussian") + curve(null="Laplace"))
    )
    lifts = bounded([{"tier": n, "parameters": s, "estimate": 1.0 + i} for i, n in enumerate(names) for s in SIZES])
    references = {"no effect": 1, "ceiling": 4}
    question = (
        "A question that is so long that one line of a figure cannot hold it: does what is asked still stand here?"
    )
    ylabel = "lift of sequences that share a meaning over those that share words alone (times)"
    yield figures.estimate_points(
        lifts, hue="tier", ylabel=ylabel, references=references, per_seed=seeds_of(lifts), title=question
    )
    bars = bounded([{"label": f"method {i}", "estimate": 1e-5 * 10**i, "kind": n} for i, n in enumerate(names)])
    yield figures.estimate_bars(
        bars, xlabel="score (rank correlation)", references={"chance": 0}, hue="kind", per_seed=seeds_of(bars)
    )
    steps = [
        {"model": s, "tokens": 10.0**k, "split": p, "loss": 9.0 - k} for s in SIZES for k in range(4, 8) for p in "ab"
    ]
    yield figures.path_over_training(
        bounded(steps, "loss"), "loss", ylabel="loss (nats)", split="split", references={"entropy": 1}
    )
    yield figures.path_over_training(
        pandas.DataFrame(steps).assign(low=-1.0, high=9.0), "loss", ylabel="loss (nats)", split="split", log_y=True
    )


@pytest.mark.parametrize("number", range(6))
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


def test_intervals_and_fit_are_drawn_where_the_table_says():
    points, fits = tails(1)
    ax = figures.ccdf_panels(points, fits).axes[0]
    line = next(line for line in ax.lines if line.get_label().startswith("power law"))
    x, y = line.get_xdata(), line.get_ydata()
    assert x[0] == fits.xmin[0] and numpy.isclose(numpy.log(y[-1] / y[0]) / numpy.log(x[-1] / x[0]), 1 - 2.5)
    assert "KS p < 0.001" in ax.get_title(loc="left")
    table = bounded([{"parameters": s, "estimate": 2.0} for s in SIZES])
    bars = segments(figures.estimate_points(table, ylabel="lift"))
    assert [tuple(bar[:, 1]) for bar in bars] == [(1.6, 2.6)] * 4
    table = bounded([{"label": "a", "estimate": 2.0}, {"label": "a", "estimate": 4.0}])
    bars = segments(figures.estimate_bars(table, xlabel="lift"))
    assert [tuple(bar.ravel()) for bar in bars] == [(1.6, 0, 2.6, 0), (3.2, 1, 5.2, 1)]


def segments(fig) -> list:
    from matplotlib.collections import LineCollection

    return [
        part for found in fig.axes[0].collections if isinstance(found, LineCollection) for part in found.get_segments()
    ]


def test_each_seed_is_a_dot_behind_its_mean():
    from matplotlib.collections import PathCollection

    table = bounded([{"method": m, "parameters": s, "estimate": 2.0 + i} for i, m in enumerate("ab") for s in SIZES])
    for fig, axis in (
        (figures.estimate_points(table, hue="method", ylabel="lift", per_seed=seeds_of(table)), 1),
        (figures.estimate_bars(table.assign(label="same"), hue="method", xlabel="lift", per_seed=seeds_of(table)), 0),
        (
            figures.path_over_training(
                table, "estimate", x="parameters", hue="method", ylabel="lift", per_seed=seeds_of(table)
            ),
            1,
        ),
    ):
        dots = [found for found in fig.axes[0].collections if isinstance(found, PathCollection)]
        drawn = numpy.sort(numpy.concatenate([found.get_offsets()[:, axis] for found in dots[:1]]))
        assert numpy.allclose(drawn, numpy.sort(seeds_of(table)["estimate"]))


def test_the_seeds_of_a_table_are_drawn_without_being_asked_for():
    from matplotlib.collections import PathCollection

    table = bounded([{"label": "one", "estimate": 2.0}, {"label": "two", "estimate": 3.0}])
    fig = figures.estimate_bars(
        table.assign(interval="t over seeds", seed_11=[1.0, 2.5], seed_12=[3.0, numpy.nan]), xlabel="lift"
    )
    dots = next(found for found in fig.axes[0].collections if isinstance(found, PathCollection))
    assert sorted(dots.get_offsets()[:, 0]) == [1.0, 2.5, 3.0]


def test_on_a_log_axis_intervals_end_at_the_edge_and_say_so():
    table = pandas.DataFrame({"parameters": SIZES, "estimate": [1.0, 2, 3, 4], "low": [-1.0, 0, 1, 2], "high": 5.0})
    fig = figures.estimate_points(table, ylabel="work", log_y=True)
    assert [bar[0, 1] for bar in segments(fig)] == pytest.approx([1 / 1.3, 1 / 1.3, 1, 2])
    assert sum(line.get_marker() == "v" for line in fig.axes[0].lines) == 2
    with pytest.raises(UserError, match="above 0, but the smallest estimate is -1"):
        figures.estimate_points(table.assign(estimate=-1.0), ylabel="work", log_y=True)
    with pytest.raises(UserError, match="smallest tokens is 0"):
        figures.path_over_training(pandas.DataFrame({"model": [1], "tokens": [0], "v": [1.0]}), "v", ylabel="v")


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
        figures.path_over_training(pandas.DataFrame({"model": [], "tokens": [], "v": []}), "v", ylabel="v")
