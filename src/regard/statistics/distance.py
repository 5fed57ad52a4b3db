"""Attention distance: how far a query looks."""

from torch import Tensor

from ..call import Call
from ..recording import statistic


@statistic("batch head query", title="Distance", units="tokens", limits=(0, None))
def distance(call: Call, *, clip: int | None = None) -> Tensor:
    """Expected distance from query to key, tokens; keys further than `clip` count as `clip`. [batch, head, query]

    In a picture this counts patches in reading order, and in cross attention positions of two sequences.
    """
    return call.weights.distance(clip)
