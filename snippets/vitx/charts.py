"""Charts as SVG text, drawn from measured numbers when the site is built. Colours follow light and dark mode by CSS."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 740, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 300, 16, 46  # margins in pixels; names stand in the right one

COLOURS = 8  # of the site's style; series after them have the same again, with hollow points and dashed lines


def curves(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
    title: str,
    x_log: bool = True,
) -> str:
    """Lines with error bars, and single points for a series with one value.

    Args:
        series: name -> (x, y, deviation of y), x ascending.
        x_log: the x axis counts powers of two.
    """
    place = math.log2 if x_log else float
    xs = [place(x) for points in series.values() for x, _, _ in points]
    ys = [y + sign * d for points in series.values() for _, y, d in points for sign in (-1, 1)]
    low_x, high_x = min(xs), max(xs)
    if high_x == low_x:
        high_x += 1
    step = _step(min(0.0, *ys), max(ys))
    low_y, high_y = step * math.floor(min(0.0, *ys) / step), step * math.ceil(max(ys) / step)

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place(x) - low_x) / (high_x - low_x)

    def y_of(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high_y - y) / (high_y - low_y)

    parts = [f"<title>{escape(title)}</title>"]
    for index in range(round((high_y - low_y) / step) + 1):
        y = low_y + index * step
        parts.append(f'<path class="axis" d="M{LEFT} {y_of(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in _x_ticks(low_x, high_x, x_log):
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    across = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(14 {across:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    ends = sorted((y_of(points[-1][1]), name) for name, points in series.items())
    heights: dict[str, float] = {}
    below = -math.inf
    for y, name in ends:  # names do not overlap
        below = heights[name] = max(y, below + 15)
    for number, (name, points) in enumerate(series.items()):
        parts.append(f'<g class="c{1 + number % COLOURS}{" hollow" * (number // COLOURS % 2)}">')
        if len(points) > 1:
            parts.append(
                '<path class="line" d="M' + "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y, _ in points) + '"/>'
            )
        for x, y, deviation in points:
            if deviation:
                parts.append(
                    f'<path class="line" d="M{x_of(x):.1f} {y_of(y - deviation):.1f}V{y_of(y + deviation):.1f}"/>'
                )
            parts.append(
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5"><title>{y:.3g} at {x:g}</title></circle>'
            )
        parts.append(
            f'<circle cx="{WIDTH - RIGHT + 14}" cy="{heights[name]:.1f}" r="4"/>'
            f'<text x="{WIDTH - RIGHT + 24}" y="{heights[name] + 4:.1f}">{escape(name)}</text></g>'
        )
    return (
        f'<div class="vx-scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f'<svg class="vx-chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f"{''.join(parts)}</svg></div>"
    )


def _step(low: float, high: float) -> float:
    """A round distance between four to eight grid lines."""
    rough = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _x_ticks(low: float, high: float, x_log: bool) -> list[float]:
    if x_log:
        every = max(1, round((high - low) / 7))
        return [2.0**power for power in range(math.ceil(low), math.floor(high) + 1, every)]
    step = _step(low, high)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
