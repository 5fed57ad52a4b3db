"""Both attentions with a gradient; where the file has them, a whole layer of each, and the encoder and decoder."""

from regard.models.self_guided import AttentionLayer, ChannelAttention, PositionAttention, Semantic

from .. import Case, Source

SOURCE = Source("authors", "sinAshish/Multi-Scale-Attention, src/models/attention.py and my_stacked_danet.py")
MAPS = {"query_conv": "query", "key_conv": "key", "value_conv": "value"}
BLOCKS = {"enc1.encode": "down.0", "enc2.encode": "down.1", "dec2.decode": "up.0", "dec1.decode": "up.1"}


def _of(case: Case, start: str, names: dict[str, str]):
    found = {}
    for name, value in case.weights.items():
        if name.startswith(start):
            ours = name.removeprefix(start)
            for theirs, own in names.items():
                ours = ours.replace(theirs, own)
            found[ours] = value
    return found


def compare(case: Case):
    leaves, channels = case.leaves("x"), case["x"].shape[1]
    position, channel = PositionAttention(channels), ChannelAttention()
    position.load_state_dict(_of(case, "pam.", MAPS))
    channel.gamma.data.fill_(case.settings["gamma_cam"])
    pam, cam = position(leaves["x"]), channel(leaves["x"])
    found = {
        "pam": pam,
        "cam": cam,
        **case.gradients(pam.square().sum() + cam.square().sum(), leaves),
    }
    for name, kind in (("level_pam", PositionAttention), ("level_cam", ChannelAttention)):
        if name in case:
            width = case[name].shape[1]
            layer = AttentionLayer(case["level_in"].shape[1], width, kind(*([width] * (kind is PositionAttention))))
            layer.load_state_dict(_of(case, f"{name}.attn.", MAPS), strict=False)
            found[name] = layer.eval()(case["level_in"])
    if "semantic_in" in case:
        semantic = Semantic(case["semantic_in"].shape[1])
        semantic.load_state_dict(_of(case, "semantic.", BLOCKS), strict=False)  # steps are not counted there
        found["semantic_code"], found["semantic_reconstruction"] = semantic.eval()(case["semantic_in"])
    return found
