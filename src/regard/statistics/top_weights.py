"""The weights of the keys that a query looks at most."""

from torch import Tensor

from ..call import Call
from ..recording import statistic


@statistic("batch head query rank", title="Top weights", units="share", limits=(0, 1))
def top_weights(call: Call, *, k: int = 8) -> Tensor:
    """The `k` largest weights, largest first, of the keys that `top_keys` names. [batch, head, query, rank]"""
    return call.weights.top(k)[0]
