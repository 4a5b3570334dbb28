"""Numbers keep their digits, and a meaning keeps its colours."""

from influence_kit.reading.style import KNOWN, POOLS, colours_of, number, size_colours, size_label


def test_small_numbers_never_become_zero():
    assert [number(v) for v in (1e-5, 0.12345, 0)] == ["1e-5", "0.123", "0"] and number(2e-12, sign=True) == "+2e-12"
    assert [size_label(v) for v in (950, 118_000, 1_900_000, 7e9)] == ["950", "118k", "1.9M", "7B"]


def test_size_colours_darken():
    light = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in size_colours(6)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 6


def test_what_a_series_is_gives_its_colour():
    assert colours_of(["Ladder", "Atlas"]) == {name: KNOWN["worlds"][name] for name in ("Ladder", "Atlas")}
    assert list(colours_of([25_000, 1_900_000]).values()) == size_colours(2)
    assert list(colours_of(["25k weights", "1.9M weights"]).values()) == size_colours(2)
    both = colours_of(["a rival", "BM25", "EK-FAC"])
    assert both["EK-FAC"] == KNOWN["methods"]["EK-FAC"] and both["a rival"] not in (both["BM25"], both["EK-FAC"])
    assert list(both) == ["a rival", "BM25", "EK-FAC"] and len(set(both.values())) == 3
    assert list(colours_of(["x", "y"], "languages").values()) == list(POOLS["languages"][:2])
    assert len(colours_of([f"series {i}" for i in range(20)])) == 20
