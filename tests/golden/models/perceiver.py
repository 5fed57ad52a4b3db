"""Fourier features; layers are transformers' own."""

from regard.models.perceiver import fourier_features

from .. import Case, Source

SOURCE = Source("reimplementation", "transformers, generate_fourier_features")


def compare(case: Case):
    knobs = {name: case.settings[name] for name in ("bands", "resolution")}
    return {"output": fourier_features(case["positions"], **knobs)}
