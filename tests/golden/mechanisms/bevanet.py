"""The modules, in evaluation mode."""

from regard.mechanisms.bevanet import BoundaryFusion, LargeKernelPyramid, SeparableKernel, SparseKernel, VisualBlock

from .. import Case, Source
from ._maps import loaded, run

SOURCE = Source("authors", "maomao0819/BEVANet, models/LSKA.py, EVAN.py, PPM.py and FB.py")
SPARSE = {
    r"DW_conv\.dwconv": "small",
    r"DW_D_conv_h\.dwconv": "along_row",
    r"DW_D_conv_v\.dwconv": "along_column",
    r"pwconv\.pwconv": "mix",
    r"FS_kernel\.fc_reduce\.2": "select.reduce.2",
    r"FS_kernel\.fc_reduce\.(\d)\.\w+": r"select.reduce.\1",
    r"FS_kernel\.conv_squeeze": "select.places",
    **{
        rf"FS_kernel\.fc_expand_{part}\.{layer}": rf"select.expand.{i}.{ours}"
        for i, part in enumerate(("small", "big_h", "big_v"))
        for layer, ours in {"2": "2", r"(\d)\.\w+": r"\1"}.items()
    },
}
SEPARABLE = {
    r"DW_conv_h\.dwconv": "strips.0",
    r"DW_conv_v\.dwconv": "strips.1",
    r"DW_D_conv_h\.dwconv": "strips.2",
    r"DW_D_conv_v\.dwconv": "strips.3",
    r"pwconv\.pwconv": "mix",
}


def _around(kernel, before, ours):
    """Names of a large kernel between two pointwise convolutions."""
    return {
        **{rf"{before}\.spatial_gating_unit\.{theirs}": f"{ours}.kernel.{of}" for theirs, of in kernel.items()},
        rf"{before}\.proj_1\.pwconv": f"{ours}.first",
        rf"{before}\.proj_2\.pwconv": f"{ours}.last",
    }


BLOCK = {
    **_around(SPARSE, "attn", "attention"),
    "layer_scale_1": "scale",
    "layer_scale_2": "scale_mlp",
    "norm1": "norm",
    "norm2": "norm_mlp",
    r"mlp\.fc1\.pwconv": "mlp.0",
    r"mlp\.dwconv\.dwconv": "mlp.1",
    r"mlp\.fc2\.pwconv": "mlp.3",
}
FUSION = {"conv_p": "of_detail", "conv_i": "of_semantic", "out": "output"}
PYRAMID = {
    **_around(SEPARABLE, "lska", "attention"),
    "layer_scale_lska": "scale",
    "bn": "norm",
    **{rf"process{part}": f"joins.{i}" for i, part in enumerate(("1", "2", "_lska", "4", "5"))},
}
PROJECTIONS = {
    "scale0": "scales.0",
    "scale1": "scales.1",
    "scale2": "scales.2",
    "scale4": "scales.3",
    "scale5": "scales.4",
    "compression": "compress",
    "shortcut": "shortcut",
}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    kind = settings["module"].split()[0]
    how = {"training": settings["training"], "eps": settings.get("batch_norm_eps", 1e-5)}
    if kind == "BGAF":
        module = loaded(BoundaryFusion(settings["channels"]), weights, FUSION, **how)
        return run(case, module, "detail", "semantic", "boundary")
    channels = case["input"].shape[1]
    if kind == "DLKPPM":
        return run(case, _pyramid(weights, channels, how))
    knobs = {"kernel": settings["kernel_size"]}
    if kind == "EVAN":
        block = VisualBlock(channels, ratio=settings["mlp_expand"], **knobs)
        return run(case, loaded(block, weights, BLOCK, **how))
    names = {"SDLSKA": SPARSE, "LSKA": SEPARABLE}[kind]
    module = {"SDLSKA": SparseKernel, "LSKA": SeparableKernel}[kind](channels, **knobs)
    return run(case, loaded(module, weights, names, **how))


def _pyramid(weights, channels, how):
    """Their scales begin with a pool, but for the first; ours all do."""
    found = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part in PROJECTIONS:
            number, _, last = rest.partition(".")
            number = int(number) + (part == "scale0")
            name = f"{PROJECTIONS[part]}.{number}.{last.removeprefix('pwconv.')}"
        found[name] = value
    out, hidden = weights["compression.2.pwconv.weight"].shape[:2]
    return loaded(LargeKernelPyramid(channels, hidden // 6, out), found, PYRAMID, **how)
