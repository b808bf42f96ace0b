"""The figure of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebbflow.files import replacing

if TYPE_CHECKING:
    from ebbflow.diagnostics.report import Report

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"


def save(report: Report, path: Path) -> None:
    """Write the figure; raises ImportError with the command that installs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'ebbflow[plots]'") from error
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for draw, axes in zip((_curl, _mean, _ends, _paths), panels, strict=True):
        draw(report, axes)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=120)


def _curl(report: Report, axes: Any) -> None:
    pairs = {"Jacobian |J - Jᵀ|/|J|": report.asymmetry, "circulation": report.circulation}
    for (name, found), colour in zip(pairs.items(), (BLUE, ORANGE), strict=True):
        values, errors = ([e[i] for e in found] for i in (0, 1))
        axes.errorbar(report.times, values, errors, color=colour, marker="o", ms=4, label=name)
    axes.set_yscale("log")
    axes.set(title="Distance from a gradient (0 is one)", xlabel="time")
    axes.legend(frameon=False)


def _mean(report: Report, axes: Any) -> None:
    ratios = [m.ratio for m in report.mean_score]
    axes.plot(report.times, ratios, color=BLUE, marker="o", ms=4)
    axes.axhline(1.0, color="#808080", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(min(0.5, *ratios), max(2.0, *ratios) * 1.1)
    axes.set(title="Mean score² over that of chance (1: calibrated)", xlabel="time")


def _ends(report: Report, axes: Any) -> None:
    ends = sorted(report.ends, key=lambda end: end.time)
    times = [end.time for end in ends]
    best = max(end.bound.value for end in ends)
    axes.plot(
        times,
        [best - end.bound.value for end in ends],
        color=BLUE,
        marker="o",
        ms=4,
        label="bound lost",
    )
    axes.plot(times, [end.gap for end in ends], color=ORANGE, label="N(0, sigma²) for the Gaussian")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set(title="Ending the process early (nats)", xlabel="end time")
    axes.legend(frameon=False)


def _paths(report: Report, axes: Any) -> None:
    found = report.paths
    for line in found.curvature:
        axes.plot(found.shares, line, color=GREEN, alpha=0.25, linewidth=0.8)
    axes.plot(found.shares, found.curvature.mean(0), color=GREEN, linewidth=2)
    title = f"Turning of paths, rad; straightness {found.straightness.mean():.3f}"
    axes.set(title=title, xlabel="sigma / (alpha + sigma)", ylim=(0, None))
