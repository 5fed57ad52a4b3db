"""The logarithm of where each step points."""

from regard.models.pointer_networks import PointerAttention

from .. import Case, Source

SOURCE = Source("reimplementation", "ast0414/pointer-networks-pytorch, Attention")
NAMES = {"W1.weight": "key.weight", "W2.weight": "query.weight", "vt.weight": "score.weight"}


def compare(case: Case):
    module, leaves, mask = PointerAttention(case.settings["dim"]), case.leaves("memory"), case["mask"][:, None]
    module.load_state_dict({NAMES[name]: value for name, value in case.weights.items()})
    scores = module(case["decoded"], leaves["memory"], mask).log_softmax(-1)
    seen = mask.expand_as(scores)  # what is masked holds about -103 there, and -inf here
    output = scores.masked_fill(~seen, 0.0)
    return {
        "output": (output, case["output"].masked_fill(~seen, 0.0)),
        **case.gradients(output, leaves),
    }
