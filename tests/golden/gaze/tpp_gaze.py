"""Densities of places and durations, given the state that they are made from."""

from torch import nn

from regard.gaze.tpp_gaze import TPPGaze, TPPGazeConfig

from .. import Case, Source

SOURCE = Source("authors", "phuselab/tppgaze, MixtureSameFamilyModule and LogNormalMixture")
FIELDS = ("hidden", "place_components", "duration_components", "log_mean", "log_std")


class _Given(TPPGaze):
    def _context(self, places, durations, scene):
        return self.given


def compare(case: Case):
    model = _Given(TPPGazeConfig(**{name: case.settings[name] for name in FIELDS})).eval()
    for name in ("place", "duration"):
        layer: nn.Linear = getattr(model, name)
        layer.load_state_dict({"weight": case[f"weight.{name}"], "bias": case[f"bias.{name}"]})
    model.given = case["context"]
    places, durations = case["places"], case["durations"]
    place, duration = model(places, durations)
    found = {"log_prob_place": place.log_prob(places), "log_prob_duration": duration.log_prob(durations)}
    for name in case.arrays:
        if name.startswith("log_prob_place_temperature_"):
            warm, _ = model(places, durations, temperature=float(name.rpartition("_")[2]))
            found[name] = warm.log_prob(places)
    return found
