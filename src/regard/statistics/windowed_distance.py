"""Windowed attention distance: how far back a query looks within a window.

Li et al., Attention Illuminates LLM Reasoning (arXiv:2510.13554), definition 4.1 (WAAD), of one head. It is linear in
the weights, so that the paper's value, of the mean map of several heads, is the mean of theirs: see `preplan_anchor`.
"""

from torch import Tensor

from ..call import Call
from ..recording import statistic
from .distance import distance


@statistic("batch head query", title="Distance in a window", units="tokens", limits=(0, None))
def windowed_distance(call: Call, *, window: int = 10) -> Tensor:
    """Expected distance from query to key, tokens; keys further than `window` count as `window`. [batch, head, query]

    High where a query must look beyond its neighbours, as at the start of a phrase; low where it goes on with one. NaN
    in cross attention, whose positions do not compare.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "windowed_distance") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> bool(recording.tree["language_model"]["windowed_distance"].max() <= 10)
    True
    """
    return distance(call, clip=window)
