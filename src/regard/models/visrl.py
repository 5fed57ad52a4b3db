"""Where to look, learned from preferences between whole chains: a box, its crop, an answer.

Chen et al., VisRL: Intention-Driven Visual Perception via Reinforced Reasoning (arXiv:2503.07523); how pairs are made
and kept is that of the authors' code (zhangquanchen/VisRL, data_gen), the loss is direct preference optimisation at
each step of a chain. For every question there are three attempts, each of two chains; the second one's box is drawn
anew where it overlaps the first one's. A judge scores answers and crops. Of the chains of a question the best and the
worst are kept, where they are good and bad enough, and boxes and answers are preferred one by one.

No annotated box is used here. The paper's model has had 30,000 of them, in a supervised warm-up, before.

The loss, the thresholds and the boxes that are drawn anew are exact. The authors measure overlap in a picture padded to
a square, which moves both boxes alike and changes nothing; it is left out. Two forms: `LookThenAnswer` chooses one of
the places of a grid, for training from scratch; `look` and `spoken` are for vision-language models of transformers,
on `regard.models.deepeyes`. Low-rank adapters, the judge and the loop over data are left to who trains.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ._boxes import area, iou
from .deepeyes import Trajectory, Turn, likelihood, rollout

Box = tuple[float, float, float, float]  # left, top, right, bottom, in shares of the picture
Step = Literal["box", "answer"]
PROMPT = (
    "Please first provide the bounding box coordinate of the region, then refer to the corresponding sub-image to "
    "answer the question better."
)
SPREAD, OFTEN = 0.1, 20  # sizes are let differ by so much more, ahead of every so manieth try


class Kept(NamedTuple):
    """Which chains of each question are a pair. [question]"""

    chosen: Tensor
    rejected: Tensor
    there: Tensor  # boolean; where False, the other two mean nothing


def preference_pairs(answers: Tensor, crops: Tensor, *, high: float = 0.8, low: float = 0.2) -> Kept:
    """The best and the worst chain of each question, where they are good and bad enough.

    answers, crops: the judge's scores [question, chain], 0 to 1, NaN where it gave none. The first chain whose answer
    has the highest score, and whose crop has `high` or more, is chosen; the first whose answer has the lowest, and
    whose crop has `low` or less, is rejected. The highest has to be `high` or more, the lowest `low` or less.

    >>> import torch
    >>> from regard.models.visrl import preference_pairs
    >>> preference_pairs(torch.tensor([[0.0, 0.9, 0.9]]), torch.tensor([[0.1, 0.5, 0.8]]))
    Kept(chosen=tensor([2]), rejected=tensor([0]), there=tensor([True]))
    """
    if answers.shape != crops.shape or answers.ndim != 2 or not answers.shape[1]:
        raise ValueError(
            f"preference_pairs: scores of answers and crops are [question, chain], of one chain or more; got "
            f"{list(answers.shape)} and {list(crops.shape)}"
        )
    judged = ~(answers.isnan() | crops.isnan())
    if any(((of < 0) | (of > 1)).any() for of in (answers, crops)):
        raise ValueError("preference_pairs: scores are 0 to 1, or NaN where there is none; bring the judge's to that")
    answers = answers.to(torch.promote_types(answers.dtype, torch.float32))
    best = answers.masked_fill(~judged, -torch.inf).amax(1, keepdim=True)
    worst = answers.masked_fill(~judged, torch.inf).amin(1, keepdim=True)
    good, bad = judged & (answers == best) & (crops >= high), judged & (answers == worst) & (crops <= low)
    enough = ((best >= high) & (worst <= low) & (best > worst))[:, 0]
    return Kept(good.int().argmax(1), bad.int().argmax(1), enough & good.any(1) & bad.any(1))


def bad_box(
    good: Sequence[float],
    drawn: Sequence[float],
    draws: np.random.Generator,
    *,
    most: float = 0.05,
    spread: float = 0.3,
    tries: int = 100,
) -> Box:
    """The box of a chain that is to be worse: the drawn one, or another where it overlaps the good one too much.

    good, drawn: in shares of the picture; most: intersection over union up to which the drawn one is kept; spread: by
    which share sides of the other differ from the good one's at most, 0.1 more for every 20 tries. The other shares no
    point with the good one. ValueError where a box has no area, or none was found.

    >>> import numpy as np
    >>> from regard.models.visrl import bad_box
    >>> bad_box((0, 0, 0.5, 0.5), (0.6, 0.6, 1, 1), np.random.default_rng(0))
    (0.6, 0.6, 1.0, 1.0)
    """
    four = len(good) == len(drawn) == 4
    both = torch.tensor([list(good), list(drawn)] if four else [[0.0] * 4], dtype=torch.float64)
    if not (area(both) > 0).all() or not both.isfinite().all():
        raise ValueError(f"bad_box: boxes are left, top, right, bottom, with an area; got {good} and {drawn}")
    if float(iou(both[:1], both[1:])) <= most:
        return _box(drawn)
    left, top, right, bottom = good
    for i in range(tries):
        spread += SPREAD * (i % OFTEN == 0)
        wide, high = (side * draws.uniform(max(1 - spread, 0.0), 1 + spread) for side in (right - left, bottom - top))
        if not (0 < wide <= 1 and 0 < high <= 1):
            continue
        x, y = draws.uniform(0, 1 - wide), draws.uniform(0, 1 - high)
        if x + wide <= left or x >= right or y + high <= top or y >= bottom:
            return _box((x, y, x + wide, y + high))
    raise ValueError(f"bad_box: in {tries} tries, no box of about the size of {good} was found beside it")


def dpo(chosen: Tensor, rejected: Tensor, chosen_start: Tensor, rejected_start: Tensor, *, beta: float = 0.1) -> Tensor:
    """-log sigmoid of beta times how much more the chosen gained on its start than the rejected; ln 2 at the start.

    All are log-probabilities, summed over tokens, of the model and of the model as this phase found it. [pair]

    >>> import torch
    >>> from regard.models.visrl import dpo
    >>> dpo(*torch.tensor([[-1.0], [-3.0], [-2.0], [-2.0]]))
    tensor([0.5981])
    """
    if beta <= 0:
        raise ValueError(f"dpo: beta is above 0, otherwise nothing is learned; got {beta}")
    return -F.logsigmoid(beta * ((chosen - chosen_start) - (rejected - rejected_start)))


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of a `BoxPolicy`."""

    questions: int  # how many there are
    channels: int = 3
    side: int = 8  # places in a row, and in a column
    crop: float = 0.25  # side of a crop, of the picture's
    patch: int = 2  # pixels of the view that a place is seen in
    dim: int = 32
    heads: int = 4
    layers: int = 2


