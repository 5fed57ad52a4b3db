"""Three gates, with batch statistics and with running ones."""

from regard.mechanisms.triplet import Triplet

from .. import Case, Source
from ._maps import loaded, run

SOURCE = Source("authors", "LandskapeAI/triplet-attention, TripletAttention")
NAMES = {
    rf"{theirs}\.conv\.{layer}": f"{ours}.{of}"
    for theirs, ours in {"cw": "over_row", "hc": "over_column", "hw": "over_channel"}.items()
    for layer, of in {"conv": "convolution", "bn": "norm"}.items()
}


def compare(case: Case):
    settings = case.settings
    module = Triplet(kernel=settings["kernel_size"], spatial=not settings["no_spatial"])
    return run(
        case,
        loaded(module, case.weights, NAMES, training=settings["training"], eps=settings.get("batch_norm_eps", 1e-5)),
    )
