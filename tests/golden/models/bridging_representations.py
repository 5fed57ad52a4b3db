"""What the bridge makes of maps of several levels."""

from regard.models.bridging_representations import Bridge, LocationBias

from .. import Case, Source

SOURCE = Source("authors", "microsoft/RelationNet2, code/models/utils/bvr_transformer")
TOLERANCE = dict.fromkeys((f"level{i}" for i in range(100)), 1e-4)


def compare(case: Case):
    settings, weights = case.settings, case.weights
    transform = "relative_positional_encoding.embedding_transform.0.conv."
    heads, base = settings["heads"], settings["base_size"]
    dim = weights[f"{transform}weight"].shape[1]
    location = LocationBias(
        dim, heads, base=base and tuple(base), log=settings["log_scale"], temperature=settings["temperature"]
    )
    bridge = Bridge(dim, heads, kinds=settings["groups"], location=location)
    state = {
        "location.read.weight": weights[f"{transform}weight"][..., 0, 0],
        "location.read.bias": weights[f"{transform}bias"],
    }
    for i in range(settings["groups"]):
        for kind in ("weight", "bias"):
            joint = weights[f"decoder.{i}.in_proj_{kind}"].chunk(3)
            state |= {f"attentions.{i}.{of}.{kind}": t for of, t in zip(("query", "key", "value"), joint, strict=True)}
            state[f"attentions.{i}.output.{kind}"] = weights[f"decoder.{i}.out_proj.{kind}"]
    bridge.load_state_dict(state)
    count = sum(f"level{i}.query" in case for i in range(len(case.arrays)))

    def each(name: str) -> list:
        return [[case[f"level{i}.{name}{g}"] for g in range(settings["groups"])] for i in range(count)]

    found = bridge(
        [case[f"level{i}.query"] for i in range(count)],
        [case[f"level{i}.query_position"] for i in range(count)],
        each("key"),
        each("key_position"),
        scale=settings["scale"],
    )
    return {f"level{i}.output": output for i, output in enumerate(found)}
