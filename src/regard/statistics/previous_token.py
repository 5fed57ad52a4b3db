"""Previous-token heads.

Voita et al., Analyzing Multi-Head Self-Attention (arXiv:1905.09418), section 5.1, call a head positional that looks at
a neighbour; Elhage et al., A Mathematical Framework for Transformer Circuits (2021), call the one for the position
before a previous-token head. TransformerLens' head detector multiplies the map with the same diagonal, and divides by
all weight, also that of the first query, which has no previous token and is NaN here, with padding before it or not.
"""

from torch import Tensor

from ..call import Call
from ..recording import statistic
from ._parts import at_offset


@statistic("batch head query", title="Weight on the previous token", units="share", limits=(0, 1))
def previous_token(call: Call) -> Tensor:
    """Weight of each query on the position before its own, 0 to 1. [batch, head, query]

    NaN for the first query that is not padding, and in cross attention.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "previous_token") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> recording.tree["language_model"]["previous_token"].dims
    ('batch', 'layer', 'head', 'query')
    """
    return at_offset(call, -1)
