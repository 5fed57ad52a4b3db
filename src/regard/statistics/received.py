"""Attention received: which keys are looked at."""

from torch import Tensor

from ..call import Call
from ..recording import statistic


@statistic("batch head key", title="Attention received", units="queries", limits=(0, None))
def received(call: Call) -> Tensor:
    """Sum of the weights on each key over all queries but padding; n queries give n in all. [batch, head, key]

    Under a causal mask early keys are seen by more queries, so compare keys of like position.
    """
    if call.query_tokens is None:
        return call.weights.received()
    return call.weights.received("real" if call.query_tokens.padded else None)
