"""Public data sets, read from files that you have. Nothing is downloaded, and nothing in a file is run.

| set | loader | licence of the set |
|---|---|---|
| your own fixations: tables, EyeLink's text | `read_gaze` | yours |
| WebQAmGaze: reading, webcam gaze | `webqamgaze` | CC BY 4.0, texts CC BY-SA 4.0 |
| Interiors, hybrid search: scanpaths | `visual_search`, `search_scenes` | MIT |
| POPE: is there a ...? | `pope` | MIT; COCO's pictures have their own |
| VSR: spatial statements | `vsr` | Apache-2.0 |
| XQuAD: questions on paragraphs | `xquad` | CC BY-SA 4.0 |
| true and false statements | `truth_statements` | CC BY 4.0 |
| IOI and greater-than prompts | `ioi_prompts`, `greater_than_prompts` | MIT |
| MNIST, and any IDX file | `mnist`, `idx` | commonly stated as CC BY-SA 3.0 |
| Omniglot: strokes, drawings, one-shot runs | `omniglot_strokes`, `omniglot_drawings`, `omniglot_runs` | MIT |
| BCCD: boxes of blood cells | `bccd` | MIT |
| Free Spoken Digit Dataset | `spoken_digits` | CC BY-SA 4.0 |
| MIT-BIH: electrocardiogram with beats | `mitbih` | ODC-By 1.0 |
| ETT: load and oil temperature | `ett` | CC BY-ND 4.0 |
| Open Bandit: recommendations with propensities | `open_bandit` | Apache-2.0 |
| dissimilarities of 92 objects in brains | `brain_rdms` | MIT |

CSV, JSON and plain text may be gzipped; pictures and sounds may lie in a folder or in a zip. What does not fit its
format raises `DataError`, with file, line and column.
"""

from .bandit import BanditLog, open_bandit
from .brain import BrainRdms, brain_rdms
from .files import DataError, Lazy
from .fixations import GazeData, GazeTrial, LeftOut, read_gaze
from .gaze import Reading, Scanpath, SearchScene, SearchTrial, search_scenes, visual_search, webqamgaze
from .language import (
    PopeQuestion,
    SpanQuestion,
    SpatialStatement,
    Statement,
    greater_than_prompts,
    ioi_prompts,
    pope,
    truth_statements,
    vsr,
    xquad,
)
from .pictures import (
    Cells,
    Drawing,
    Mnist,
    OneShotRun,
    Strokes,
    bccd,
    idx,
    mnist,
    omniglot_drawings,
    omniglot_runs,
    omniglot_strokes,
)
from .series import Ecg, Series, SpokenDigit, ett, mitbih, spoken_digits

__all__ = [
    "BanditLog",
    "BrainRdms",
    "Cells",
    "DataError",
    "Drawing",
    "Ecg",
    "GazeData",
    "GazeTrial",
    "Lazy",
    "LeftOut",
    "Mnist",
    "OneShotRun",
    "PopeQuestion",
    "Reading",
    "Scanpath",
    "SearchScene",
    "SearchTrial",
    "Series",
    "SpanQuestion",
    "SpatialStatement",
    "SpokenDigit",
    "Statement",
    "Strokes",
    "bccd",
    "brain_rdms",
    "ett",
    "greater_than_prompts",
    "idx",
    "ioi_prompts",
    "mitbih",
    "mnist",
    "omniglot_drawings",
    "omniglot_runs",
    "omniglot_strokes",
    "open_bandit",
    "pope",
    "read_gaze",
    "search_scenes",
    "spoken_digits",
    "truth_statements",
    "visual_search",
    "vsr",
    "webqamgaze",
    "xquad",
]
