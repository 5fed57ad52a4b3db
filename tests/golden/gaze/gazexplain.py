"""Actions, durations, what words are made from, likenesses and losses; given states stand for the text decoder's."""

import torch

from regard.gaze.gazexplain import (
    GazeXplain,
    GazeXplainConfig,
    action_loss,
    alignment_loss,
    duration_loss,
)

from .. import Case, Source

SOURCE = Source("authors", "chenxy99/GazeXplain, models/gazeformer_explanation_alignment.py and loss.py")
TOLERANCE = {"log_actions": 2e-5, "grad_features": 2e-5}
NAMES = {
    "transformer.encoder.encoder.layers.": "encoder.",
    "transformer.encoder.encoder.norm.": "encoded.",
    "transformer.encoder.input_proj.": "input.",
    "transformer.encoder.img_transform.": "of_picture.",
    "transformer.encoder.text_transform.": "of_task.",
    "transformer.decoder.decoder.layers.": "decoder.",
    "transformer.decoder.decoder.norm.": "decoded.",
    "transformer.decoder.linear.": "joint.",
    "querypos_embed.": "steps.",
    "token_predictor.": "end.",
    "generator_t_mu.": "mean.",
    "generator_t_logvar.": "log_variance.",
    "attention_map_predictor.norm.": "among_norm.",
    "attention_map_predictor.self_attn.": "among.",
    "attention_map_predictor.multihead_attn.": "map.",
    "hidden_state_transform.": "to_words.",
    "visual_projection.0.": "visual.",
    "language_projection.0.": "language.",
    "termination_feature": "termination",
    "fixation_emb": "fixation_kind",
    "task_emb": "task_kind",
}


def _name(name: str) -> str:
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def compare(case: Case):
    settings, weights = case.settings, case.weights
    sizes = ("rows", "columns", "fixations", "heads", "encoder_layers", "decoder_layers")
    leaves = case.leaves("features")
    features, task = leaves["features"], case["task"]
    model = GazeXplain(
        GazeXplainConfig(
            features=features.shape[-1],
            task=task.shape[-1],
            dim=weights["fixation_emb"].shape[-1],
            **{name: settings[name] for name in sizes},
            dropout=settings["dropout"],
        )
    )
    places = weights.pop("patchpos_embed.pos")[:, 0]
    state = {_name(name): value for name, value in weights.items()}
    for name in ("termination", "fixation_kind", "task_kind"):
        state[name] = state[name].flatten()
    state = {name: value for name, value in state.items() if name in model.state_dict()}
    model.load_state_dict(state)
    gazed = model(features, task)
    cells = case["target"].argmax(-1)
    alike = model.alike(features, gazed, cells, case["language_first"])
    action = action_loss(gazed.log_actions, cells, case["action_mask"])
    duration = duration_loss(gazed.log_mean, gazed.log_variance, case["durations"], case["duration_mask"])
    alignment = alignment_loss(alike, case["pair_mask"])
    return {
        "places": (model.places, places),
        "log_actions": gazed.log_actions,
        "log_mean": gazed.log_mean,
        "log_variance_field": gazed.log_variance.exp(),
        "memory_for_words": model.for_words(gazed, task, cells),
        "resnet_visual_similarity": alike.reference,
        "visual_similarity": alike.visual,
        "language_similarity": alike.language,
        "multimodal_similarity": alike.cross,
        "loss_action": action,
        "loss_duration": duration,
        "loss_alignment": alignment,
        **case.gradients(action + duration + torch.sum(alignment), leaves),
    }
