"""Entropy of attention: how widely a query looks."""

from torch import Tensor

from ..call import Call
from ..recording import statistic


@statistic("batch head query", title="Entropy", units="nats", limits=(0, None))
def entropy(call: Call) -> Tensor:
    """Spread of each query's attention: 0 for one key, log n for n keys alike; higher is wider. [batch, head, query]

    -sum p log p over keys, nats. Where sinks take a part of the weight, p sums to less than 1 and is not rescaled.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "entropy") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> float(recording.tree["language_model"]["entropy"].sel(query=0).max())
    0.0
    """
    return call.weights.entropy()
