"""The example notebooks run, and print and draw what their words say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the packages of notebooks")
pytest.importorskip("nbclient", reason="needs the packages of notebooks")
pytest.importorskip("ipykernel", reason="needs the packages of notebooks")

DOCS = Path(__file__).parents[2] / "docs"
TOLD = {  # words that each prints, in order; pictures; frames
    "data-set-profile": (
        [
            "layer 1 head 2: of the five lowest 5 repeat",
            "highest 0",
            "layer 1 head 0: of the five lowest 5",
            "highest 0",
        ],
        1,
        0,
    ),
    "language-model": (["' Mary' comes next", "layer 1 head 2 gives 9", "layer 0 head 0", "layer 1 head 2"], 1, 1),
    "picture-model": (["blue fork: ", "rollout: 7%", "grad_cam: 25%", "attention_x_gradient: 37%"], 1, 1),
    "vision-language-model": (["red", "of the fork: blue", "of the plate: red"], 2, 1),
}


@pytest.fixture(scope="module")
def notebooks():
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_kept_as_they_are_written(notebooks):
    """No outputs: those come from the run."""
    assert {path.stem for path in notebooks.paths()} == TOLD.keys()
    for path in notebooks.paths():
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)
        assert notebook.cells[0].source.startswith("# ")


# ipykernel's sockets are found by the collector of another test
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", TOLD)
def test_it_runs_and_prints_what_it_says(notebooks, name):
    words, pictures, frames = TOLD[name]
    path = notebooks.FOLDER / f"{name}.ipynb"
    made = notebooks.page(path, notebooks.run(path))
    at, printed = 0, "\n".join(made.markdown.split("```text\n")[1:])
    for word in words:
        assert word in printed[at:]
        at = printed.index(word, at) + len(word)
    kinds = [Path(file).suffix for file in made.files]
    assert (kinds.count(".png"), kinds.count(".html")) == (pictures, frames)
    for file, data in made.files.items():
        assert file == path.name or file in made.markdown
        assert data.startswith({".png": b"\x89PNG", ".html": b"<!doctype html>", ".ipynb": b"{"}[Path(file).suffix])
    assert "srcdoc" not in made.markdown
