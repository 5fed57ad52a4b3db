"""Logits of the whole model; a linear map of features stands for the authors' convolutions."""

import torch

from regard.gaze.oat import OAT, OATConfig

from .. import Case, Source

SOURCE = Source("authors", "HKUST-NISL/oat_eccv24, Seq2SeqTransformer")
NAMES = {
    "transformer_encoder": "encoder",
    "transformer_decoder": "decoder",
    "cnn_embedding.fc": "appearance",
    "encode_fc": "of_object",
    "decode_fc": "of_look",
}


def _name(name: str) -> str:
    if name.startswith("cross_attentions."):
        _, number, part, kind = name.split(".")
        return f"{NAMES[part]}.{number}.{kind}"
    for theirs, ours in NAMES.items():
        if name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def compare(case: Case):
    settings, weights = case.settings, dict(case.weights)
    bias = weights.pop("readout.bias")
    sizes = ("features", "dim", "heads", "feedforward", "encoder_layers", "decoder_layers", "readout_heads", "sigma")
    model = OAT(OATConfig(**{name: settings[name] for name in sizes}, dropout=0.0)).eval()
    kinds = model.kind.weight.shape[1]
    state = {_name(name): value for name, value in weights.items()}
    state["kind.weight"] = case["pe"][-2:].reshape(2, -1)[:, :kinds]
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(*(case[name] for name in ("features", "places", "target", "path", "present")))
    objects = logits.shape[-1] - 1
    theirs = case["logits"] - bias
    theirs = torch.cat([theirs[..., :objects], theirs[..., -1:]], -1)
    absent = torch.nn.functional.pad(~case["present"], (0, 1))[:, None]
    return {"logits": (logits, theirs.masked_fill(absent, -torch.inf))}
