"""The classifiers of the files, with their weights."""

import transformers as t
from torch import nn

from .. import Case
from .._models import loaded


def classifier(case: Case) -> nn.Module:
    settings = case.settings
    labels = {i: str(i) for i in range(settings["labels"])}
    if settings["model"] == "resnet":
        names = ("embedding_size", "hidden_sizes", "depths", "layer_type")
        config = t.ResNetConfig(**{name: settings[name] for name in names}, id2label=labels)
        model: nn.Module = t.ResNetForImageClassification(config)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    else:
        config = t.ViTConfig(
            hidden_size=settings["hidden_size"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["heads"],
            intermediate_size=settings["intermediate"],
            patch_size=settings["patch_size"],
            image_size=settings["image_size"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=labels,
            attn_implementation="eager",
        )
        model = t.ViTForImageClassification(config)
    return loaded(model, case.weights)
