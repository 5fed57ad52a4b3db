"""The keys that a query looks at most."""

from torch import Tensor

from ..call import Call
from ..recording import statistic


@statistic("batch head query rank", title="Top keys", units="position")
def top_keys(call: Call, *, k: int = 8) -> Tensor:
    """Positions of the `k` largest weights, largest first; -1 where fewer keys are seen. [batch, head, query, rank]"""
    return call.weights.top(k)[1].int()
