"""Made when the site is built: a page of each example notebook, run then, with what it printed and drew."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nbformat
from nbclient import NotebookClient

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
FRAME = re.compile(r'srcdoc="([^"]*)"')
SECONDS = 120  # a cell


class Page(NamedTuple):
    markdown: str
    files: dict[str, bytes]  # beside it: the notebook, pictures, what stands in frames


def paths() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def run(path: Path) -> Any:
    """The notebook with its outputs. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    return NotebookClient(notebook, kernel_name="python3", timeout=SECONDS, coalesce_streams=True).execute()


def page(path: Path, notebook: Any) -> Page:
    """The page of a notebook that was run. Pictures and frames are files, which the page need not wait for."""
    parts, files = [], {path.name: path.read_bytes()}
    for cell in notebook.cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            parts.append(_shown(output, path.stem, files))
    return Page("\n\n".join([*filter(None, parts), f"[This notebook]({path.name}), to run it."]) + "\n", files)


def _shown(output: Any, name: str, files: dict[str, bytes]) -> str:
    """Markdown of what a cell gave; nothing of the bar that is drawn while a model is loaded."""
    data = output.get("data", {})
    if output.get("name") == "stdout":
        return f"```text\n{output.text.rstrip()}\n```"
    if "text/html" in data:
        file = f"{name}-{len(files)}.html"
        files[file] = html.unescape(FRAME.search(data["text/html"])[1]).encode()
        return FRAME.sub(f'src="../{file}" loading="lazy"', data["text/html"])
    if "image/png" in data:
        file = f"{name}-{len(files)}.png"
        files[file] = base64.b64decode(data["image/png"])
        return f"![What the cell above draws]({file})"
    if "text/plain" in data and "application/vnd.jupyter.widget-view+json" not in data:
        return f"```text\n{data['text/plain']}\n```"
    return ""


def on_files(files: Files, config: MkDocsConfig) -> None:
    from mkdocs.structure.files import File

    for path in paths():
        made = page(path, run(path))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=made.markdown))
        for name, data in made.files.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
