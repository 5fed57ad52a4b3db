"""Views, targets as they are judged, and what came of each action."""

import json

import torch

from regard.gaze.humanoid_search import Episode, HeadSearch, panorama_view

from .. import Case, Source

SOURCE = Source("authors", "humanoid-vstar/hstar, vagen/env/hstar/env.py")
TOLERANCE = {"views": 1e-4}


def compare(case: Case):
    settings = case.settings
    panorama = case["panorama"].permute(2, 0, 1)
    size = tuple(case["views"].shape[1:3])
    yaw, pitch = case["angles"].T
    views = panorama_view(panorama, yaw, pitch, size=size, fov=settings["fov"])
    given = settings["episodes"]
    boxes, steps = [], []
    for annotation, actions in json.loads(given) if isinstance(given, str) else given:
        episode = Episode(
            panorama,
            annotation["task"],
            tuple(annotation["yaw"]),
            tuple(annotation["pitch"]) if "pitch" in annotation else None,
            annotation["start_yaw"],
            annotation["level"],
        )
        search = HeadSearch(
            episode,
            size=(2, 2),
            success=settings["sr"],
            failure=settings["fp"],
            effective=settings["ew"],
            ineffective=settings["iw"],
            yaw_tolerance=settings["yt"],
            pitch_tolerance=settings["pt"],
            as_code=True,
        )
        boxes.append(search.box)
        came = []
        for action in actions:
            _, reward, done, info = search.step(action)
            came.append([search.yaw, search.pitch, reward, float(done), float(info["success"])])
        steps.append(came)
    theirs = settings["steps"]
    theirs = json.loads(theirs) if isinstance(theirs, str) else theirs
    flat = [torch.tensor([row for came in of for row in came], dtype=torch.float64) for of in (steps, theirs)]
    left, right, bottom, top = torch.tensor(boxes, dtype=torch.float64).T
    return {
        "views": views.permute(0, 2, 3, 1),
        "targets": torch.stack([left, right, bottom, top], 1),
        "steps": (flat[0], flat[1]),
    }
