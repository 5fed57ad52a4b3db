"""Two layers, of which the first chooses fine tokens by its weights and the second attends to them."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import regard
from regard.interventions.scene_magnifier import Projections, scene_magnifier
from regard.objectives import collect

from .. import Case, Source
from ..mechanisms._llama import attention

SOURCE = Source("authors", "Hoyyyaard/LSceneLLM, modeling_llama.py")
OWN = ("q_proj", "k_proj", "v_proj", "o_proj")


class Layers(nn.Module):
    """Attention modules, each of which is given states of its own."""

    def __init__(self, modules) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, layer, hidden, angles):
        n = hidden.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
        return self.layers[layer](hidden, position_embeddings=angles, attention_mask=mask)[0]


def compare(case: Case):
    settings, dense, states = case.settings, case["dense"], [case["hidden_first"], case["hidden_second"]]
    heads, kv_heads = settings["heads"], settings.get("kv_heads", settings["heads"])
    weights = [_part(case.weights, name) for name in ("first", "second")]
    made = [
        attention(
            {f"{name}.weight": part[f"{name}.weight"] for name in OWN},
            heads=heads,
            kv_heads=kv_heads,
            rope_theta=settings["theta"],
        )
        for part in weights
    ]
    model, config = Layers([module["attention"] for module, _ in made]), made[0][1]
    for i, module in enumerate(model.layers):
        module.layer_idx = i
    angles = LlamaRotaryEmbedding(config)(states[0], torch.arange(states[0].shape[1])[None])
    start, count, batch = settings["scene_start"], settings["scene_tokens"], len(dense)
    own = Projections(dense.shape[-1], kv_heads=kv_heads, head_dim=settings["dim"], layers=[1]).to(dense.dtype)
    own.load_state_dict(
        {"keys.1.weight": weights[1]["k_proj_hd.weight"], "values.1.weight": weights[1]["v_proj_hd.weight"]}
    )
    with torch.no_grad():
        fine = own(
            dense,
            tuple(a[:, start : start + count] for a in angles),
            places=torch.arange(start, start + count).expand(batch, -1),
            first=torch.tensor([settings["text_start"]]).expand(batch),
            last=torch.tensor([settings["last"]]).expand(batch),
        )
        method = scene_magnifier(fine=fine, start=0, threshold=settings["threshold"] / 255)
        with regard.intervene(model, method), collect(model, lambda call: call.weights.dense()) as seen:
            first = model(0, states[0], angles)
            selected = method.selected
            second = model(1, states[1], angles)
        found = {"weights_first": seen[0].value, "output_first": first, "selected": selected, "output_second": second}
        if "selected_second" in case:  # what a layer after it would be given: the second in the place of the first
            swapped = scene_magnifier(fine=fine, start=0, threshold=settings["threshold"] / 255)
            model.layers = model.layers[::-1]
            with regard.intervene(model, swapped):
                model(0, states[1], angles)
            found["selected_second"] = swapped.selected
    return found


def _part(weights, name):
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