class BoxPolicy(nn.Module, PyTorchModelHubMixin):
    """Scores of the places that one could look at, for a picture seen small, and a question. [batch, place]

    The picture is averaged to side * patch pixels; a place is the box around a patch, moved inside. `regard.record`
    sees the encoder's self attention, over patches row by row and the question after them.

    >>> import torch
    >>> from regard.models.visrl import BoxPolicy, PolicyConfig
    >>> policy = BoxPolicy(PolicyConfig(questions=5))
    >>> policy(torch.rand(2, 3, 64, 64), torch.tensor([0, 4])).shape, policy.places[0].tolist()
    (torch.Size([2, 64]), [0.0, 0.0, 0.25, 0.25])
    """

    places: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = c = config
        if min(c.questions, c.side, c.patch, c.layers, c.heads) < 1 or not 0 < c.crop <= 1 or c.dim % c.heads:
            raise ValueError(f"BoxPolicy: sizes are 1 or more, crop above 0 to 1, heads divide dim; got {c}")
        self.see = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.question, self.at = nn.Embedding(c.questions, c.dim), nn.Parameter(0.02 * torch.randn(c.side**2, c.dim))
        layer = nn.TransformerEncoderLayer(c.dim, c.heads, 2 * c.dim, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, c.layers, enable_nested_tensor=False)
        self.score = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, 1))
        lows = (((torch.arange(c.side) + 0.5) / c.side) - c.crop / 2).clamp(0, 1 - c.crop)
        y, x = torch.meshgrid(lows, lows, indexing="ij")
        self.register_buffer("places", torch.stack([x, y, x + c.crop, y + c.crop], -1).flatten(0, 1), persistent=False)

    def forward(self, pictures: Tensor, questions: Tensor) -> Tensor:
        """pictures [batch, channel, row, column]; questions: numbers [batch]. ValueError for other shapes."""
        c = self.config
        if pictures.ndim != 4 or pictures.shape[1] != c.channels or questions.shape != pictures.shape[:1]:
            raise ValueError(
                f"BoxPolicy: pictures are [batch, {c.channels}, row, column], questions [batch]; got "
                f"{list(pictures.shape)} and {list(questions.shape)}"
            )
        if ((questions < 0) | (questions >= c.questions)).any():
            raise ValueError(f"BoxPolicy: questions are 0 to {c.questions - 1}; got {questions.tolist()}")
        patches = self.see(F.adaptive_avg_pool2d(pictures, c.side * c.patch)).flatten(2).mT + self.at
        tokens = torch.cat([patches, self.question(questions)[:, None]], 1)
        return self.score(self.encoder(tokens)[:, :-1])[..., 0]


