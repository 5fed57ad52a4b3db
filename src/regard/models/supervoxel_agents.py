"""Volumes segmented with a person: every voxel an agent that nudges its own probability after each round of clicks.

Boundary-aware Supervoxel-level Iteratively Refined Interactive 3D Image Segmentation with Multi-agent Reinforcement
Learning (arXiv:2303.10692). The state is the volume, the probabilities so far and two maps of hints; an action is one
of a few changes of a voxel's probability; a click marks the whole supervoxel that it lies in; a voxel's reward is how
much its cross entropy falls, and more near the boundary.

No code of the authors is at hand. Written from the abstract and from notes on the paper and its forerunner
(arXiv:1911.10334), and not checked against the text: the changes, six clicks a round, the weight of a voxel at a
distance d of the boundary, 1 + weight * exp(-d^2 / (2 * reach^2)), sizes of the network and the rates of the loss.
Rounds are few, so returns are whole and the loss is taken over an episode at once, where the paper's workers are
asynchronous (A3C). Supervoxels are SLIC's, without its last pass that joins what is not connected. There is no
attention here, so `regard.record` has nothing to read: what is attended is what the person marks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..extras import needs

CHANGES = -0.4, -0.2, -0.1, 0.1, 0.2, 0.4
KINDS = "relative", "absolute"
User = Callable[[Tensor], Sequence[Tensor]]


def supervoxels(volumes: Tensor, size: int = 4, *, compactness: float = 0.3, rounds: int = 5) -> Tensor:
    """Number of the supervoxel that each voxel is of, by SLIC in three dimensions. The same shape, integers

    volumes: [batch, depth, row, column]; size: voxels between the middles of neighbours, at first; compactness: the
    grey that weighs as much as that distance. A voxel stays with one of the 27 supervoxels whose first cells touch its
    own. ValueError for a size below 1, and for volumes of another shape.

    >>> import torch
    >>> supervoxels(torch.zeros(1, 2, 2, 4), 2).tolist()
    [[[[0, 0, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 0, 1, 1]]]]
    """
    if volumes.ndim != 4 or size < 1 or rounds < 1 or not compactness > 0:
        raise ValueError(
            f"supervoxels: volumes are [batch, depth, row, column], size and rounds 1 or more, compactness above 0; "
            f"got {list(volumes.shape)}, {size}, {rounds}, {compactness}"
        )
    if not volumes.isfinite().all():
        raise ValueError("supervoxels: volumes hold values that are not finite")
    shape, device = volumes.shape[1:], volumes.device
    cells = [-(-n // size) for n in shape]
    places = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij"), -1)
    places = places.flatten(0, 2)  # [voxel, 3]
    near = torch.cartesian_prod(*[torch.arange(-1, 2, device=device)] * 3)
    cell = places[:, None] // size + near  # [voxel, 27, 3]
    there = ((cell >= 0) & (cell < torch.tensor(cells, device=device))).all(-1)
    number = (cell[..., 0] * cells[1] + cell[..., 1]) * cells[2] + cell[..., 2]
    number, own = number.where(there, 0), number[:, 13]
    count, features = cells[0] * cells[1] * cells[2], volumes.float().flatten(1)[..., None] / compactness
    features = torch.cat([features, (places / size).expand(len(volumes), -1, -1)], -1)  # [batch, voxel, 4]
    labels = own.expand(len(volumes), -1)
    for _ in range(rounds):
        index = labels[..., None].expand_as(features)
        middles = features.new_zeros(len(volumes), count, 4).scatter_reduce(
            1, index, features, "mean", include_self=False
        )
        away = (middles[:, number] - features[:, :, None]).square().sum(-1).masked_fill(~there, torch.inf)
        filled = torch.zeros_like(labels[:, :1]).expand(-1, count).scatter(1, labels, 1)
        away = away.masked_fill(filled[:, number] == 0, torch.inf)  # one that lost its voxels has no middle
        labels = number.expand(len(volumes), -1, -1).gather(2, away.argmin(-1, keepdim=True))[..., 0]
    return labels.view_as(volumes)


def simulated_clicks(probabilities: Tensor, truth: Tensor, count: int = 6) -> list[Tensor]:
    """Clicks on the largest wrong regions: depth, row, column, and whether it belongs there. [click, 4] of each volume

    probabilities, truth (0 or 1): [batch, depth, row, column]. A region is connected by faces and wrong in one way; its
    click is where it is farthest from its border. Fewer where fewer are wrong. Needs SciPy.
    """
    _alike(probabilities, truth, "simulated_clicks")
    with needs("simulated clicks", "claims"):
        from scipy import ndimage
    found = []
    for said, true in zip(probabilities.detach().cpu() > 0.5, truth.cpu() > 0.5, strict=True):
        regions = []
        for belongs in (True, False):
            labelled: Any = ndimage.label(((said != true) & (true == belongs)).numpy())
            numbered, several = labelled
            regions += [(int((numbered == i).sum()), belongs, numbered == i) for i in range(1, several + 1)]
        regions.sort(key=lambda region: -region[0])
        clicks = []
        for _, belongs, region in regions[:count]:
            deep = torch.from_numpy(ndimage.distance_transform_edt(F.pad(torch.from_numpy(region), [1] * 6).numpy()))
            at = torch.unravel_index(deep.argmax(), deep.shape)
            clicks.append([*(int(i) - 1 for i in at), int(belongs)])
        found.append(torch.tensor(clicks, dtype=torch.long).view(-1, 4))
    return found


def boundary_weights(truth: Tensor, *, reach: float = 2.0) -> Tensor:
    """1 at the true boundary, less with the distance from it, 0 where nothing is. [batch, depth, row, column]

    A voxel on either side of the boundary is half a voxel away. Needs SciPy.
    """
    if truth.ndim != 4 or not reach > 0:
        raise ValueError(
            f"boundary_weights: truth is [batch, depth, row, column], reach above 0; got {list(truth.shape)}, {reach}"
        )
    with needs("boundary weights", "claims"):
        from scipy import ndimage
    found = torch.zeros(truth.shape)
    for weights, true in zip(found, truth.cpu() > 0.5, strict=True):
        if true.any() and not true.all():
            away: Any = [ndimage.distance_transform_edt(side.numpy()) for side in (true, ~true)]
            weights[:] = (-(torch.from_numpy(away[0] + away[1]) - 0.5).square() / (2 * reach**2)).exp()
    return found.to(truth.device)


def rewards(
    before: Tensor,
    after: Tensor,
    truth: Tensor,
    boundary: Tensor | None = None,
    *,
    weight: float = 1.0,
    kind: str = "relative",
) -> Tensor:
    """What each voxel wins by a round, in nats: how much its cross entropy fell. As the probabilities

    boundary: of `boundary_weights`, or None for the same everywhere; kind: "absolute" is the ablation, minus the cross
    entropy after the round. Probabilities are kept 1e-6 away from 0 and 1. ValueError for unequal shapes.

    >>> import torch
    >>> rewards(torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.9]), torch.tensor([1.0, 0.0]))
    tensor([ 0.5878, -1.6094])
    """
    _alike(before, truth, "rewards")
    _alike(after, truth, "rewards")
    if boundary is not None:
        _alike(boundary, truth, "rewards")
    if not all(((of >= 0) & (of <= 1)).all() for of in (before, after, truth)):
        raise ValueError("rewards: probabilities and what is true are from 0 to 1")
    if kind not in KINDS:
        raise ValueError(f"rewards: kind is one of {', '.join(KINDS)}; got {kind!r}")
    first, last = (
        F.binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), truth.to(p), reduction="none") for p in (before, after)
    )
    won = first - last if kind == "relative" else -last
    return won if boundary is None else won * (1 + weight * boundary)


class VoxelAgents(nn.Module, PyTorchModelHubMixin):
    """Agents that share one network: what each is inclined to do, and what it expects to win.

    width: channels; dilations: of the convolutions of the trunk, 3 x 3 x 3 voxels each, the only way in which
    neighbours tell one another anything; changes: of the probability, one for each action. Saved and loaded as on the
    hub. ValueError for no layer or no change.

    >>> import torch
    >>> from regard.models.supervoxel_agents import supervoxel_agents
    >>> logits, value = supervoxel_agents(width=4)(torch.rand(2, 4, 3, 8, 8))
    >>> logits.shape, value.shape
    (torch.Size([2, 6, 3, 8, 8]), torch.Size([2, 3, 8, 8]))
    """

    def __init__(
        self, *, width: int = 32, dilations: Sequence[int] = (1, 2, 4, 2, 1), changes: Sequence[float] = CHANGES
    ) -> None:
        super().__init__()
        if not dilations or not changes or width < 1:
            raise ValueError(f"VoxelAgents: one layer, channel and change or more; got {dilations}, {width}, {changes}")
        sizes = [4, *[width] * len(dilations)]
        self.trunk = nn.ModuleList(
            nn.Conv3d(a, b, 3, padding=far, dilation=far)
            for (a, b), far in zip(pairwise(sizes), dilations, strict=True)
        )
        self.policy, self.value = nn.Conv3d(width, len(changes), 1), nn.Conv3d(width, 1, 1)
        self.changes = tuple(changes)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state: volume, probabilities and hints for and against [batch, 4, depth, row, column].

        -> logits of actions [batch, action, depth, row, column], values [batch, depth, row, column]
        """
        if state.ndim != 5 or state.shape[1] != 4:
            raise ValueError(f"VoxelAgents: a state is [batch, 4, depth, row, column]; got {list(state.shape)}")
        for layer in self.trunk:
            state = layer(state).relu()
        return self.policy(state), self.value(state)[:, 0]

    def moved(self, probabilities: Tensor, actions: Tensor) -> Tensor:
        """Probabilities after these actions, kept from 0 to 1. Both [batch, depth, row, column]"""
        return (probabilities + probabilities.new_tensor(self.changes)[actions]).clamp(0, 1)


