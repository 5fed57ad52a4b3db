"""Attention of a query to its own position: the diagonal of the map."""

from torch import Tensor

from ..call import Call
from ..recording import statistic
from ._parts import at_offset


@statistic("batch head query", title="Weight on itself", units="share", limits=(0, 1))
def self_mass(call: Call) -> Tensor:
    """Weight of each query on its own position, 0 to 1. [batch, head, query]

    NaN for padding, and in cross attention, where a query has no position among the keys.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "self_mass") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> recording.tree["language_model"]["self_mass"].dims
    ('batch', 'layer', 'head', 'query')
    """
    return at_offset(call, 0)
