"""The head atlas: a fixed battery of inputs, and what it says of every head.

Random tokens that repeat say who looks at the previous token, at copies, and at what followed them, and whose weights
stay the same whatever the tokens; a paragraph says who looks at the first token, near by or far away; prompts with a
known answer say who looks at it and speaks for it; pictures say who looks at them. What heads write is read by the
unembedding of the tokens that they look at, where it reaches the unembedding as it is (see `regard.stream`).

A head has a kind where its scores reach the kind's thresholds; most heads have none, and some have several. Kinds carry
the stage that Zheng et al., Attention Heads of Large Language Models: A Survey (arXiv:2409.03752), section 4, give
them; the survey names no head for sinks, places or pictures.
"""

from __future__ import annotations

import datetime
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor, nn

from . import stream
from .call import Call
from .data import paragraph, prompts, scenes
from .names import vocabulary
from .padding import unpadded
from .prediction import evaluating
from .recording import Recording, statistic
from .seam import record
from .statistics.global_mass import global_mass
from .statistics.local_mass import local_mass
from .statistics.normalised_entropy import normalised_entropy
from .statistics.sink_mass import sink_mass

WRITING = ("copying", "suppression", "direct_effect")
STAGES = ("knowledge recalling", "in-context identification", "latent reasoning", "expression preparation")
QUESTION = "What is in this picture?"
LONGEST = 256  # tokens of the paragraph
WINDOW = 8  # positions to either side that count as near
TIMES = 5.0  # the average patch: a patch that gets more is a sink of its picture
UNKNOWN = 0.5  # of a text's tokens, from which on it is not read: its words are not in the vocabulary
BEST = 5  # ranks of the vocabulary that count as copied, or suppressed


@dataclass(frozen=True)
class Score:
    """One number a head, and the least that counts for a kind."""

    title: str
    threshold: float
    source: str  # of the threshold
    about: str
    limits: tuple[float | None, float | None] = (0.0, 1.0)
    units: str = "share"


@dataclass(frozen=True)
class Kind:
    """What a head does, the scores that have to reach their thresholds, and the survey's stage ("": it has none)."""

    about: str
    scores: tuple[str, ...]
    stage: str = ""


_DETECTORS = "the detectors of McDougall et al., ARENA 3.0, chapter 1.2, which ask for a mean weight of 0.4"
_SEEN = "Kang et al., See What You Are Told (arXiv:2503.03321): released code, summ = 0.2 and rho = 0.5"
_COPIES = "ours: Wang et al. (arXiv:2211.00593), section 3, find above 0.95 in movers and 0.2 on average"

