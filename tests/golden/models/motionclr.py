"""Both attentions, plain and under the edits, before the residual."""

import torch
from torch import nn

import regard
from regard.models.motionclr import Emphasise, Erase, MotionAttention, Replace, Shift, Style

from .. import Case, Source

SOURCE = Source("authors", "IDEA-Research/MotionCLR, models/unet.py")


def compare(case: Case):
    settings, x, text, weights = case.settings, case["x"], case["text"], case.weights
    model = nn.ModuleDict(
        {
            "self_attention": MotionAttention(x.shape[-1], settings["heads"]),
            "cross_attention": MotionAttention(x.shape[-1], settings["heads"], words=text.shape[-1]),
        }
    )
    for kind in ("self", "cross"):
        own = {n.removeprefix(f"{kind}."): w for n, w in weights.items() if n.startswith(f"{kind}.")}
        model[f"{kind}_attention"].load_state_dict({n.replace("text_norm", "norm_words"): w for n, w in own.items()})

    def both(*edits):
        if not edits:
            return model["self_attention"](x), model["cross_attention"](x, text)
        with torch.no_grad(), regard.intervene(model, *edits):
            return model["self_attention"](x), model["cross_attention"](x, text)

    word, replaced, erase = settings["word"], settings["replaced_word"], settings["erase"]
    emphasis = [Emphasise([1 + at, 2 + at], settings["reweight"], row=row) for row, at in enumerate((0, word))]
    plain, replacing = both(), both(Replace([1 + replaced]))
    erased = Erase([word, word + 1], factor=erase["weight"], begin=erase["start"], end=erase["end"])
    return {
        "self": plain[0],
        "cross": plain[1],
        "cross_reweighted": both(*emphasis)[1],
        "self_replaced": replacing[0],
        "cross_replaced": replacing[1],
        "cross_erased": both(erased)[1],
        "self_shifted": both(Shift(settings["shift_ratio"]))[0],
        "self_style": both(Style())[0],
    }
