"""Similarity, its map, and soft points with labels."""

from regard.attribution.seg_token import similarity, similarity_map, similarity_points, soft_points

from .. import Case, Source

SOURCE = Source("authors", "rui-qian/READ, READForCausalLM")
TOLERANCE = {"map": 1e-4, "points": 1e-4}


def compare(case: Case):
    settings, side = case.settings, case.settings["grid_side"]
    shape, crop = tuple(settings["shape"]), settings["crop"]
    found = similarity(case["image_tokens"], case["query_token"])
    grid = found.unflatten(1, (side, side))
    whole = similarity_map(grid, shape, crop=crop)
    points, labels = similarity_points(
        grid,
        shape,
        points=settings["num_points"],
        positive=settings["positive"],
        negative=settings["negative"],
        down=settings["down_sample"],
        crop=crop,
    )
    kept = labels[0] != -10
    return {
        "similarity": found,
        "map": (whole[0], case["map"]),
        "points": (soft_points(whole, points)[0, kept], case["points"]),
        "labels": (labels[0, kept].int(), case["labels"].int()),
    }
