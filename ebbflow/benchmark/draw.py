"""The Pareto front: error against evaluations, ours in colours, peers in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebbflow.benchmark.measure import AUTO, OURS, PLAIN, Row
from ebbflow.benchmark.summary import geometric_mean
from ebbflow.files import replacing

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31", "#6a51a3", "#b22222")
FIRST = "#d55e00"
GREY = "#9a9a9a"
PALE = "#d5d5d5"
NAMED = 5
"""Peers that are named, the best ones; the others are drawn without a name."""
Line = list[tuple[float, float]]
"""(evaluations, error), by rising evaluations."""


def require_matplotlib() -> None:
    """Raise ImportError with the command that installs it, where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'ebbflow[plots]'") from error


def lines(rows: Sequence[Row], setting: str) -> dict[tuple[str, str], Line]:
    """A line for each (library, method): the geometric mean of its error over the problems.

    A point needs the method on every problem of the setting; of a peer's configurations the best
    one on each problem counts. An adaptive solver has a point for each tolerance, at its mean
    evaluations.
    """
    here = [row for row in rows if row.setting == setting and row.rms is not None]
    problems = {row.problem for row in here}
    best: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in here:
        point = str(row.budget) if row.budget is not None else row.configuration
        found = best.setdefault((row.library, row.method, point), {})
        other = found.get(row.problem)
        if other is None or (row.rms or 0) < (other.rms or 0):
            found[row.problem] = row
    drawn: dict[tuple[str, str], Line] = {}
    for (library, method, _), found in best.items():
        error = geometric_mean(row.rms or 0 for row in found.values())
        if set(found) == problems and error > 0:
            spent = sum(row.evaluations for row in found.values()) / len(found)
            drawn.setdefault((library, method), []).append((spent, error))
    return {key: sorted(line) for key, line in drawn.items()}


def front(drawn: Mapping[Any, Line]) -> Line:
    """The points that no other one beats in both evaluations and error."""
    points = sorted({point for line in drawn.values() for point in line})
    kept: Line = []
    for spent, error in points:
        if not kept or error < kept[-1][1]:
            kept.append((spent, error))
    return kept


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near to the wanted ones as they can be with `gap` between neighbours."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Blocks of touching labels, each centred on the mean of what its members want.
    blocks: list[tuple[list[int], float]] = []
    for i in order:
        members, centre = [i], wanted[i]
        while blocks:
            before, at = blocks[-1]
            if at + gap * (len(before) + len(members)) / 2 <= centre + 1e-9:
                break
            blocks.pop()
            total = len(before) + len(members)
            members = before + members
            centre = sum(wanted[j] - gap * (n - (total - 1) / 2) for n, j in enumerate(members))
            centre /= total
        blocks.append((members, centre))
    places = [0.0] * len(wanted)
    for members, centre in blocks:
        for n, i in enumerate(members):
            places[i] = centre + gap * (n - (len(members) - 1) / 2)
    return places


def figure(rows: Sequence[Row]) -> Any:
    """A matplotlib figure with one panel a setting."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(row.setting for row in rows))
    whole = Figure(figsize=(6.4 * len(settings), 5.4), dpi=130)
    FigureCanvasAgg(whole)
    panels = whole.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    width = 6.4 * len(settings)
    whole.subplots_adjust(
        left=0.8 / width, right=1 - 2.3 / width, wspace=2.7 / 3.9, top=0.88, bottom=0.13
    )
    names: list[Any] = []
    colours = _colours(rows)
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    for axes, setting in zip(panels, settings, strict=True):
        drawn = lines(rows, setting)
        problems = sorted({row.problem for row in rows if row.setting == setting})
        axes.set_title(f"{setting}: {', '.join(problems)}", loc="left", fontsize=9)
        names.append(_panel(axes, drawn, colours, budgets))
    panels[0].set_ylabel("root mean square error (geometric mean of problems)", fontsize=9)
    title = "Error at the same noise against evaluations"
    if any(row.library != OURS for row in rows):
        title += "; grey: other libraries, each at its best options"
    whole.suptitle(f"{title}; dotted: the front", x=0.8 / width, ha="left", fontsize=10)
    whole.canvas.draw()
    for axes, labels in zip(panels, names, strict=True):
        _label(axes, labels)
    return whole


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the figure as a PNG, completely or not at all."""
    picture = figure(rows)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each of our best solvers besides the default, the same in every panel."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if row.library == OURS and row.rms and row.method not in (AUTO, PLAIN):
            errors.setdefault(row.method, []).append(row.rms)
    ranked = sorted(errors, key=lambda name: geometric_mean(errors[name]))
    return dict(zip(ranked, COLOURS, strict=False))


