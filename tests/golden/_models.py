"""Small models of transformers with weights of a file."""

from collections.abc import Mapping

from torch import Tensor, nn


def loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """In evaluation mode; a head that is tied to the embeddings may be absent."""
    absent, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(absent) - set(getattr(model, "all_tied_weights_keys", None) or ["lm_head.weight"]):
        raise ValueError(f"not the weights of {type(model).__name__}: {[*absent, *unknown]}")
    return model.eval()
