"""The confusion matrix as a picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tfcli import disk
from tfcli.errors import UserError
from tfcli.tasks.classify.scores import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "confusion.png"
INSTALL = 'pip install "tfcli[plot]"'
LONGEST = 24
"""Maximum characters of a label."""
COUNTED = 60
"""Maximum labels with counts in the cells; with more, only colors are drawn."""
FEW = 12
"""Maximum labels with large cells."""
NAMED = 150
"""Maximum labels with names along the sides; with more, these hold numbers, and the cells shrink to fit a page."""
SMALL = 0.2
"""Inches of a cell without a count."""
USUAL = "DejaVu Sans"
"""Font of matplotlib."""
OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei",
    "Arial Unicode MS",
)  # fmt: skip
"""Fonts with characters that it lacks, in order of preference."""


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check(path: Path) -> None:
    """Raise UserError for a file that is not a PNG, and if matplotlib is missing."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is no .png", hint="the confusion matrix is written as a PNG")
    if not available():
        raise UserError("matplotlib is not installed, which draws the confusion matrix", hint=f"install it: {INSTALL}")


def write(path: Path, matrix: npt.NDArray[np.int64], labels: Sequence[str]) -> None:
    """Draw a matrix (true labels down, predicted across) as a PNG; colors are shares of the row, cells hold counts.

    Changes no state of matplotlib, and opens no window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fonts, count = _fonts(), len(labels)
    # Inches of a cell: room for a line of its label, and for the longest count.
    digits = max(map(len, _written(matrix).flat)) if count <= COUNTED else 0
    cell = max(SMALL if count > COUNTED else 0.24, 0.07 * digits + 0.06, 0.6 if count <= FEW else 0.0)
    names = _legible(labels, fonts) if count <= NAMED else []
    if not names:
        cell = NAMED * SMALL / count
    margin = 0.9 + 0.1 * max(map(_width, names), default=5)
    figure = Figure(figsize=(max(4.0, cell * count + margin + 1.0), max(3.6, cell * count + margin + 0.4)), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    size = 9.0 if count <= FEW else 7.0
    if names:
        places = np.arange(count)
        straight = count <= 6 and max(map(_width, names)) <= 8
        axes.set_xticks(places, names, rotation=0 if straight else 90, fontsize=size, fontfamily=fonts)
        axes.set_yticks(places, names, fontsize=size, fontfamily=fonts)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("true", fontsize=10)
    if count <= COUNTED:
        _counts(axes, matrix, shares, min(size + 1, 10.0))
    _bar(figure, axes, image, count)
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight")
    disk.write(path, data.getvalue())


def _fonts() -> list[str]:
    """Return the usual font, and those installed that may have what it lacks."""
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return [USUAL, *(name for name in OTHERS if name in there)]


def _legible(labels: Sequence[str], fonts: Sequence[str]) -> list[str]:
    """Return labels as they are drawn; "#3" for label 3 where no installed font has its characters."""
    from matplotlib.font_manager import findfont, get_font

    known: set[int] = set()
    for font in fonts:
        known |= get_font(findfont(font)).get_charmap().keys()
    short = [shortened(label, LONGEST) for label in labels]
    return [
        label.replace("$", r"\$") if all(ord(character) in known for character in label) else f"#{number}"
        for number, label in enumerate(short)  # a dollar sign begins no formula
    ]


def _counts(axes: Axes, matrix: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], size: float) -> None:
    """Draw the counts, light on dark cells, without zeros where there are many."""
    written = _written(matrix)
    for row, column in np.ndindex(matrix.shape):
        if not matrix[row, column] and len(matrix) > 6:
            continue
        color = "white" if shares[row, column] > 0.55 else "#202020"
        text = axes.text(column, row, str(written[row, column]), ha="center", va="center", fontsize=size, color=color)
        text.set_in_layout(False)  # it lies within its cell


def _written(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """Return counts as they are drawn: with many labels, 12,345 as 12k."""
    short = len(matrix) > FEW
    listed = [f"{n / 1000:.0f}k" if short and n >= 10_000 else str(n) for n in matrix.flat]
    return np.array(listed, dtype=np.str_).reshape(matrix.shape)


def _bar(figure: Figure, axes: Axes, image: Any, count: int) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.046 if count <= FEW else 0.03, pad=0.03)
    bar.set_label("share of the true label", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _width(label: str) -> int:
    """Return the width in columns: East Asian characters take two."""
    return sum(1 + (ord(character) >= 0x1100) for character in label)