def _styles(
    drawn: Mapping[tuple[str, str], Line], colours: Mapping[str, str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """How each line looks; `named` says whether it gets its name."""
    rank = {key: geometric_mean(error for _, error in line) for key, line in drawn.items()}
    ours = sorted((key for key in drawn if key[0] == OURS), key=rank.__getitem__)
    theirs = sorted((key for key in drawn if key[0] != OURS), key=rank.__getitem__)
    styles: dict[tuple[str, str], dict[str, Any]] = {}
    for n, key in enumerate(theirs):
        near = n < NAMED
        look = {"color": GREY if near else PALE, "lw": 1.1 if near else 0.7, "zorder": 2 - n / 99}
        styles[key] = {**look, "marker": "o" if near else "", "ms": 2.5, "named": near}
    for key in ours:
        if key[1] in (AUTO, PLAIN):
            dashed = "--" if key[1] == PLAIN else "-"
            look = {"color": FIRST, "lw": 2.4 if key[1] == AUTO else 1.6, "ls": dashed}
            styles[key] = {**look, "marker": "o", "ms": 4.5, "zorder": 5, "named": True}
            continue
        colour = colours.get(key[1])
        look = {"color": colour or "#bcd3e6", "lw": 1.3 if colour else 0.8, "zorder": 3}
        styles[key] = {**look, "marker": "o", "ms": 3, "named": colour is not None}
    return styles


def _panel(
    axes: Any,
    drawn: Mapping[tuple[str, str], Line],
    colours: Mapping[str, str],
    budgets: Sequence[int],
) -> list[tuple[str, Any, Any, bool]]:
    """Draw the lines; the names to write: (text, end of the line, colour, bold)."""
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    names = []
    for key, style in _styles(drawn, colours).items():
        named = style.pop("named")
        spent, errors = zip(*drawn[key], strict=True)
        axes.plot(spent, errors, **style)
        if named:
            text = key[1] if key[0] == OURS else " ".join(key)
            names.append((text, drawn[key][-1], style["color"], key[1] == AUTO))
    best = front(drawn)
    if len(best) > 1:
        spent, errors = zip(*best, strict=True)
        axes.step(spent, errors, where="post", color="black", lw=0.7, ls=":", zorder=6)
    axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("evaluations of the model", fontsize=9)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.grid(True, which="major", color="#eeeeee", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if drawn:
        # A line that leaves the panel upwards would squeeze all the others.
        errors = sorted(error for line in drawn.values() for _, error in line)
        axes.set_ylim(errors[0] / 1.5, min(errors[-1] * 1.5, errors[0] * 2000))
    return names


def _label(axes: Any, names: list[tuple[str, Any, Any, bool]]) -> None:
    """Write each name to the right of the panel, level with its line's end where there is room."""
    if not names:
        return
    size = 7.5
    gap = 1.35 * size * axes.figure.dpi / 72
    box = axes.get_window_extent()
    ends = axes.transData.transform([end for _, end, _, _ in names])
    places = spread([min(max(y, box.y0), box.y1) for y in ends[:, 1].tolist()], gap)
    over = max(0.0, max(places) - box.y1)
    under = max(0.0, box.y0 - 2 * gap - (min(places) - over))
    for (text, end, colour, bold), place in zip(names, places, strict=True):
        y = (place - over + under - box.y0) / box.height
        axes.annotate(
            text,
            xy=(end[0], min(end[1], axes.get_ylim()[1])),
            xytext=(1.05, y),
            textcoords="axes fraction",
            fontsize=size,
            color="#666666" if colour == GREY else colour,
            fontweight="bold" if bold else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.5,
                "color": colour,
                "shrinkA": 2,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
