"""What vectors are replaced by, with a gradient; hard draws cannot be repeated."""

from regard.models.selective_codebook import Codebook

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "allenai/procthor-rl, procthor_objectnav/models/resnet_gru.py")
NAMES = {"codebook": "codes", "index.1": "score", "up.0": "up"}
INDEX = {"softmax": "softmax", "topk_softmax": "top"}


def compare(case: Case):
    settings, leaves, state = case.settings, case.leaves("embeds"), case.weights
    if settings["indexing"] not in INDEX:
        raise Unmapped(f"draws by {settings['indexing']}")
    if settings.get("dropout", "off") not in ("off", 0):
        raise Unmapped(f"dropout {settings['dropout']}, whose draws cannot be repeated")
    for theirs, ours in NAMES.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    codes, dim = state["codes"].shape
    book = Codebook(
        case["embeds"].shape[-1],
        codes=codes,
        dim=dim,
        index=INDEX[settings["indexing"]],
        kind=settings["type"],
        top=settings["top"],
    ).eval()
    book.load_state_dict(state)
    output, _ = book(leaves["embeds"])
    return {"output": output, **case.gradients(output.square().sum(), leaves)}
