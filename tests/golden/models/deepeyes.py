"""Rewards of trajectories, advantages of tokens, and boxes that the tool takes."""

import torch

from regard.models.deepeyes import LONGEST, clipped, group_advantages, reward

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "Visual-Agent/DeepEyes, vl_agent.py, core_algos.py and visual_toolbox_v2.py")


def compare(case: Case):
    settings, mask = case.settings, case["response_mask"]
    if settings["answer_limit"] != LONGEST:
        raise Unmapped(f"answers of up to {settings['answer_limit']} characters")
    judged = case["judged"].tolist()
    rewards = [
        reward(text, "", judge=lambda said, truth, right=right: float(right))
        for text, right in zip(settings["texts"], judged, strict=True)
    ]
    advantage = group_advantages(case["token_reward"].sum(-1), case["group"])[:, None] * mask
    boxes = [clipped(box, tuple(settings["picture"])) or (-1,) * 4 for box in case["boxes"].tolist()]
    return {
        "reward": torch.tensor(rewards, dtype=torch.float64),
        "advantage": advantage,
        "crop": torch.tensor(boxes),
    }
