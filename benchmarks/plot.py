"""``python -m benchmarks plot FOLDER``: each run of ``sync`` as bars, phases stacked, the floor as a line.

matplotlib is imported when a plot is asked for, and not before.
"""

from pathlib import Path
from typing import Any

from benchmarks.report import PHASES, by_way
from benchmarks.samples import Run, Spread, medians, runs
from benchmarks.sync.ways import REFERENCE

PICTURE = "sync.png"
_BAR = 0.7


def draw(folder: Path) -> str:
    """One picture per run, beside its samples; where they are. Raises ``ValueError`` if there is nothing to draw."""
    drawn = [_picture(run) for run in runs(folder) if any(sample.benchmark == "sync" for sample in run.samples)]
    if not drawn:
        raise ValueError(f"no run of sync is under {folder}")
    return "\n".join(map(str, drawn))


def _picture(run: Run) -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = by_way(run.samples)
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.4 * len(ways)), layout="constrained")
    for row, (way, samples) in enumerate(ways.items()):
        _bar(axes, row, Spread.of(sample.seconds for sample in samples), medians([one.phases for one in samples]))
        if way == REFERENCE:
            axes.axvline(Spread.of(one.seconds for one in samples).median * 1e3, color="black", lw=0.8, ls="--")
    axes.set_yticks(range(len(ways)), list(ways))
    axes.invert_yaxis()
    axes.set_xlabel("ms from new weights to ready to generate; dashed: a bare copy; whiskers: quartiles")
    first = run.samples[0]
    where = ", ".join(run.machine.get("gpus", ())) or f"{run.machine.get('cores')} cores"
    axes.set_title(f"{first.subject}, tp {first.tp}, {where}, SGLang {run.machine.get('sglang')}")
    _legend(axes)
    path = run.folder / PICTURE
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def _bar(axes: Any, row: int, spread: Spread, phases: dict[str, float]) -> None:
    """Phases from left to right; what none of them covers is grey."""
    left = 0.0
    for number, phase in enumerate(PHASES):
        if phase in phases:
            axes.barh(row, phases[phase] * 1e3, _BAR, left=left, color=f"C{number}")
            left += phases[phase] * 1e3
    rest = max(0.0, spread.median * 1e3 - left)
    axes.barh(row, rest, _BAR, left=left, color="lightgrey")
    low, high = (spread.median - spread.low) * 1e3, (spread.high - spread.median) * 1e3
    axes.errorbar(spread.median * 1e3, row, xerr=[[low], [high]], color="black", capsize=2, lw=0.8)


def _legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=f"C{number}", label=phase) for number, phase in enumerate(PHASES)]
    axes.legend(handles=patches, loc="lower right", fontsize="small")
