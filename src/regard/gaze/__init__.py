"""Gaze: where people look. Scanpaths, how to compare them, and models of them.

Every file holds one function or model of its own name. `Scanpath` is what the loaders of `regard.data.loaders` give.
"""

from ..data.loaders import GazeData, GazeTrial, Scanpath
from ..data.loaders import read_gaze as read
from .compare import compare
from .compare_pictures import compare_pictures
from .draw import draw
from .draw_scanpath import draw_scanpath
from .score import score

__all__ = ["GazeData", "GazeTrial", "Scanpath", "compare", "compare_pictures", "draw", "draw_scanpath", "read", "score"]
