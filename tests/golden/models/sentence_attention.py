"""The first block's weights and output, and the mask."""

import re

from regard.models.sentence_attention import SentenceGrounding

from .. import Case, Source

SOURCE = Source("authors", "khoshsirat/embedding-attention-blocks, model.py")
NAMES = (
    (r"^sentence_attentions\.(\d+)\.attention\.", r"blocks.\1.score."),
    (r"^merge_blocks\.(\d+)\.low_res_conv\.", r"merges.\1."),
    (r"^classifier\.", "classify."),
)


def _own(name: str) -> str:
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


def compare(case: Case):
    settings, sentence = case.settings, case["sentence"]
    rows, columns = settings["size"] if isinstance(settings["size"], list) else [settings["size"]] * 2
    channels = settings["channels"]
    maps = [case[f"map{i}"] for i in range(len(channels))]
    model = SentenceGrounding(
        sentence.shape[-1], channels, classes=case["logits"].shape[1], expand=settings["expand"]
    ).eval()
    model.load_state_dict({_own(name): weight for name, weight in case.weights.items()})
    found, weights = model.blocks[0](maps[0], sentence)
    return {
        "channel_weights": weights,
        "block_output": found,
        "logits": model(maps, sentence, size=(rows, columns)).logits,
    }
