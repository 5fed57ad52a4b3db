"""The transformer: answers of the queries at each layer, with a gradient."""

from regard.models.virt import Decoder

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "Lizhuoling/VIRT, VIRT/detr/models/transformer.py")


def compare(case: Case):
    settings, leaves, state = case.settings, case.leaves("tokens"), {}
    if settings.get("norm", "after") != "after":
        raise Unmapped(f"norms {settings['norm']}")
    for name, value in case.weights.items():
        state[name.replace("encoder.layers.", "encoder.").replace("decoder.", "")] = value
    decoder = Decoder(
        case["tokens"].shape[-1],
        settings["heads"],
        layers=settings["decoder_layers"],
        encoder=settings["encoder_layers"],
        hidden=len(case.weights["decoder.layers.0.linear1.bias"]),
    ).eval()
    decoder.load_state_dict(state)
    output = decoder(leaves["tokens"], case["position"], case["queries"], pad=case.get("pad"))
    return {"output": output, **case.gradients(output.square().sum(), leaves)}
