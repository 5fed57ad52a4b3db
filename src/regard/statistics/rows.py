"""The attention map itself, where it is small enough to keep."""

from torch import Tensor

from ..call import Call
from ..recording import statistic
from ..weights import DENSE_BUDGET


@statistic("batch head query key", title="Weights", units="share", limits=(0, 1))
def rows(call: Call, *, budget: int = DENSE_BUDGET) -> Tensor:
    """Dense weights, 0 to 1; an error where one call's take more than `budget` bytes. [batch, head, query, key]"""
    return call.weights.dense(budget)
