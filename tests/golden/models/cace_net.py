"""Guidance both ways and one way, with gradients of sight and sound."""

from regard.models.cace_net import CoGuidance

from .. import Case, Source

SOURCE = Source("authors", "Brain-Cog-Lab/CACE-Net, CACE/model/models.py")
NAMES = {
    "affine_audio_1": "sound_channels",
    "affine_video_1": "sight_channels",
    "affine_bottleneck": "narrow",
    "affine_v_c_att": "wide",
    "affine_video_2": "sight_places",
    "affine_audio_2": "sound_places",
    "affine_v_s_att": "place",
    "affine_video_ave": "whole",
    "affine_video_3": "part",
    "ave_v_att": "own_place",
    "v_norm": "sight_norm",
    "a_norm": "sound_norm",
    "v_query": "guide.query",
    "vaudio_key": "guide.key",
    "vaudio_value": "guide.value",
    **{f"audio_{part}": f"sounds.{part}" for part in ("query", "key", "value")},
    **{f"video_{part}": f"sights.0.{part}" for part in ("query", "key", "value")},
    **{f"video_{part}2": f"sights.1.{part}" for part in ("query", "key", "value")},
}


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("video", "audio")
    model = CoGuidance(
        leaves["video"].shape[-1],
        leaves["audio"].shape[-1],
        hidden=settings["hidden"],
        psi=settings["psai"],
        beta=settings["beta"],
        latent=leaves["video"].shape[-1] // settings["latent"],
    ).eval()
    state = {}
    for name, value in case.weights.items():
        module, _, kind = name.rpartition(".")
        state[f"{NAMES[module]}.{kind}"] = value
    model.load_state_dict(state)
    seen, heard, _ = model(leaves["video"], leaves["audio"])
    found = case.gradients(seen.square().sum() + heard.square().sum(), leaves)
    return {"output_video": seen, "output_audio": heard, **found}
