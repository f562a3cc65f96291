"""The figures of a report: which measures each shows, what they mean, and how they are drawn.

matplotlib draws each as SVG without a window. Its colours become CSS variables and its inline styles attributes, so
that one drawing serves light, dark and paper, and the page needs no permission for inline styles.
"""

import io
import math
import re
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from pipeline.text import one_line
from stages.inspect.report_data import LARGEST, Heat, Report

FIGURES = Path(__file__).parent / "page" / "figures.toml"
WIDTH, HEIGHT = 500, 285
"""Units of the view box: a figure in two columns on a desktop, in one on a phone."""
MOST_LINES = 8
MOST_LABEL = 28
RAMP = 8
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
LINES = ("#050505", "#060606", "#070707", "#080808")
SHADES = tuple(f"#0909{level:02x}" for level in range(RAMP))
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper",
    **{color: f"line-{i}" for i, color in enumerate(LINES)},
    **{color: f"heat-{i}" for i, color in enumerate(SHADES)},
}  # fmt: skip
"""Colour -> variable of the style sheet."""
DASHES = ("-", "--", (0, (1, 1.6)), "-.")
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 12.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
}
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)


@dataclass(frozen=True, slots=True)
class FigureSpec:
    """One entry of `figures.toml`: measures with their labels, a family of the report, or a distribution."""

    section: str
    name: str
    title: str
    caption: str
    needs: str
    """The dataset that the figure needs."""
    lines: dict[str, str] = field(default_factory=dict)
    family: str | None = None
    heat: str | None = None
    is_share: bool = False
    is_log: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure ready for the page."""

    spec: FigureSpec
    svg: str
    """Empty where no value ever changes."""
    series: dict[str, list[float | None]]
    """Label -> values along the report's iterations; empty for a distribution."""
    box: tuple[float, float, float, float]
    """Left, right, top and bottom of the axes in the view box."""
    limits: tuple[float, float]
    """Iterations at the left and the right of the axes."""
    note: str = ""


def figure_specs() -> list[FigureSpec]:
    """Return the figures in the order of the page."""
    entries = tomllib.loads(FIGURES.read_text(encoding="utf-8"))["figure"]
    return [FigureSpec(**entry) for entry in entries]


def draw(spec: FigureSpec, report: Report) -> Drawn | None:
    """Return the figure, or None if the run has none of its numbers."""
    settings: Any = {**SETTINGS, "svg.hashsalt": spec.name}  # matplotlib's type for it lists every key
    with matplotlib.rc_context(settings):
        if spec.heat is not None:
            return _draw_heat(spec, {"rewards": report.rewards, "advantages": report.advantages}[spec.heat])
        return _draw_lines(spec, report)


def _draw_lines(spec: FigureSpec, report: Report) -> Drawn | None:
    if spec.family is None:
        found = {label: report.series.get(name, []) for name, label in spec.lines.items()}
    else:
        found = report.families.get(spec.family, {})
    series = {label: values for label, values in found.items() if any(v is not None for v in values)}
    if not series:
        return None
    drawn = {label: [_drawable(v) for v in values] for label, values in series.items()}
    most = sorted(drawn, key=lambda label: -max((v for v in drawn[label] if v is not None), default=0.0))[:MOST_LINES]
    note = f"The {MOST_LINES} largest of {len(series)} are drawn. " if len(series) > MOST_LINES else ""
    shown: list[str] = []
    for label in (label for label in series if label in most):
        twin = next((earlier for earlier in shown if series[earlier] == series[label]), None)
        if twin is None:
            shown.append(label)
        else:
            note += f"The curve of {label} is that of {twin}. "
    left_out = sum(v is not None for values in series.values() for v in values)
    left_out -= sum(v is not None for values in drawn.values() for v in values)
    if left_out:
        note += f"{left_out:,} values are no numbers, infinite or beyond {LARGEST:g}, and not drawn. "
    if all(_is_constant(values) for values in series.values()):
        return Drawn(spec, "", series, (0, 0, 0, 0), (0, 0))
    figure, axes = _axes(report.iterations)
    known = [v for label in shown for v in drawn[label] if v is not None]
    positive = [v for v in known if v > 0]
    if spec.is_log and positive and len(positive) == len(known) and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))  # the default is math text
        axes.yaxis.set_minor_formatter(NullFormatter())
    handles = [_line(axes, i, report.iterations, drawn[label]) for i, label in enumerate(shown)]
    if spec.is_share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(shown) > 1:
        names = [_label(text) for text in shown]
        figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False, fontsize=12, labelcolor=INK)
    return _finish(spec, figure, axes, series, note)


def _drawable(value: float | None) -> float | None:
    return None if value is None or not abs(value) <= LARGEST else value


def _is_constant(values: Sequence[float | None]) -> bool:
    """Return whether the values differ at most by rounding, which a curve would enlarge."""
    known = [v for v in values if v is not None]
    return all(math.isclose(v, known[0], rel_tol=1e-5, abs_tol=1e-12) for v in known[1:])


