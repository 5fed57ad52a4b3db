"""A statistic of your own: the weight that each query gives to the token right before it."""

import torch

import regard


@regard.statistic("batch head query", title="Weight on the previous token", units="share", limits=(0, 1))
def previous(call: regard.Call) -> torch.Tensor:
    """Weight on the key one position before the query, 0 to 1; 0 for the first query. [batch, head, query]"""
    own = torch.arange(call.query.shape[2]) + call.query_start - call.key_start
    return call.weights.at(own[None] - 1)


model, tokenizer = regard.load("reader")
inputs = tokenizer("The king spoke to the queen, and the queen spoke to the king.", return_tensors="pt")

with torch.no_grad(), regard.record(model, previous, "entropy") as recording:
    model(**inputs)

score = recording.tree["language_model"]["previous"].isel(query=slice(1, None)).mean(("batch", "query"))
print("Mean weight on the previous token, the five highest of all heads:")
for (layer, head), value in score.to_series().nlargest(5).items():
    print(f"  layer {layer} head {head}: {value:.2f}")
