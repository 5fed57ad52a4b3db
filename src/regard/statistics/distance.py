"""Attention distance: how far a query looks."""

from torch import Tensor

from ..call import Call
from ..recording import statistic
from ._parts import undefined


@statistic("batch head query", title="Distance", units="tokens", limits=(0, None))
def distance(call: Call, *, clip: int | None = None) -> Tensor:
    """Expected distance from query to key, tokens; keys further than `clip` count as `clip`. [batch, head, query]

    In a picture this counts patches in reading order. NaN in cross attention, whose positions do not compare.
    """
    return undefined(call) if call.site.cross else call.weights.distance(clip)
