"""Charts: what is drawn stands where the numbers say."""

import re
import xml.etree.ElementTree as ET

import pytest
from vitx import charts


def drawn(series, **options):
    text = charts.curves(series, "passes", "error <&", "A title", **options)
    return ET.fromstring(text)  # well-formed, so names are escaped


def points(svg, group):
    circles = svg.findall(f".//g[@class='{group}']/circle")
    return [(float(c.get("cx")), float(c.get("cy"))) for c in circles if c.find("title") is not None]


def test_powers_of_two_are_evenly_spaced_and_larger_is_higher():
    svg = drawn({"one": [(2, 0.1, 0.0), (4, 0.2, 0.0), (8, 0.3, 0.0)], "a <b>": [(16, 0.4, 0.05)]})
    (x1, y1), (x2, y2), (x3, y3) = points(svg, "c1")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y3 < y2 < y1
    ((x4, y4),) = points(svg, "c2")
    assert x4 > x3
    assert y4 < y3
    assert "a <b>" in "".join(svg.itertext())


def test_zero_is_on_the_axis_and_names_do_not_overlap():
    svg = drawn({name: [(1, 0.5, 0.0)] for name in "abcd"})
    labels = [float(t.get("y") or 0) for t in svg.findall(".//g/text")]
    gaps = [b - a for a, b in zip(sorted(labels), sorted(labels)[1:], strict=False)]
    assert min(gaps) >= 14
    ticks = [t.text for t in svg.findall(".//text") if re.fullmatch(r"-?[\d.]+", t.text or "")]
    assert "0" in ticks


def test_negative_values_have_room():
    svg = drawn({"one": [(1, -0.4, 0.1), (2, 0.9, 0.0)]}, x_log=False)
    assert all(charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM for _, y in points(svg, "c1"))


def test_a_linear_axis_is_filled():
    svg = drawn({"one": [(0.9, 0.5, 0.0)], "two": [(1.0, 0.6, 0.0)]}, x_log=False)
    ((x1, _),), ((x2, _),) = points(svg, "c1"), points(svg, "c2")
    assert (x1, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT)


def test_more_series_than_colours_can_be_told_apart():
    svg = drawn({f"s{n}": [(1, n / 10, 0.0)] for n in range(12)})
    classes = [g.get("class") for g in svg.findall(".//g")]
    assert len(set(classes)) == 12
    assert classes[8] == "c1 hollow"
