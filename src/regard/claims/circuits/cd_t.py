"""Do the parts add up, and is the circuit that they lead to faithful, and found sooner than by path patching?

The planted model answers a question by two heads, one of which gives the other what to copy, and repeats by three, of
which two only tell the next where to look. The reader names the indirect object; other people's names make the
reference, and what ablating a head by its mean costs is the truth: ranks among all heads, of which a handful matters,
would be ranks of noise, and path patching of direct paths alone is another quantity. Path patching as in Wang et al.,
Interpretability in the Wild (arXiv:2211.00593), section 3.1: a head gives its mean over the reference, all others what
they gave before; feed-forward modules follow. For a receiver, what it gives then is put in its place in a second pass.
One sender at a time, as in their code, and as many at a time as contextual decomposition takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import zoo
from ...call import Call
from ...catalog import Finding, Premise
from ...circuits.cd_t import cd_t, circuit, faithfulness
from ...data.prompts import ioi
from ...seam import intervene
from .._asked import Asked, ask
from .._measure import mean, seconds
from .._planted import INDUCTIVE, TELLING, planted, questions, repeats

SCALES = "small", "large"
EXPECTED = (
    "parts add up to the score within 1e-3 of it in both models; in the planted model the most relevant heads are "
    "those "
    "that answer a question, and those that repeat, also the ones that only tell where to look; the reader's circuit "
    "has at most half of the 48 heads, a faithfulness of 0.8 or more on other prompts, more than each of 20 random "
    "circuits of its size; of its 7 most relevant heads 5 or more are among the 7 whose ablation costs most (chance: "
    "1), where shuffled relevance has 5 in less than 5% of cases; finding the circuit takes less time than by path "
    "patching, a sender at a time"
)
TOP, SHUFFLES = 7, 1000
TEMPLATE = "When [FIRST] and [SECOND] met at the [PLACE], [S2] gave a [THING] to"
PROMPTS, OTHERS, RANDOM = {"small": 8, "large": 64}, 4, 20  # four times as many others
TAKE, ROUNDS, AT_ONCE = 8, 3, 16


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Split the planted model's answers and the reader's, and compare with path patching."""
    task = questions(32, seed=seed)

    def margin(logits: Tensor) -> Tensor:
        return logits[:, -1].gather(1, task.answers[:, None])[:, 0] - logits[:, -1].mean(-1)

    hand_made = cd_t(planted(seed=seed), {"input_ids": task.ids}, margin)
    task = repeats(32, seed=seed)
    told = cd_t(planted(seed=seed), {"input_ids": task.ids}, margin)
    found_all = _highest(hand_made, len(TELLING)) == {*TELLING} and _highest(told, len(INDUCTIVE)) == {*INDUCTIVE}

    model, tokenizer = zoo.load("reader")
    n = PROMPTS[scale]
    drawn = ioi((1 + OTHERS) * n, seed=seed, template=TEMPLATE)
    known, other = ask(drawn[:n], tokenizer), ask(drawn[n:], tokenizer)
    given: tuple[Any, ...] = (model, known.inputs, known.difference)
    knobs = {"reference": known.corrupted, "at_once": AT_ONCE}
    split = cd_t(*given, **knobs)
    off = max(
        float(abs(one["relevance"] + one["rest"] - one.attrs["score"]).max() / abs(one.attrs["score"]))
        for one in (hand_made, told, split)
    )
    found = circuit(*given, **knobs, take=TAKE, rounds=ROUNDS)
    judge = partial(faithfulness, model, other.inputs, other.difference, reference=other.corrupted)
    faithful = judge(found)
    rng = np.random.default_rng(seed)
    everything = [(layer, head) for layer in range(6) for head in range(8)]
    random = [judge([everything[i] for i in rng.permutation(len(everything))[: len(found)]]) for _ in range(RANDOM)]

    patching = _Patching(model, known)
    relevance = abs(split["relevance"].values.ravel())
    cost = np.abs([patching.without(head) for head in everything])
    costliest = set(np.argsort(cost)[-TOP:].tolist())
    shared = len(costliest & set(np.argsort(relevance)[-TOP:].tolist()))
    by_chance = [len(costliest & set(rng.permutation(len(cost))[:TOP].tolist())) for _ in range(SHUFFLES)]
    ours, one_by_one, together = seconds(
        lambda: circuit(*given, **knobs, take=TAKE, rounds=ROUNDS),
        lambda: patching.circuit(everything, at_once=1),
        lambda: patching.circuit(everything, at_once=AT_ONCE),
        least=1,
    )

    good = len(found) <= 24 and faithful >= 0.8 and faithful > max(random)
    rare = float(np.mean(np.array(by_chance) >= 5))
    holds = off <= 1e-3 and found_all and good and shared >= 5 and rare < 0.05 and ours < one_by_one
    measured = (
        f"parts are off by at most {off:.1e} of the score; in the planted model the most relevant heads are "
        f"{'those' if found_all else 'not those'} that were planted; the reader's circuit has {len(found)} heads and a "
        f"faithfulness of {faithful:.2f} on other prompts, random ones {min(random):.2f} to {max(random):.2f}; of the "
        f"{TOP} most relevant heads {shared} are among the {TOP} whose ablation costs most (shuffled "
        f"{mean(by_chance).value:.1f}, 5 or more in {rare:.1%}); time over that of path patching "
        f"{ours / one_by_one:.2f} with a sender at a time, {ours / together:.2f} with {AT_ONCE}"
    )
    matter = int((cost >= 0.02 * cost.max()).sum())
    enough = Premise(
        "some heads matter, most do not", "3 to 24 cost 2% of the costliest", str(matter), 3 <= matter <= 24
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        most = float(abs(split["relevance"]).max())
        left.imshow(split["relevance"], cmap="RdBu_r", vmin=-most, vmax=most)
        for layer, head in found:
            left.plot(head, layer, "ko", markersize=4, fillstyle="none")
        left.set(xlabel="head", ylabel="layer", title="Relevance (circuit: rings)", xticks=range(8))
        middle.scatter(cost, relevance, s=14)
        middle.set(xlabel="cost of ablation, logits", ylabel="relevance, size, logits", title="The reader's 48 heads")
        middle.set_xscale("symlog", linthresh=0.01)
        middle.set_yscale("symlog", linthresh=0.01)
        right.hist(random, bins=12, color="lightgrey", label="random circuits")
        right.axvline(faithful, color="tab:red", label="the circuit")
        right.set(xlabel="faithfulness on other prompts", ylabel="circuits")
        right.legend(fontsize=8)

    return Finding(holds, measured, EXPECTED, seed, premises=[enough], draw=draw)


def _highest(found: Any, count: int) -> set[tuple[int, int]]:
    """The heads of highest relevance."""
    ranked = found["relevance"].stack(at=("layer", "head"))
    return set(ranked.sortby(ranked)["at"].values[-count:])


class _Patching:
    """Path patching of one prompt set: an intervention, and the search with it."""

    def __init__(self, model: nn.Module, asked: Asked) -> None:
        self.model, self.asked = model, asked
        self.clean: dict[int, Tensor] = {}
        self.senders: Sequence[tuple[int, int]] = ()
        self.receivers: dict[tuple[int, int], Tensor] | None = None
        self.kept: dict[int, Tensor] = {}
        self.score = self._run(asked.corrupted)
        self.means = {layer: output.mean(0) for layer, output in self.kept.items()}
        self.score = self._run(asked.inputs)
        self.clean = dict(self.kept)

    def output(self, call: Call, output: Tensor) -> Tensor:
        layer = call.site.layer
        self.kept[layer] = output
        if not self.senders:
            return output
        frozen = self.clean[layer].repeat(len(self.senders), 1, 1, 1)
        rows = len(self.clean[layer])
        if self.receivers is not None:
            for (at, head), given in self.receivers.items():
                if at == layer:
                    frozen[:, head] = given
            return frozen
        for i, (at, head) in enumerate(self.senders):
            if at == layer:
                frozen[i * rows : (i + 1) * rows, head] = self.means[layer][head]
        return frozen

    @torch.no_grad()
    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        times = max(len(self.senders), 1)
        with intervene(self.model, self):
            logits = self.model(**{name: value.repeat(times, 1) for name, value in inputs.items()}).logits
        rows = logits.unflatten(0, (times, -1))
        return torch.stack([self.asked.difference(one).mean() for one in rows])

    def effects(
        self, senders: Sequence[tuple[int, int]], *, at_once: int, receivers: Sequence[tuple[int, int]] = ()
    ) -> Tensor:
        """What the score loses by each sender's path to the logits, or to the receivers. [sender]"""
        found = []
        for start in range(0, len(senders), at_once):
            self.senders = senders[start : start + at_once]
            patched = self._run(self.asked.inputs)
            if receivers:
                self.receivers = {(layer, head): self.kept[layer][:, head] for layer, head in receivers}
                patched = self._run(self.asked.inputs)
                self.receivers = None
            found.append(self.score - patched)
        self.senders = ()
        return torch.cat(found)

    @torch.no_grad()
    def without(self, head: tuple[int, int]) -> float:
        """What the score loses where a head gives its mean, and all that comes after follows."""

        def output(call: Call, output: Tensor) -> Tensor:
            if call.site.layer != head[0]:
                return output
            output = output.clone()
            output[:, head[1]] = self.means[head[0]][head[1]]
            return output

        with intervene(self.model, SimpleNamespace(output=output)):
            patched = self.asked.difference(self.model(**self.asked.inputs).logits).mean()
        return float(self.score - patched)

    def circuit(self, heads: Sequence[tuple[int, int]], *, at_once: int) -> list[tuple[int, int]]:
        """Rounds of the heads with the largest effect on the score, then on the heads found last."""
        found: list[tuple[int, int]] = []
        new: list[tuple[int, int]] = []
        for _ in range(ROUNDS):
            effects = self.effects(heads, at_once=at_once, receivers=new).abs()
            best = [heads[i] for i in effects.argsort(descending=True).tolist()]
            new = [head for head in best if head not in found][:TAKE]
            found += new
        return found