class Looked(NamedTuple):
    """What a chain comes to, with the likeliest box."""

    place: Tensor  # [batch]
    crops: Tensor  # [batch, channel, row, column]
    answers: Tensor  # logits [batch, answer]


class LookThenAnswer(nn.Module):
    """A policy that says where to look, and a reader that answers with the crop beside the picture.

    policy: (pictures, questions) -> logits of `policy.places`; reader: (pictures, crops, questions) -> logits of
    answers; size: pixels of a crop's side. Any two modules will do; keep each by its own means.
    """

    def __init__(self, policy: BoxPolicy | Any, reader: nn.Module, *, size: int) -> None:
        super().__init__()
        self.policy, self.reader, self.size = policy, reader, size

    def forward(self, pictures: Tensor, questions: Tensor) -> Looked:
        place = self.policy(pictures, questions).argmax(-1)
        crops = self.cropped(pictures, place)
        return Looked(place, crops, self.reader(pictures, crops, questions))

    def cropped(self, pictures: Tensor, place: Tensor) -> Tensor:
        """[batch, channel, size, size], of places [batch]"""
        return crop(pictures, self.policy.places[place], self.size)

    def log_probabilities(
        self, step: Step, pictures: Tensor, questions: Tensor, chains: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Of each chain's place, or of what it answered after a look there. chains: places and answers; [batch] each"""
        if step == "box":
            all_logits = [self.policy(pictures, questions)] * len(chains)
        else:
            all_logits = [self.reader(pictures, self.cropped(pictures, place), questions) for place, _ in chains]
        taken = [place if step == "box" else said for place, said in chains]
        return [
            logits.log_softmax(-1).gather(-1, of[:, None])[:, 0] for logits, of in zip(all_logits, taken, strict=True)
        ]

    @torch.no_grad()
    def attempts(
        self,
        pictures: Tensor,
        questions: Tensor,
        *,
        tries: int = 3,
        temperature: float = 2.0,
        most: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Chains to be judged: places and answers, two for each try, the second of which looks elsewhere.

        Where the second place overlaps the first one's by more than `most`, it is one of those that share no point with
        it; as all places are as large, none else differs. [question, 2 * tries] twice. ValueError where each place
        overlaps every other.
        """
        places = self.policy.places
        apart = iou(places, places)
        if tries < 1 or temperature <= 0 or not (apart == 0).any(1).all():
            raise ValueError(
                f"attempts: tries are 1 or more, temperature above 0, and some place lies apart from each; got "
                f"{tries=}, {temperature=}"
            )
        chances = (self.policy(pictures, questions) / temperature).softmax(-1)
        drawn = torch.multinomial(chances, 2 * tries, replacement=True, generator=generator).view(-1, tries, 2)
        good, bad = drawn.unbind(-1)
        others = (apart[good] == 0).double().flatten(0, 1)
        other = torch.multinomial(others, 1, generator=generator).view_as(bad)
        bad = torch.where(apart[good, bad] > most, other, bad)
        place, said = torch.stack([good, bad], -1).flatten(1), []
        for of in place.T:
            logits = self.reader(pictures, self.cropped(pictures, of), questions)
            said.append(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        return place, torch.cat(said, 1)


class Pairs(NamedTuple):
    """Preferences, as a `LookThenAnswer` has them. Places and answers: [pair]"""

    pictures: Tensor
    questions: Tensor
    chosen: tuple[Tensor, Tensor]  # place, answer
    rejected: tuple[Tensor, Tensor]


def step_dpo(
    model: LookThenAnswer,
    start: LookThenAnswer,
    pairs: Pairs,
    *,
    beta: float = 0.1,
    steps: Sequence[Step] = ("box", "answer"),
) -> Tensor:
    """`dpo` of each step, to be made small: the mean over pairs and steps. The paper's first stage has "box" alone.

    start: the model as this phase found it, which gets no gradient. ValueError for no pair, for pairs of equal chains,
    and for other steps.
    """
    if not steps or not set(steps) <= {"box", "answer"}:
        raise ValueError(f'step_dpo: steps are "box", "answer" or both; got {steps!r}')
    if not len(pairs.questions):
        raise ValueError("step_dpo: there is no pair to learn from; draw more chains, or lower `high` of their judging")
    if (torch.stack(pairs.chosen) == torch.stack(pairs.rejected)).all(0).any():
        raise ValueError("step_dpo: a pair's chosen and rejected chains are the same; leave it out")
    losses = []
    for step in steps:
        asked = step, pairs.pictures, pairs.questions, (pairs.chosen, pairs.rejected)
        with torch.no_grad():
            before = start.log_probabilities(*asked)
        now = model.log_probabilities(*asked)
        losses.append(dpo(*now, *before, beta=beta).mean())
    return torch.stack(losses).mean()


def crop(pictures: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What is in each picture's box, bilinear. [batch, channel, row, column] -> [batch, channel, size, size]

    boxes: [batch, 4], in shares of the picture. Exact where a box has `size` whole pixels. ValueError for boxes without
    area.
    """
    if boxes.shape != (len(pictures), 4) or not (area(boxes) > 0).all():
        raise ValueError(f"crop: takes a box with an area for each of {len(pictures)} pictures; got {boxes}")
    if not len(pictures):
        return pictures.new_empty(0, pictures.shape[1], size, size)
    middle, half = boxes[:, :2] + boxes[:, 2:] - 1, boxes[:, 2:] - boxes[:, :2]
    theta = torch.cat([torch.diag_embed(half), middle[..., None]], -1).to(pictures)
    grid = F.affine_grid(theta, [len(pictures), pictures.shape[1], size, size], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def written_box(text: str) -> Box | None:
    """The first four numbers in brackets, or None where there are none, or they are no box in a picture.

    >>> from regard.models.visrl import written_box
    >>> written_box("[0.1, 0.2, 0.5, 0.9]"), written_box("[0.5, 0.2, 0.1, 0.9]")
    ((0.1, 0.2, 0.5, 0.9), None)
    """
    number = r"\s*(\d*\.?\d+)\s*"
    found = re.search(rf"\[{number},{number},{number},{number}\]", text)
    if found is None:
        return None
    left, top, right, bottom = _box([float(x) for x in found.groups()])
    return (left, top, right, bottom) if left < right <= 1 and top < bottom <= 1 else None


def look(model: nn.Module, processor: Any, picture: Image.Image, question: str, **knobs: Any) -> Trajectory:
    """A chain of a vision-language model of transformers: a box in words, the crop, an answer; without a box, one turn.

    `knobs` are those of `deepeyes.rollout`, such as `length` and, to draw chains, `do_sample=True, temperature=2.0`.
    """

    def asked(text: str) -> list[float] | None:
        box = written_box(text)
        return None if box is None else [x * side for x, side in zip(box, picture.size * 2, strict=True)]

    knobs = {"prompt": PROMPT, "again": question, "least": 1, **knobs}
    return rollout(model, processor, picture, question, turns=2, asked=asked, **knobs)


def spoken(model: nn.Module, turns: Sequence[Turn]) -> Tensor:
    """Log-probability of what was said in each turn, summed over its tokens, for `dpo`. [turn]"""
    return torch.stack([likelihood(model, turn).sum() for turn in turns])


def visrl(reader: nn.Module, *, questions: int, size: int, **sizes: Any) -> LookThenAnswer:
    """An untrained policy before this reader. size: pixels of a crop's side; sizes: other fields of `PolicyConfig`.

    >>> import torch
    >>> from torch import nn
    >>> from regard.models.visrl import visrl
    >>> class Reader(nn.Module):
    ...     def forward(self, pictures, crops, questions):
    ...         return crops.mean((2, 3))
    >>> visrl(Reader(), questions=2, size=16)(torch.rand(3, 3, 64, 64), torch.tensor([0, 1, 1])).answers.shape
    torch.Size([3, 3])
    """
    return LookThenAnswer(BoxPolicy(PolicyConfig(questions, **sizes)), reader, size=size)


def _box(numbers: Sequence[float]) -> Box:
    left, top, right, bottom = (float(x) for x in numbers)
    return left, top, right, bottom
