"""The confusion matrix as a picture: whole PNGs without a warning, and colours that can be read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tfcli.errors import UserError
from tfcli.tasks.classify import plot

NAMES: dict[str, list[str]] = {
    "two": ["negative", "positive"],
    "chinese": ["体育", "财经新闻", "$cost$ _x_", "Straße"],
    "odd": ["a\nb\tc", "", "x" * 90],
    "fifty": [f"intent number {n} with a long name" for n in range(50)],
    "many": [f"label {n}" for n in range(100)],
    "more": [f"label {n}" for n in range(600)],
}


def matrix(count: int) -> Any:
    generator = np.random.default_rng(0)
    return generator.poisson(2 / count, (count, count)) + np.diag(generator.integers(5, 12000, count))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_label_is_drawn(name: str, tmp_path: Path) -> None:
    """Warnings are errors here: a font without Chinese, or a dollar sign taken for a formula, would show.

    The size is bounded whatever the labels: a picture of 1,000 with their names would need 20 GB.
    """
    labels = NAMES[name]
    plot.write(tmp_path / "c.png", matrix(len(labels)), labels)
    with Image.open(tmp_path / "c.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300 and max(image.size) < 6000
    assert "matplotlib.pyplot" not in sys.modules, "no state of the process is touched"


def test_rows_are_shares_of_their_label(tmp_path: Path) -> None:
    """10 of 10 is as dark as 1000 of 1000, a label without an example is white, and 0 divides nothing."""
    plot.write(tmp_path / "c.png", np.array([[10, 0, 0], [0, 1000, 0], [0, 0, 0]]), ["a", "b", "c"])
    with Image.open(tmp_path / "c.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    dark = sorted((count for count, rgb in colours if rgb == (8, 48, 107)), reverse=True)  # the darkest of Blues
    assert dark and dark[0] > 2 * 60 * 60, "two cells of it"


def test_counts_contrast_with_their_cells() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    counts = np.array([[8, 2], [1, 9]])
    plot._counts(axes, counts, counts / 10, 9.0)
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [
        ("8", "white"), ("2", "#202020"), ("1", "#202020"), ("9", "white"),
    ]  # fmt: skip


def test_labels_that_no_font_has_are_numbered() -> None:
    """The picture stays readable on a machine without Chinese fonts: the numbers are those of config.json."""
    assert plot._legible(["good", "财经", "$5"], ["DejaVu Sans"]) == ["good", "#1", r"\$5"]


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"c\.jpg is no \.png"):
        plot.check(Path("c.jpg"))
    plot.check(Path("c.PNG"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'matplotlib is not installed.*pip install "tfcli\[plot\]"'):
        plot.check(Path("c.png"))