SCORES = {
    "previous_token": Score(
        "On the previous token", 0.4, _DETECTORS, "Mean weight on the position before, on random tokens."
    ),
    "induction": Score(
        "Induction",
        0.4,
        _DETECTORS,
        "Mean weight on what followed earlier copies of the token, on random tokens that repeat.",
    ),
    "duplicate_token": Score(
        "On earlier copies", 0.4, _DETECTORS, "Mean weight on earlier copies of the token, on random tokens."
    ),
    "positional": Score(
        "Same whatever is read",
        0.9,
        "ours; Voita et al. (arXiv:1905.09418), section 5.1, ask for one place in 90% of cases",
        "Overlap of a row of weights with those of other random inputs at the same place.",
    ),
    "self_mass": Score("On itself", 0.4, _DETECTORS, "Mean weight on the query's own position."),
    "sink_mass": Score(
        "On the first token",
        0.3,
        "Gu et al., When Attention Sink Emerges (arXiv:2410.10781), section 3: epsilon = 0.3",
        "Mean weight on the first token, in prose.",
    ),
    "local_mass": Score("Near by", 0.8, "ours", f"Mean weight within {WINDOW} positions, in prose."),
    "global_mass": Score(
        "Far away",
        0.8,
        "ours",
        f"Mean weight more than {WINDOW} positions away and not on the first token, in prose.",
    ),
    "normalised_entropy": Score("Width", math.nan, "no kind asks for it", "Mean normalised entropy, in prose."),
    "copying": Score(
        "Copies what it reads",
        0.5,
        _COPIES,
        f"Share of values that raise the logit of their own token into the {BEST} highest of the vocabulary.",
    ),
    "suppression": Score(
        "Suppresses what it reads",
        0.5,
        _COPIES,
        f"Share of values that lower the logit of their own token into the {BEST} lowest of the vocabulary.",
    ),
    "direct_effect": Score(
        "Logit of the attended token",
        math.nan,
        "no kind asks for it",
        "What the logit of the token that is looked at most, less that of the average token, loses without the head.",
        (None, None),
        "logits",
    ),
    "to_answer": Score(
        "On the answer", 0.2, "ours", "Mean weight of the last token on the answer's, in prompts whose answer is known."
    ),
    "answer_effect": Score(
        "Logit of the answer",
        0.1,
        "ours",
        "What the answer's logit, less that of the other choices, loses without the head.",
        (None, None),
        "logits",
    ),
    "to_image": Score("From text to picture", 0.2, _SEEN, "Mean weight of later tokens on the picture."),
    "in_image": Score(
        "Beside the picture's sinks",
        0.5,
        _SEEN,
        f"Share of that weight on patches that get at most {TIMES:g} times as much as the average one in their layer.",
    ),
    "cls": Score("On the class token", 0.3, "that of sink_mass", "Mean weight of patches on the class token."),
}

TAXONOMY = {
    "previous token": Kind("looks at the position before", ("previous_token",), STAGES[1]),
    "positional": Kind("looks at the same places whatever is read", ("positional",), STAGES[1]),
    "duplicate": Kind("looks at earlier copies of the token", ("duplicate_token",), STAGES[1]),
    "induction": Kind("looks at what followed earlier copies of the token", ("induction",), STAGES[2]),
    "mover": Kind("looks at the answer, and raises its logit", ("to_answer", "answer_effect"), STAGES[1]),
    "copying": Kind("raises the logit of what it reads", ("copying",), STAGES[1]),
    "suppression": Kind("lowers the logit of what it reads", ("suppression",), STAGES[2]),
    "self": Kind("looks at its own position", ("self_mass",)),
    "sink": Kind("rests on the first token", ("sink_mass",)),
    "local": Kind("looks near by", ("local_mass",)),
    "global": Kind("looks far away, and not at the first token", ("global_mass",)),
    "text to image": Kind("looks from the text at the picture", ("to_image",)),
    "image-centric": Kind("looks from the text at patches that are no sinks", ("to_image", "in_image")),
    "cls": Kind("looks from patches at the class token", ("cls",)),
}


