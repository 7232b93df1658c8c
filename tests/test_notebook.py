"""A notebook with the public functions alone runs from top to bottom, and work shows in it as one bar, once."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The code of first_steps.ipynb with what came of it, run in a folder with the samples."""
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    (folder / "sample_data").mkdir()
    for name, lines in (("english.txt", 200), ("mail.tsv", 81)):
        text = (ROOT / "sample_data" / name).read_text(encoding="utf-8").split("\n")[:lines]
        (folder / "sample_data" / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    notebook = nbformat.read(ROOT / "tests" / "first_steps.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_work_shows_as_one_bar_and_nothing_else(cells: list[Any]) -> None:
    """There is one display, updated in place; nothing on stdout or stderr, from training or any other work."""
    working = [cell for cell in cells if cell.metadata.get("tags")]
    assert len([cell for cell in working if cell.metadata.tags == ["trains"]]) == 2
    for cell in working:
        (output,) = cell.outputs
        assert output.output_type == "display_data", cell.source
        assert output.data["text/html"].startswith("<progress"), cell.source
    assert "step 4" in working[0].outputs[0].data["text/html"]


def test_the_other_cells_say_what_they_should(cells: list[Any]) -> None:
    shown = [cell.outputs[0].data["text/plain"] for cell in cells if not cell.metadata.get("tags")]
    scores = "['bits_per_byte', 'bytes', 'loss', 'perplexity', 'tokens']"
    assert shown == ["8", "True", scores, "('model', True)", "'In the beginning'"]
