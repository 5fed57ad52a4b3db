"""Scores of words, weights over places, the penalty and a gradient; captions of different lengths, by length."""

import torch

from regard.models.show_attend_tell import doubly_stochastic, show_attend_tell

from .. import Case, Source

SOURCE = Source("reimplementation", "sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, models.py")
NAMES = {
    "attention.encoder_att": "place",
    "attention.decoder_att": "state",
    "attention.full_att": "score",
    "embedding": "embed",
    "decode_step": "lstm",
    "init_h": "first_hidden",
    "init_c": "first_cell",
    "f_beta": "gate",
    "fc": "word",
}


def compare(case: Case):
    weights, leaves = case.weights, case.leaves("x")
    model = show_attend_tell(
        *weights["embedding.weight"].shape[:1],
        dim=case["x"].shape[-1],
        hidden=weights["init_h.bias"].shape[0],
        embedding=weights["embedding.weight"].shape[1],
        width=weights["attention.encoder_att.bias"].shape[0],
        activation="relu",
        gate="vector",
        deep_output=False,
        initial="linear",
    ).eval()
    named = {
        f"{ours}.{name.removeprefix(theirs + '.')}": value
        for name, value in weights.items()
        for theirs, ours in NAMES.items()
        if name.startswith(theirs + ".")
    }
    model.load_state_dict({**named, "baseline": torch.zeros(())})
    order, count = case["order"], case["logits"].shape[1]
    mask = torch.arange(count) < case["decode_lengths"][:, None]
    found = model(leaves["x"].flatten(1, 2)[order], case["captions"][order, :count])
    logits, looked = found.logits * mask[..., None], found.weights * mask[..., None]
    return {
        "logits": logits,
        "weights": looked,
        "penalty": doubly_stochastic(found.weights, mask) / looked.shape[-1],  # theirs is the mean over places
        **case.gradients(logits.square().sum(), leaves),
    }
