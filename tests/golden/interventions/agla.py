"""Which pixels stay. The picture is as large as `keep` is."""

import numpy as np
import pytest

from regard.interventions.agla import kept

from .. import Case, Source

SOURCE = Source("authors", "Lackel/AGLA, eval/augmentation.py, with getAttMap of LAVIS")


def compare(case: Case):
    pytest.importorskip("scipy")
    side = case.settings["size"]
    stays = kept(case["relevance"].numpy(), case.settings["itc"], (side, side), blur=case.settings["blur"] / side)
    return {"keep": stays.astype(np.uint8)}