def _line(axes: Axes, index: int, iterations: Sequence[int], values: Sequence[float | None]) -> Line2D:
    points = [(k, v) for k, v in zip(iterations, values, strict=True) if v is not None]
    is_sparse = len(points) < len(iterations) / 2  # evaluations: the points are the data, the line only joins them
    (line,) = axes.plot(
        [k for k, _ in points],
        [v for _, v in points],
        color=LINES[index % len(LINES)],
        linestyle=DASHES[index % len(DASHES)] if index < len(DASHES) else DASHES[(index + 1) % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4.5,
        markevery=1 if is_sparse else max(1, math.ceil(len(points) / 9)),
        linewidth=1.6,
    )
    return line


def _draw_heat(spec: FigureSpec, heat: Heat | None) -> Drawn | None:
    if heat is None:
        return None
    iterations = [first for first, _ in heat.spans]
    figure, axes = _axes(iterations)
    top = max(max(column) for column in heat.shares) or 1.0
    cells: dict[int, list[list[tuple[float, float]]]] = {}
    for (first, last), column in zip(heat.spans, heat.shares, strict=True):
        left, right = first - 0.5, last + 0.5
        for share, low, high in zip(column, heat.edges, heat.edges[1:], strict=False):
            if share > 0:
                # the square root makes rare values visible next to common ones
                level = min(RAMP - 1, int(math.sqrt(share / top) * RAMP))
                cells.setdefault(level, []).append([(left, low), (right, low), (right, high), (left, high)])
    for level, polygons in cells.items():  # one path per shade: a path per cell would be most of the page
        path = Outline.make_compound_path(*(Outline([*corners, corners[0]], closed=True) for corners in polygons))
        axes.add_patch(PathPatch(path, color=SHADES[level], linewidth=0))
    axes.set_ylim(heat.edges[0], heat.edges[-1])
    axes.set_xlim(heat.spans[0][0] - 0.5, heat.spans[-1][1] + 0.5)
    note = f"The strongest shade stands for {top:.0%} of an iteration's answers. "
    if heat.outside:
        note += f"{heat.outside:,} values beyond the edges stand in the outer cells. "
    if heat.not_numbers:
        note += f"{heat.not_numbers:,} values are no numbers and stand in no cell. "
    if any(first != last for first, last in heat.spans):
        note += "A column holds several iterations. "
    return _finish(spec, figure, axes, {}, note)


def _axes(iterations: Sequence[int]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if len(iterations) == 1:
        axes.set_xlim(iterations[0] - 1, iterations[0] + 1)
    return figure, axes


def _label(text: str) -> str:
    """Return a label for the legend, where matplotlib would drop one that begins with an underscore."""
    text = one_line(text)
    short = text if len(text) <= MOST_LABEL else text[: MOST_LABEL - 1] + "…"
    return " " + short if short.startswith("_") else short


def _finish(spec: FigureSpec, figure: Figure, axes: Axes, series: dict[str, list[float | None]], note: str) -> Drawn:
    file = io.StringIO()
    with warnings.catch_warnings():
        # the browser's fonts have letters that matplotlib's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    left, right = (float(x) for x in axes.get_xlim())
    edges = axes.get_position()
    box = (edges.x0 * WIDTH, edges.x1 * WIDTH, (1 - edges.y1) * HEIGHT, (1 - edges.y0) * HEIGHT)
    return Drawn(spec, _for_page(file.getvalue(), spec.name), series, box, (left, right), note)


def _for_page(svg: str, name: str) -> str:
    """Return matplotlib's SVG with attributes for styles, variables for colours, and no ids but those in use."""
    root = ElementTree.fromstring(svg)
    for tag in (f"{{{SVG}}}metadata", "{http://www.w3.org/2000/svg}style"):
        for parent in list(root.iter()):
            for child in parent.findall(tag):
                parent.remove(child)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    for element in root.iter():
        for part in (element.attrib.pop("style", "")).split(";"):
            key, _, value = part.partition(":")
            if key.strip() == "font":  # "12.5px 'DejaVu Sans'"; the page has its own font
                key, value = "font-size", value.split()[0]
            if key.strip() and key.strip() != "font-family":
                element.set(key.strip(), value.strip())
        for key, value in list(element.attrib.items()):
            if value in VARIABLES:
                element.set(key, f"var(--{VARIABLES[value]})")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
            elif key.endswith("}href"):  # in HTML the attribute has no namespace
                del element.attrib[key]
                element.set("href", f"#{name}-{value[1:]}")
            elif key in ("d", "x", "y"):
                element.set(key, re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value))
            elif key == "transform" and value.startswith("rotate(-0 "):
                del element.attrib[key]
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-summary")
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"\s*\n\s*", "\n", text)
