"""The confusion matrix as a picture."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tfcli.errors import UserError
from tfcli.text import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "confusion.png"
INSTALL = 'pip install "tfcli[plot]"'
LONGEST = 24
"""Characters of a label that are shown."""
COUNTED = 60
"""Labels of which the counts are still legible in their cells; of more only the colours are drawn."""
OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei",
    "Arial Unicode MS",
)  # fmt: skip
"""Fonts with the characters that the usual one has not, those that are there in this order."""


def available() -> bool:
    """Whether the library that draws is there."""
    return importlib.util.find_spec("matplotlib") is not None


def check(path: Path) -> None:
    """Raise UserError for a file that cannot become a PNG, and where the library is not there."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is no .png", hint="the confusion matrix is written as a PNG")
    if not available():
        raise UserError("matplotlib is not installed, which draws the confusion matrix", hint=f"install it: {INSTALL}")


def write(path: Path, matrix: npt.NDArray[np.int64], labels: Sequence[str]) -> None:
    """Draw a matrix (true labels down, predicted across) as a PNG; each row's colours are parts of that row.

    Cells hold counts. No state of matplotlib is touched, and no window opened.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import fontManager
    from matplotlib.figure import Figure

    there = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in OTHERS if name in there)]
    count = len(labels)
    # Inches of a cell: room for the largest count, at least for a line of its label.
    cell = max(0.24, 0.09 * len(f"{matrix.max(initial=0)}") + 0.08, 0.6 if count <= 12 else 0.0)
    names = [_short(label) for label in labels]
    margin = 0.9 + 0.1 * max(map(_width, names))
    figure = Figure(figsize=(max(4.0, cell * count + margin + 1.0), max(3.6, cell * count + margin + 0.4)), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    size = 9.0 if count <= 12 else 7.0
    places = np.arange(count)
    straight = count <= 6 and max(map(_width, names)) <= 8
    axes.set_xticks(places, names, rotation=0 if straight else 90, fontsize=size, fontfamily=fonts)
    axes.set_yticks(places, names, fontsize=size, fontfamily=fonts)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("true", fontsize=10)
    if count <= COUNTED:
        _counts(axes, matrix, shares, min(size + 1, 10.0))
    _bar(figure, axes, image, count)
    with warnings.catch_warnings():
        # A character that no font here has is drawn as a box; that is no news for every one of them.
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)
        data = io.BytesIO()
        figure.savefig(data, format="png", bbox_inches="tight")
    files.write(path, data.getvalue())


def _counts(axes: Axes, matrix: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], size: float) -> None:
    """The counts, 0 left out where there are many; light on dark cells."""
    for row, column in zip(*np.nonzero(matrix) if len(matrix) > 6 else np.indices(matrix.shape).reshape(2, -1)):
        colour = "white" if shares[row, column] > 0.55 else "#202020"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=size, color=colour)


def _bar(figure: Figure, axes: Axes, image: object, count: int) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.046 if count <= 12 else 0.03, pad=0.03)  # type: ignore[arg-type]
    bar.set_label("part of the true label", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _short(label: str) -> str:
    flat = " ".join(label.split()).replace("$", r"\$")  # not a formula
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 1] + "…"


def _width(label: str) -> int:
    """Columns: characters of East Asia take two."""
    return sum(1 + (ord(character) >= 0x1100) for character in label)