def marked(hints: Tensor, regions: Tensor, clicks: Sequence[Tensor]) -> Tensor:
    """Hints for and against, with the supervoxels of these clicks; the last click counts where two disagree.

    hints: [batch, 2, depth, row, column], and so is what comes back; regions: of `supervoxels`; clicks: as of
    `simulated_clicks`. ValueError for a click outside.
    """
    hints = hints.clone()
    if len(clicks) != len(hints):
        raise ValueError(f"clicks: a list of them for each of {len(hints)} volumes; got {len(clicks)}")
    for into, region, own in zip(hints, regions, clicks, strict=True):
        for *at, belongs in own.tolist():
            if any(not 0 <= i < n for i, n in zip(at, region.shape, strict=True)) or belongs not in (0, 1):
                raise ValueError(f"clicks: {[*at, belongs]} is no place in {list(region.shape)} with a 0 or 1")
            there = region == region[tuple(at)]
            into[:, there] = torch.tensor([[belongs], [1 - belongs]]).to(into)
    return hints


def refine(
    model: VoxelAgents,
    volumes: Tensor,
    coarse: Tensor,
    user: User,
    *,
    rounds: int = 4,
    regions: Tensor | None = None,
    size: int = 4,
) -> list[Tensor]:
    """Probabilities at first and after each round: a person marks errors, and each voxel does what is likeliest.

    volumes, coarse (probabilities): [batch, depth, row, column]; user: probabilities to clicks, as `simulated_clicks`
    gives them, with what is true known to it alone; regions: of `supervoxels`, made with this `size` unless given.
    """
    regions = _started(volumes, coarse, regions, size)
    hints, found = volumes.new_zeros(len(volumes), 2, *volumes.shape[1:]), [coarse]
    with torch.no_grad():
        for _ in range(rounds):
            hints = marked(hints, regions, user(found[-1]))
            logits, _ = model(_state(volumes, found[-1], hints))
            found.append(model.moved(found[-1], logits.argmax(1)))
    return found


