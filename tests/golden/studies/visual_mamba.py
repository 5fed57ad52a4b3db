"""Mixers of Mamba and Mamba-2, whose output is made with the matrix."""

from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from regard.studies.visual_mamba import visual_mamba

from .. import Case, Source, Unmapped

SOURCE = Source("reimplementation", "transformers, MambaMixer and Mamba2Mixer")
TOLERANCE = dict.fromkeys(("output", "grad_hidden"), 2e-5)


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("hidden")
    if settings.get("loss", "sum of squares") != "sum of squares":
        raise Unmapped(f"gradients of {settings['loss']}")
    output = visual_mamba(_mixer(case), leaves["hidden"]).output
    return {"output": output, **case.gradients(output.square().sum(), leaves)}


def _mixer(case: Case):
    settings, weights, dim = case.settings, case.weights, case["hidden"].shape[-1]
    inner = weights["out_proj.weight"].shape[1]
    common = {
        "hidden_size": dim,
        "expand": inner // dim,
        "state_size": settings["state"],
        "conv_kernel": settings["conv"],
        "hidden_act": settings.get("activation", "silu"),
        "use_bias": "in_proj.bias" in weights,
        "use_conv_bias": "conv1d.bias" in weights,
        "num_hidden_layers": 1,
    }
    if settings["kind"] == "mamba1":
        mixer = MambaMixer(MambaConfig(**common, time_step_rank=weights["dt_proj.weight"].shape[1]), 0)
    elif settings["kind"] == "mamba2":
        config = Mamba2Config(
            **common,
            num_heads=settings["heads"],
            head_dim=settings["head_dim"],
            n_groups=settings["groups"],
            time_step_limit=tuple(settings.get("time_step_limit", (0.0, float("inf")))),
            layer_norm_epsilon=settings.get("norm_eps", 1e-5),
        )
        mixer = Mamba2Mixer(config, 0)
    else:
        raise Unmapped(f"no mixer of kind {settings['kind']}")
    mixer.to(case["hidden"].dtype).load_state_dict(weights)
    return mixer
