"""The native library of `kernels/`: where it lies, whether it loads, what it makes use of. Without PyTorch."""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_int64
from functools import cache
from pathlib import Path

INSTRUCTIONS = ("baseline", "avx2", "avx512")
PASSES = ("forward", "backward", "grid_forward", "grid_backward")


@cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = os.environ.get("REGARD_NATIVE") or _built()  # another build, for those who work on it
    if path is None:
        return "the kernel was not built: no C++ compiler was found when regard was installed"
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"the kernel cannot be loaded: {error}"
    names = (*PASSES, "instructions", "openmp", "sizes")
    if not all(hasattr(library, f"regard_{name}") for name in names):
        return f"the kernel at {path} was built from another version of regard"
    for name in names:
        getattr(library, f"regard_{name}").restype = c_int64
    return library


def _built() -> str | None:
    """Where an installation put it. It is asked for without its package, which imports PyTorch."""
    package = "regard.kernels.native"
    places = [str(Path(__file__).parent / "kernels" / "native")]
    for finder in sys.meta_path:
        if (spec := finder.find_spec(f"{package}._native", places)) is not None:
            return spec.origin
    return None


def why_not() -> str | None:
    """Why it is not in use at all; None where it is."""
    if os.environ.get("REGARD_KERNEL") == "torch":
        return "REGARD_KERNEL=torch"
    library = load()
    return library if isinstance(library, str) else None


def instructions() -> int:
    """Index in `INSTRUCTIONS`: the machine's best, or as REGARD_INSTRUCTIONS lowers it."""
    library = load()
    assert not isinstance(library, str)
    found = int(library.regard_instructions())
    if found < 0:
        asked = os.environ.get("REGARD_INSTRUCTIONS")
        raise ValueError(f"REGARD_INSTRUCTIONS={asked!r} is none of {', '.join(INSTRUCTIONS)}")
    return found


def describe() -> str:
    """Which path computes statistics on the CPU, and why, for people."""
    why = why_not()
    return f"native C++, {INSTRUCTIONS[instructions()]}" if why is None else f"plain torch ({why})"