def episode_loss(
    model: VoxelAgents,
    volumes: Tensor,
    coarse: Tensor,
    truth: Tensor,
    user: User,
    *,
    rounds: int = 4,
    regions: Tensor | None = None,
    size: int = 4,
    gamma: float = 0.95,
    kind: str = "relative",
    boundary: Tensor | None = None,
    weight: float = 1.0,
    entropy: float = 0.3,
    critic: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loss of actor and critic over one episode with actions drawn at random; a scalar, means over voxels and rounds.

    gamma: discount of later rounds; kind, boundary, weight: of `rewards`; entropy: of its bonus, in nats of reward,
    without enough of which all agents soon do the same; critic: of the squared error of values, which are baselines
    that the policy's gradient does not change.
    """
    _alike(coarse, truth, "episode_loss")
    if rounds < 1:
        raise ValueError(f"episode_loss: rounds are 1 or more, got {rounds}")
    regions = _started(volumes, coarse, regions, size)
    hints, now = volumes.new_zeros(len(volumes), 2, *volumes.shape[1:]), coarse
    chosen, values, won, spread = [], [], [], []
    for _ in range(rounds):
        hints = marked(hints, regions, user(now))
        logits, value = model(_state(volumes, now, hints))
        logs = logits.log_softmax(1)
        flat = logs.detach().exp().movedim(1, -1).flatten(0, -2)
        actions = torch.multinomial(flat, 1, generator=generator).view_as(now)
        after = model.moved(now, actions)
        chosen.append(logs.gather(1, actions[:, None])[:, 0])
        values.append(value)
        won.append(rewards(now, after, truth, boundary, weight=weight, kind=kind))
        spread.append(-(logs.exp() * logs).sum(1).mean())
        now = after
    returns = [won[-1]]
    for reward in reversed(won[:-1]):
        returns.append(reward + gamma * returns[-1])
    gains = torch.stack(returns[::-1])
    value = torch.stack(values)
    policy = -(torch.stack(chosen) * (gains - value.detach())).mean()
    return policy + critic * (gains - value).square().mean() - entropy * torch.stack(spread).mean()


def _state(volumes: Tensor, probabilities: Tensor, hints: Tensor) -> Tensor:
    return torch.cat([torch.stack([volumes, probabilities], 1), hints], 1)


def _started(volumes: Tensor, coarse: Tensor, regions: Tensor | None, size: int) -> Tensor:
    _alike(volumes, coarse, "volumes and coarse probabilities")
    if not ((coarse >= 0) & (coarse <= 1)).all():
        raise ValueError("coarse: probabilities are from 0 to 1; give no logits, and nothing that is not a number")
    regions = supervoxels(volumes, size) if regions is None else regions
    _alike(volumes, regions, "volumes and supervoxels")
    return regions


def _alike(one: Tensor, other: Tensor, what: str) -> None:
    if one.shape != other.shape:
        raise ValueError(f"{what}: shapes have to be the same; got {list(one.shape)} and {list(other.shape)}")


def supervoxel_agents(**knobs: Any) -> VoxelAgents:
    """Untrained `VoxelAgents` with these knobs."""
    return VoxelAgents(**knobs)