def atlas(
    model: nn.Module,
    processor: Any = None,
    *,
    pictures: Sequence[Image.Image] = (),
    thresholds: Mapping[str, float] | None = None,
    sequences: int = 8,
    segment: int = 24,
    copies: int = 3,
    prompted: int = 16,
    sampled: int = 32,
    seed: int = 0,
) -> Recording:
    """Run the battery, and say of every head of every stack what it does; scores have the axes [layer, head].

    processor: tokenizer or processor; without it there is no prose and no prompt, and random tokens stand in
    pictures: for models that see; generated scenes where there are none
    thresholds: other least scores for a kind, by the name of the score (see `SCORES`)
    sequences, segment, copies: how many sequences of random tokens, how long before they repeat, how often they come
    prompted: prompts of each task; sampled: positions at which what heads write is read

    A node's coordinate `kinds` names the kinds of each head (see `TAXONOMY`) and `stages` their stages; the attribute
    `notes` of the tree says what was not measured, and why: what heads write is NaN there. The model is left as it was.
    ValueError for a model that takes neither tokens nor pictures.

    >>> import regard
    >>> from regard.atlas import atlas
    >>> found = atlas(*regard.load("reader")).tree["language_model"]
    >>> "previous token" in str(found["kinds"].sel(layer=0, head=0).values)
    True
    """
    wanted = {name: score.threshold for name, score in SCORES.items()}
    if unknown := set(thresholds or {}) - set(wanted):
        raise ValueError(f"no score {', '.join(sorted(unknown))}; scores are {', '.join(wanted)}")
    if (takes := getattr(model, "main_input_name", "input_ids")) not in ("input_ids", "pixel_values"):
        raise ValueError(f"{type(model).__name__} takes {takes}: the battery has tokens and pictures only")
    tested = _Battery(model, processor, torch.Generator().manual_seed(seed), sampled)
    with evaluating(model), torch.no_grad():
        if takes == "input_ids":
            tested.repeat(sequences, segment, copies)
            tested.read_prose()
            tested.answer(prompted, seed)
        if _sees(model):
            tested.look_at(list(pictures) or _scenes(4, seed), varied=bool(pictures))
    for scores in tested.found.values():
        for name in WRITING if "induction" in scores else ():  # asked of all that read, if in vain
            if name not in scores:
                scores[name] = scores["induction"] * np.nan
    stacks = {stack: _labelled(scores, wanted | dict(thresholds or {})) for stack, scores in tested.found.items()}
    tree = xr.DataTree.from_dict({f"/{stack}": dataset for stack, dataset in stacks.items()})
    packages = {name: version(name) for name in ("regard", "torch", "transformers")}
    made = {"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    tree.attrs = {"architecture": type(model).__name__, **made, **packages, "seed": seed, "notes": tested.notes}
    return Recording([tree])


def best(dataset: xr.Dataset, kind: str) -> list[tuple[int, int, float]]:
    """Layer, head and score of the heads of a kind, the clearest first; a head's score is the lowest it needs."""
    if not set(TAXONOMY[kind].scores) <= set(dataset.data_vars):
        return []
    score = dataset[TAXONOMY[kind].scores[0]].values
    has = np.vectorize(lambda names: kind in names.split(", "))(dataset["kinds"].values)
    places = sorted(np.argwhere(has).tolist(), key=lambda at: -score[*at])
    return [(int(dataset["layer"].values[a]), int(dataset["head"].values[b]), float(score[a, b])) for a, b in places]


def _labelled(scores: xr.Dataset, thresholds: dict[str, float]) -> xr.Dataset:
    dataset = scores[[name for name in SCORES if name in scores]]
    for name, variable in dataset.data_vars.items():
        said = SCORES[str(name)]
        variable.attrs = {"long_name": said.title, "units": said.units, "about": said.about}
        if None not in said.limits:
            variable.attrs["range"] = list(said.limits)
        if not math.isnan(thresholds[str(name)]):
            variable.attrs |= {"threshold": thresholds[str(name)], "source": said.source}
    shape = (dataset.sizes["layer"], dataset.sizes["head"])
    kinds, stages = (np.full(shape, "", dtype=object) for _ in range(2))
    for name, kind in TAXONOMY.items():
        if set(kind.scores) <= set(dataset.data_vars):
            reached = [dataset[s].transpose("layer", "head").values >= thresholds[s] for s in kind.scores]
            for at in np.argwhere(np.logical_and.reduce(reached)).tolist():
                kinds[*at] = ", ".join(filter(None, (kinds[*at], name)))
                if kind.stage and kind.stage not in stages[*at]:
                    stages[*at] = ", ".join(filter(None, (stages[*at], kind.stage)))
    return dataset.assign_coords(kinds=(("layer", "head"), kinds), stages=(("layer", "head"), stages))


def text(model: nn.Module, tokenizer: Any) -> dict[str, Tensor]:
    """Inputs of the paragraph that the battery reads, cut to what the model takes."""
    longest = min(LONGEST, _positions(model.config))
    encoded = tokenizer(paragraph(), truncation=True, max_length=longest, return_tensors="pt")
    return _given(model, encoded["input_ids"])


def unknown(ids: Tensor, tokenizer: Any) -> float:
    """Share of tokens that the tokenizer does not know, 0 to 1."""
    unk = getattr(tokenizer, "unk_token_id", None)
    return 0.0 if unk is None else float((ids == unk).float().mean())


class _Battery:
    """The inputs, one method each, and the scores that they give: stack -> name -> [layer, head]."""

    def __init__(self, model: nn.Module, processor: Any, generator: torch.Generator, sampled: int) -> None:
        self.model, self.processor, self.generator, self.sampled = model, processor, generator, sampled
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not callable(getattr(self.tokenizer, "convert_ids_to_tokens", None)):
            self.tokenizer = None
        self.device = next(model.parameters()).device
        self.found: dict[str, xr.Dataset] = {}
        self.notes: list[str] = []
        self.unread: set[str] = set()  # stacks that read, for which there was no prose

    def keep(self, tree: xr.DataTree, name: str, where: Callable[[xr.Dataset], Any] | None = None) -> None:
        """The mean of a statistic over all but layer and head, in the stacks where it is defined somewhere.

        where: the queries that count, by their position; then stacks of patches, which have no order, are left out.
        """
        for stack, node in tree.children.items():
            dataset = unpadded(node.to_dataset())
            patches = where is not None and "query_role" in dataset and bool((dataset["query_role"] == "image").any())
            if name in self.found.get(stack, ()) or name not in dataset or patches:
                continue
            if name == "self_mass" and stack in self.unread:  # pictures would stand in for prose
                continue
            values = dataset[name] if where is None else dataset[name].where(where(dataset))
            mean = values.mean([d for d in values.dims if d not in ("layer", "head")])
            if bool(mean.notnull().any()):
                about = {key: dataset.attrs[key] for key in ("kind", "causal", "sites")}
                kept = self.found.setdefault(stack, xr.Dataset(attrs=about))
                kept[name] = mean.reset_coords(drop=True).transpose("layer", "head")

    def run(self, inputs: dict[str, Any], *statistics: Any, **named: Any) -> xr.DataTree:
        inputs = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        with record(self.model, *statistics, processor=self.processor, **named) as recording:
            self.model(**inputs)
        return recording[0]

    def repeat(self, sequences: int, segment: int, copies: int) -> None:
        """Random tokens that repeat."""
        known = vocabulary(self.model, self.processor)
        config: Any = self.model.config
        config = config.get_text_config()
        size = min(config.vocab_size, len(self.tokenizer) if self.tokenizer is not None else config.vocab_size)
        common = sorted(set(range(size)) - set().union(*known.values()))
        longest = next(
            (n for k in ("max_position_embeddings", "n_positions") if (n := getattr(config, k, None))), 10**6
        )
        segment = min(segment, len(common), (longest - 1) // copies)
        drawn = [torch.randperm(len(common), generator=self.generator)[:segment] for _ in range(sequences)]
        ids = torch.tensor(common)[torch.stack(drawn)].repeat(1, copies)
        if first := sorted(known["bos"] or known["decoder_start"]):
            ids = torch.cat([torch.full((sequences, 1), first[0]), ids], dim=1)
        start = ids.shape[1] - segment * copies
        self.ids, self.segment = ids, segment

        inputs = _given(self.model, ids)
        flow = stream.read(self.model, partial(self.run, inputs, "self_mass"))
        named = {"positional": _positional}
        if flow.missing:
            self.notes.append(f"what heads write was not read: {flow.missing}")
        else:
            named |= self.writing(flow, ids, start + segment)
        tree = self.run(inputs, "previous_token", "induction", "duplicate_token", **named)
        self.keep(tree, "previous_token", lambda data: data["query"] > start)
        # All that the repetition gives away stands at least a segment back.
        self.keep(tree, "induction", lambda data: data["query"] >= start + segment)
        self.keep(tree, "duplicate_token", lambda data: data["query"] >= start + segment)
        self.keep(tree, "positional", lambda data: (data["query"] > start + 1) & (data["query"] < start + segment))
        for name in WRITING:
            self.keep(tree, name)

    def read_prose(self) -> None:
        """A paragraph."""
        if self.tokenizer is None:
            self.notes.append("no tokenizer: random tokens stand in for prose, and there were no prompts")
        inputs = text(self.model, self.tokenizer) if self.tokenizer is not None else _given(self.model, self.ids[:1])
        if self.tokenizer is not None and (share := unknown(inputs["input_ids"], self.tokenizer)) > UNKNOWN:
            prose = ("local_mass", "global_mass", "self_mass", "sink_mass")
            kinds = [name for name, kind in TAXONOMY.items() if set(kind.scores) & set(prose)]
            self.notes.append(
                f"{share:.0%} of the paragraph's tokens are unknown to the tokenizer, so it is no prose: not measured "
                f"are the kinds {', '.join(kinds)}"
            )
            self.unread = set(self.found)
            return
        near = {"local_mass": partial(local_mass, window=WINDOW), "sink_mass": partial(sink_mass, n_sink=1)}
        near |= {"global_mass": _net(partial(global_mass, window=WINDOW)), "normalised_entropy": normalised_entropy}
        tree = self.run(inputs, "self_mass", **near)
        for name in ("local_mass", "global_mass"):
            self.keep(tree, name, lambda data: data["query"] > 4 * WINDOW)  # before, there is hardly a far away
        for name in ("self_mass", "sink_mass", "normalised_entropy"):
            self.keep(tree, name, lambda data: data["query"] > 0)

    def writing(self, flow: stream.Stream, ids: Tensor, repeats: int) -> dict[str, Any]:
        """Statistics of what heads write: of each value by itself, and of all that a head gives at a position."""
        values = self.somewhere(ids, 1, repeats)
        asked = self.somewhere(ids, repeats, ids.shape[1])
        ids = ids.to(self.device)
        kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

        def by_value(call: Call) -> tuple[Tensor, Tensor] | None:
            """Share of values that copy, and that suppress, their token. [head]"""
            if not flow.holds(call.site):
                return None
            at = (call.site.stack, call.site.layer)
            if at not in kept:
                own, group = ids[values], call.query.shape[1] // call.value.shape[1]
                ranks = []
                for head in range(call.query.shape[1]):
                    value = call.value[values[0], head // group, values[1]]
                    logits = flow.alone(flow.written(call.site, head, value))
                    mine = logits.gather(-1, own[:, None])
                    ranks.append(
                        [(better(logits, mine).sum(-1) < BEST).float().mean() for better in (torch.gt, torch.lt)]
                    )
                copied, suppressed = torch.tensor(ranks).T
                kept.clear()
                kept[at] = copied, suppressed
            return kept[at]

        def as_statistic(which: int) -> Any:
            @statistic("batch head", title="Share of values")
            def share(call: Call) -> Tensor | None:
                found = by_value(call)
                return None if found is None else found[which].expand(call.query.shape[0], -1)

            return share

        assert flow.residual is not None
        end = flow.residual[asked]
        whole = flow.out(end)

        @statistic("batch head", title="Effect")
        def direct_effect(call: Call) -> Tensor | None:
            if not flow.holds(call.site):
                return None
            sample, query = asked
            attended = call.weights.top(1)[1][sample, :, query, 0] - call.key_start
            found = []
            for head in range(call.query.shape[1]):
                written = flow.written(call.site, head, call.output[sample, head, query])
                lost = whole - flow.out(end - written)
                token = ids[sample, attended[:, head].clamp(min=0)]
                found.append((lost.gather(-1, token[:, None])[:, 0] - lost.mean(-1)).mean())
            return torch.stack(found).expand(call.query.shape[0], -1)

        return {"copying": as_statistic(0), "suppression": as_statistic(1), "direct_effect": direct_effect}

    def somewhere(self, ids: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Some samples and positions from a to b, in the order of `self.generator`."""
        chosen = torch.randperm(len(ids) * (b - a), generator=self.generator)[: self.sampled]
        return chosen // (b - a), a + chosen % (b - a)

    def answer(self, prompted: int, seed: int) -> None:
        """Prompts with a known answer."""
        if self.tokenizer is None or not getattr(self.model, "can_generate", lambda: False)():
            return
        if getattr(self.model.config, "is_encoder_decoder", False):
            self.notes.append("no prompts: they are for models that only decode")
            return
        trees, tried = [], 0
        for task, name in ((prompts.ioi, "IO"), (prompts.coloured_objects, "COL")):
            for prompt in task(prompted, seed=seed):
                tried += 1
                try:
                    encoded = prompts.encode(prompt, self.tokenizer)
                except ValueError:  # this tokenizer cuts the words in a way that compares nothing
                    continue
                if unknown(torch.tensor(encoded.ids), self.tokenizer) <= UNKNOWN:
                    trees.append(self.asked(encoded, name))
        if len(trees) < tried:
            self.notes.append(f"{tried - len(trees)} of {tried} prompts do not fit the tokenizer, and were left out")
        if trees:
            for stack in trees[0].children:
                both = xr.concat(
                    [tree[stack].to_dataset() for tree in trees], "batch", join="outer", combine_attrs="override"
                )
                one = xr.DataTree.from_dict({stack: both})
                for name in ("to_answer", "answer_effect"):
                    self.keep(one, name)

    def asked(self, encoded: prompts.Encoded, name: str) -> xr.DataTree:
        inputs = {"input_ids": torch.tensor([encoded.ids])}
        flow = stream.read(self.model, partial(self.run, inputs, "self_mass"))
        last = len(encoded.ids) - 1
        places = list(encoded.positions[name])

        @statistic("batch head", title="Weight")
        def to_answer(call: Call) -> Tensor:
            return call.weights.rows(last, last + 1)[:, :, 0, places].sum(-1)

        @statistic("batch head", title="Effect")
        def answer_effect(call: Call) -> Tensor | None:
            if not flow.holds(call.site):
                return None
            assert flow.residual is not None
            end = flow.residual[0, last]
            heads = range(call.query.shape[1])
            written = torch.stack([flow.written(call.site, h, call.output[0, h, last]) for h in heads])
            lost = flow.out(end) - flow.out(end - written)
            return (lost[:, encoded.answers].mean(-1) - lost[:, encoded.distractors].mean(-1))[None]

        return self.run(inputs, to_answer, answer_effect)

    def look_at(self, pictures: list[Image.Image], *, varied: bool) -> None:
        """Pictures: all in one batch where they are of one size, and so make sequences of one length."""
        groups = [[picture] for picture in pictures] if varied else [pictures]
        for group in groups:
            try:
                inputs = self.pictured(group)
            except ValueError as error:
                self.notes.append(f"no pictures: {error}")
                return
            mass, on_image = {"to_image": _to_image, "in_image": _in_image, "cls": _to_class}, ("self_mass",)
            tree = self.run(inputs, *on_image, positional=_positional, **mass)
            for name in (*mass, "positional", "self_mass"):
                self.keep(tree, name)

    def pictured(self, pictures: list[Image.Image]) -> dict[str, Any]:
        """Inputs that show pictures, with a question where the model reads too; noise where there is no processor."""
        processor, reads = self.processor, self.model.main_input_name == "input_ids"
        two_towers = hasattr(self.model, "get_text_features")
        if processor is None:
            if reads and not two_towers:
                raise ValueError("without a processor, it is not known where a picture stands in the text")
            pixels = {"pixel_values": _noise(_vision(self.model), len(pictures), self.generator)}
            return {"input_ids": self.ids[: len(pictures)], **pixels} if reads else pixels
        if not reads:
            return dict(processor(images=pictures, return_tensors="pt"))
        if two_towers:
            texts = [QUESTION] * len(pictures)
            return dict(processor(text=texts, images=pictures, return_tensors="pt", padding=True))
        if getattr(processor, "chat_template", None):
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
            text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        else:
            text = f"{getattr(processor, 'image_token', '')}\n{QUESTION}".strip()
        return dict(processor(text=[text] * len(pictures), images=pictures, return_tensors="pt"))


def _net(far: Any) -> Any:
    """What `far` counts, without the first token, where a far-sighted head and a sink would look alike."""

    @statistic("batch head query", title="Far away")
    def net(call: Call) -> Tensor:
        first = torch.zeros(1, call.key.shape[2], dtype=torch.bool, device=call.query.device)
        first[:, 0] = call.key_start == 0
        apart = torch.arange(call.query.shape[2], device=first.device) + call.query_start
        return far(call) - call.weights.mass(first) * (apart > WINDOW)

    return net


@statistic("batch head query", title="Overlap")
def _positional(call: Call) -> Tensor:
    """1 less the total variation between a row and the mean of the other samples' rows there. [batch, head, query]"""
    found, n = torch.full(call.query.shape[:3], torch.nan, device=call.query.device), call.query.shape[0]
    for rows, weights in call.weights.strips() if n > 1 else ():
        others = (weights.sum(0, keepdim=True) - weights) / (n - 1)
        found[:, :, rows.start : rows.stop] = 1 - (weights - others).abs().sum(-1) / 2
    return found


def _later(call: Call) -> tuple[Tensor, Tensor] | None:
    """Queries after a picture that are not of one [batch, query], and its keys [batch, key]."""
    if call.tokens is None or call.query_tokens is None:
        return None
    image = call.tokens.role("image")
    if not bool(image.any()):
        return None
    last = torch.where(image, torch.arange(image.shape[1], device=image.device) + call.key_start, -1).amax(1)
    at = torch.arange(call.query.shape[2], device=image.device) + call.query_start
    text = ~call.query_tokens.role("image") & ~call.query_tokens.role("pad")
    return text & (call.site.cross | (at > last[:, None])), image


@statistic("batch head query", title="On the picture")
def _to_image(call: Call) -> Tensor | None:
    found = _later(call)
    return None if found is None else call.weights.mass(found[1]).masked_fill(~found[0][:, None], torch.nan)


@statistic("batch head", title="Beside its sinks")
def _in_image(call: Call) -> Tensor | None:
    found = _later(call)
    if found is None:
        return None
    asks, image = found
    seen = call.weights.received(by=asks).masked_fill(~image[:, None], 0.0)
    layer = seen.sum(1, keepdim=True)
    sinks = layer > TIMES * layer.sum(-1, keepdim=True) / image.sum(-1)[:, None, None]
    return seen.masked_fill(sinks, 0.0).sum(-1) / seen.sum(-1)


@statistic("batch head query", title="On the class token")
def _to_class(call: Call) -> Tensor | None:
    """In a stack of patches with a token in front."""
    if call.tokens is None or call.site.cross or not bool(call.tokens.role("image").any()):
        return None
    first = torch.zeros_like(call.tokens.role("special"))
    first[:, 0] = call.tokens.role("special")[:, 0] & call.tokens.role("image")[:, -1]
    if not bool(first.any()):
        return None
    return call.weights.mass(first).masked_fill(~call.tokens.role("image")[:, None], torch.nan)


def _given(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Inputs that give a model these tokens, to every part of it that reads."""
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if hasattr(model, "get_text_features") and _sees(model):  # two towers, which run together
        inputs["pixel_values"] = _noise(_vision(model), len(ids), torch.Generator().manual_seed(0))
    return inputs


def _positions(config: Any) -> int:
    text = config.get_text_config()
    known = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((n - 2 for n in known if n), LONGEST)  # RoBERTa and its kin spend two on nothing


def _sees(model: nn.Module) -> bool:
    return "pixel_values" in _parameters(model)


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _vision(model: nn.Module) -> Any:
    return getattr(model.config, "vision_config", model.config)


def _noise(config: Any, n: int, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(n, getattr(config, "num_channels", 3), height, width, generator=generator)


def _scenes(n: int, seed: int) -> list[Image.Image]:
    made = scenes.Scenes(n, size=64, seed=seed)
    pixels = (np.stack([made[i]["image"] for i in range(n)]).transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    return [Image.fromarray(one) for one in pixels]
