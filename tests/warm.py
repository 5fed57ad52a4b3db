"""Other processes, as users start them, that need not import torch and transformers each: forked from one that has."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, as huggingface_hub is imported: no process from here asks a hub
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["regard.cli.look", "regard.zoo", "transformers.models.auto", "transformers.generation.utils", "zarr", "xarray"]
)


def regard(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`regard ARGUMENTS`: see `run`."""
    return run("regard", *map(str, arguments), **options)


def run(
    what: str, *arguments: str, cwd: Path | str = ".", file_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """A module by its name or a script by its path, as by `python -m` or `python`; writes no file over `file_bytes`."""
    with tempfile.TemporaryDirectory() as folder:
        said = [str(Path(folder) / name) for name in ("out", "errors")]
        process = FORKED.Process(target=_inside, args=(what, arguments, said, str(cwd), file_bytes))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{what} {' '.join(arguments)} took over five minutes")
        out, errors = (Path(path).read_text() for path in said)
    return subprocess.CompletedProcess([what, *arguments], process.exitcode, out, errors)


def _inside(what: str, arguments: tuple[str, ...], said: list[str], cwd: str, file_bytes: int | None) -> None:
    for number, path in enumerate(said, 1):
        at = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(at, number)
        os.close(at)
    os.chdir(cwd)
    os.environ["COLUMNS"] = "160"
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = [what, *arguments]
    if what.endswith(".py"):
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
