"""The layer of timm: zeros outside the picture take part, and with a stride positions are of the queries kept."""

from regard.mechanisms.halonet import HaloAttention

from .. import Case, Source

SOURCE = Source("reimplementation", "timm, HaloAttn")


def compare(case: Case):
    settings, weights = case.settings, case.weights
    heads, stride, block = settings["num_heads"], settings.get("stride", 1), settings["block_size"]
    module = HaloAttention(
        settings["dim"],
        heads,
        dim_out=settings.get("dim_out"),
        dim_head=weights["pos_embed.height_rel"].shape[1],
        block=block,
        halo=settings["halo_size"],
        stride=stride,
        qkv_bias=settings.get("qkv_bias", False),
        average=settings.get("avg_down", False) or block % stride > 0,
        scaled_bias=settings.get("scale_pos_embed", False),
        padding="zeros",
        true_offsets=False,
    ).to(case["input"].dtype)
    names = {"pos_embed.height_rel": "row", "pos_embed.width_rel": "column"}
    module.load_state_dict({names.get(name, name): weight for name, weight in weights.items()})
    x = case["input"].clone().requires_grad_()
    output = module(x)
    return {"output": output, **case.gradients(output, {"input": x})}
