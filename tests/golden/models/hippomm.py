"""Segments by sight, by hearing and by both; key frames; the nearest of them."""

import numpy as np
import torch

from regard.models.hippomm import key_frames, nearest, segment

from .. import Case, Source

SOURCE = Source("authors", "linyueqian/HippoMM, hippomm/core/hippocampal_memory.py")


def compare(case: Case):
    s = case.settings
    knobs = {
        "rate": s["rate"],
        "longest": s["longest"],
        "shortest": s["shortest"],
        "alike": s["similar"],
        "silence": s["silence_db"],
        "window": s["window_s"],
    }
    seen, heard, features = case["similar"].numpy(), case["audio"].numpy(), case["features"].numpy()
    keys = key_frames(features, alike=s["key_similar"])
    top, cosines = nearest(case["query"].numpy(), features, top=s["top"])
    found = {
        "segments_both": segment(seen, heard, **knobs),
        "segments_seen": segment(seen, **knobs),
        "segments_heard": segment(None, heard, **knobs),
        "key_frames": keys,
        "top": top,
        "top_similarity": cosines,
    }
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}
