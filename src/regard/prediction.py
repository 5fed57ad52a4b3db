"""One prediction of a model, as a function of the pixels, sound or token embeddings that it was given.

What a model's prediction is, its output says, and not its name:

    one row of logits a sample          a class
    logits at every position            the next token, where the model writes; otherwise what stands at one position
    logits of boxes                     the class of one box
    `logits_per_*`                      how alike the two sides of a pair are, among all that were given
    hidden states or embeddings alone   how alike they are to those of something else (a cosine)

What it rests on is one of the inputs, `over`: tokens as the embeddings that pass, everything else as it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .loading import parameters

Index = int | Sequence[int] | Tensor | None
Pool = Literal["mean", "cls", "last"]
Kind = Literal["class", "token", "object", "pair", "likeness"]

WORDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # the side of a pair that is text
WHERE = {"flattened_patches": 2}  # values of a patch that say its row and column, before those of its pixels
BOXES = "pred_boxes"  # of a detector's output: centre and size of each box
FORCED = 16  # tokens at most that `generate` puts before the first that the model chooses


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of a model; all but the inputs that it is asked of.

    target: a class or token id, one for each sample or one for all; of a pair, which of the other side; None takes what
    the model predicts. against: another one, whose logit is taken away: why this and not that.
    at: of logits at every position, or of boxes, the one that is read; None takes the box that is likeliest. mask: of
    which token id that one is, where `at` is None. over: the name of the input that is scored; None takes the first of
    the model's own. beside: inputs whose embedding, or the embedding [batch, dim], that this one's is compared with.
    pool: how states become an embedding: of the first position, of the last, or their mean; None takes what the model
    has pooled of pictures, and the mean of anything else. output: the name of the output that holds the logits.
    """

    target: Index = None
    against: Index = None
    at: Index = None
    mask: int | None = None
    over: str | None = None
    beside: Mapping[str, Any] | Tensor | None = None
    pool: Pool | None = None
    output: str | None = None

    @classmethod
    def of(cls, attribution: xr.DataArray) -> Question:
        """What an attribution explains. ValueError where it does not say."""
        known, attributes = getattr(attribution, "coords", ()), getattr(attribution, "attrs", {})
        if "target" not in known:
            raise ValueError("the attribution does not say what it explains; take it from regard.attribute")
        indices = {k: attribution[k].values.astype(int).tolist() for k in ("target", "against", "at") if k in known}
        said = {k: attributes[k] for k in ("over", "output", "pool") if k in attributes}
        beside = {"beside": torch.tensor(attributes["beside"])} if "beside" in attributes else {}
        return cls(**{**indices, **said, **beside})


Target = Index | Question


class _Reads(NamedTuple):
    """A module that gives, or is given, the embeddings of tokens, and what runs when it does."""

    place: nn.Module
    within: nn.Module
    states: Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """The score of a class, a token or a likeness, and what it rests on. See `predict`.

    `given` is what is scored: embeddings [batch, token, dim] (of several choices [batch, choice, token, dim]), pixels
    [batch, channel, row, column], patches [batch, token, dim] or sound; `dims` names its features, and `channel` is the
    axis that they are summed over.
    """

    model: nn.Module
    inputs: dict[str, Any]
    question: Question  # as it was understood: over, output and pool are known; target, against and at are [batch]
    kind: Kind
    given: Tensor
    dims: tuple[str, ...]
    channel: int | None
    place: nn.Module | None  # that is given, or gives, the embeddings; None where the input itself is scored
    within: nn.Module  # the part that reads it; an encoder and a decoder may share one place
    again: _Reads | None  # where a decoder reads the same tokens, each a position later
    ids: Tensor | None  # of the tokens, of the features' shape
    real: Tensor | None  # which features are not padding, of the features' shape; None where all are real

    @property
    def over(self) -> str:
        """The input that is scored."""
        return cast(str, self.question.over)

    @property
    def target(self) -> Tensor:
        """[batch]"""
        return cast(Tensor, self.question.target)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores: batch, and features."""
        shape = list(self.given.shape)
        if self.channel is not None:
            del shape[self.channel]
        return tuple(shape)

    @property
    def sees(self) -> bool:
        """Whether features are the pixels of a picture."""
        return self.dims == ("row", "column") and self.channel is not None

    @property
    def takes(self) -> str:
        """What is scored, in words."""
        return "reads text" if self.place is not None else f"takes {self.over} {list(self.given.shape)}"

    def summed(self, found: Tensor) -> Tensor:
        """One score a feature, of `given`'s shape or with more in front of it."""
        return found if self.channel is None else found.sum(self.channel - self.given.ndim)

    def score(self, given: Tensor | None = None) -> Tensor:
        """The target's logit where this is given instead, less that of `against`. [n * batch], for n batches"""
        logits = self.logits(given)
        score = self._of(logits, self.target)
        return score if self.question.against is None else score - self._of(logits, self.question.against)

    def probability(self, given: Tensor | None = None) -> Tensor:
        """The target's probability. [n * batch]

        Of two, where there is `against`; a sigmoid's where labels do not exclude each other or there is one; of a
        likeness from -1 to 1, from 0 to 1.
        """
        return self._probability(self.logits(given))

    def _probability(self, logits: Tensor) -> Tensor:
        if self.question.against is not None:
            return (self._of(logits, self.target) - self._of(logits, self.question.against)).sigmoid()
        if self.kind == "likeness":
            return (1 + logits[:, 0]) / 2
        if self.kind == "object":
            return self._of(_likely(self.model, logits), self.target)
        return self._of(chances(self.model, logits), self.target)

    def _of(self, logits: Tensor, which: Index) -> Tensor:
        which = cast(Tensor, which)
        return logits.gather(1, which.repeat(len(logits) // len(which))[:, None])[:, 0]

    def logits(self, given: Tensor | None = None) -> Tensor:
        """[n * batch, class], for `given` of n batches one after the other."""
        output = self._output(given)
        return _read(
            self.question, self.kind, output, self._attended(1 if given is None else len(given) // len(self.given))
        )

    def boxes(self, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Boxes of a detector [n * batch, box, 4], and the probabilities of their classes [n * batch, box, class].

        A box is left, top, right and bottom, as shares of the picture.
        """
        if self.kind != "object":
            raise ValueError(f"{type(self.model).__name__} gives no boxes with classes")
        found = _fields(self._output(given))
        centre, size = found[BOXES].split(2, -1)
        likely = _likely(self.model, found[cast(str, self.question.output)])
        return torch.cat([centre - size / 2, centre + size / 2], -1), likely

    def _output(self, given: Tensor | None) -> Any:
        given = (self.given if given is None else given).clone()  # models may change what they are given
        n = len(given) // len(self.given)
        repeated = {k: v if self._beside(k) else _repeat(v, n, len(self.given)) for k, v in self.inputs.items()}
        with ExitStack() as undo:
            if self.place is None:
                repeated[self.over] = self._whole(repeated, given)
            else:
                new = given.flatten(0, -3)
                undo.enter_context(_put(self.place, self.within, new))
                if self.again is not None:
                    undo.enter_context(_put(self.again.place, self.again.within, new, later=True))
            return _run(self.model, repeated)

    def _beside(self, name: str) -> bool:
        """Whether this input is the other side of a pair, of which there may be another number."""
        return self.kind == "pair" and (name in WORDS) != (self.over in WORDS)

    def _attended(self, n: int) -> Tensor | None:
        return None if self.real is None else self.real.repeat(n, *[1] * (self.real.ndim - 1))

    @property
    def repeats(self) -> bool:
        """Whether every input holds one for each sample, so that several can run at once."""
        own = (v for k, v in self.inputs.items() if isinstance(v, Tensor) and v.ndim and not self._beside(k))
        return all(len(value) == len(self.given) for value in own)

    def gradient(self) -> Tensor:
        """Of the score, with respect to `given`; of its shape."""
        given = self.given.clone().requires_grad_()
        return torch.autograd.grad(self.score(given).sum(), given)[0]

    def without(self, kept: Tensor, baseline: Tensor | float) -> Tensor:
        """`given` where `kept` (of the features' shape, or with more in front), otherwise the baseline."""
        chosen = kept if self.channel is None else kept.unsqueeze(self.channel - self.given.ndim)
        return torch.where(chosen.to(self.given.device), self.given, torch.as_tensor(baseline).to(self.given))

    @contextmanager
    def shifted(self, by: Tensor) -> Iterator[dict[str, Any]]:
        """Inputs of which the model reads `given + by`, whoever runs it meanwhile."""
        new = self.given + by
        if self.place is None:
            yield {**self.inputs, self.over: self._whole(self.inputs, new)}
            return
        with ExitStack() as undo:
            undo.enter_context(_put(self.place, self.within, new.flatten(0, -3), every=True))
            if self.again is not None:
                again = self.again.place, self.again.within
                undo.enter_context(_put(*again, new.flatten(0, -3), later=True, every=True))
            yield self.inputs

    def _whole(self, inputs: Mapping[str, Any], given: Tensor) -> Tensor:
        """The input that holds these features: patches with their row and column before them."""
        where = inputs[self.over][..., : WHERE.get(self.over, 0)]
        return torch.cat([where, given], -1) if self.over in WHERE else given

    def sample(self, i: int) -> Prediction:
        """Of sample `i` alone."""
        if len(self.given) == 1:
            return self
        one = slice(i, i + 1)
        inputs = {
            k: _each(v, len(self.given))[one] if isinstance(v, Tensor) and v.ndim and not self._beside(k) else v
            for k, v in self.inputs.items()
        }
        asked = {
            k: v[one] for k in ("target", "against", "at", "beside") if (v := getattr(self.question, k)) is not None
        }
        kept = {k: v[one] for k in ("ids", "real", "given") if (v := getattr(self, k)) is not None}
        return replace(self, inputs=inputs, question=replace(self.question, **asked), **kept)

    def labelled(self, found: Tensor, method: str, **coordinates: Tensor) -> xr.DataArray:
        """Scores of the features, with what they explain. [batch, ...] Padding scores 0."""
        if found.numel() != torch.Size(self.shape).numel():
            raise ValueError(f"{method} finds scores of {list(found.shape)}, and features are {list(self.shape)}")
        found = found.detach().cpu().reshape(self.shape)
        if self.real is not None:
            found = found.masked_fill(~self.real.cpu(), 0)
        with torch.no_grad():
            score = self.score()
        along: dict[str, Any] = {dim: range(n) for dim, n in zip(self.dims, found.shape[1:])}
        along["target"] = ("batch", self.target.cpu().numpy())
        for name in ("against", "at"):
            if (value := getattr(self.question, name)) is not None:
                along[name] = ("batch", value.cpu().numpy())
        for name, value in {"score": score, **coordinates}.items():
            along[name] = ("batch", value.detach().cpu().double().numpy())
        if self.ids is not None:
            along["id"] = (("batch", *self.dims), self.ids.cpu().numpy())
        attributes = {"long_name": method, "predicts": self.kind, "over": self.over, "output": self.question.output}
        if self.kind == "likeness":
            attributes |= {"pool": self.question.pool, "beside": cast(Tensor, self.question.beside).tolist()}
        return xr.DataArray(found.double().numpy(), along, ("batch", *self.dims), method, attributes)


@contextmanager
def predict(model: nn.Module, inputs: Mapping[str, Any], target: Target = None) -> Iterator[Prediction]:
    """What `model` predicts of `inputs`, in evaluation mode, with gradients; it is left as it was found.

    inputs: as the model takes them. Of text with pictures for a language model, what is explained is what that reads,
    patches among its tokens. target: see `Question`; of that, the target alone may be given as it is.

    Of models that write, the prediction is the next token at the last position that is not padding. One that has an
    encoder, and was not given what its decoder has written, is explained at the first token that `generate` lets it
    choose, and by that token.

    Weights have no gradient meanwhile, so that what requires one depends on what is scored.

    Raises ValueError where the output holds no prediction, or where `inputs` are not what the model takes.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs are what a processor gives, a mapping with pixel_values or input_ids, not {inputs!r}")
    question = target if isinstance(target, Question) else Question(target)
    inputs = {k: v for k, v in inputs.items() if k != "labels" and v is not None}
    with evaluating(model), _frozen(model), torch.inference_mode(False), torch.enable_grad():
        inputs = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
        yield _prediction(model, inputs, question)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in wanted:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in wanted:
            weight.requires_grad_()


def writes(model: nn.Module) -> bool:
    """Whether it generates text."""
    return bool(getattr(model, "can_generate", lambda: False)())


def speaks(model: Any) -> bool:
    """Whether its logits are of tokens."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)
    return writes(model) or outputs() is not None


def _prediction(model: nn.Module, inputs: dict[str, Any], question: Question) -> Prediction:
    own, (inputs, said) = _over(inputs, None), _begun(model, inputs)
    over = own if question.over is None else _over(inputs, question.over)
    if "use_cache" in parameters(_bare(model)):
        inputs["use_cache"] = False
    value, within = inputs[over], _part(model, over)
    ids = None if value.dtype.is_floating_point else value
    copies = within is not model and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs)
    with torch.no_grad(), ExitStack() as undo:
        seen = undo.enter_context(_watched(model, over, value, copies)) if ids is not None else None
        try:
            output = _run(model, inputs)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise ValueError(f"{type(model).__name__} could not run on {', '.join(inputs)}: {error}") from error
    place = again = None
    if ids is None:
        given, dims, channel = _features(over, value)
    else:
        if not seen:
            raise ValueError(f"{type(model).__name__}: what reads {over} was not found")
        place, within, embedded = seen.get("states") or seen["table"]
        again = seen.get("again")
        if embedded.shape[:-1].numel() != ids.numel():
            raise ValueError(
                f"{type(model).__name__} reads {list(embedded.shape[:-1])} positions for {over} {list(ids.shape)}"
            )
        given = embedded.detach().reshape(*ids.shape, -1)
        dims, channel = ("choice", "token")[-ids.ndim + 1 :], given.ndim - 1
    real = _real(inputs, over, given, dims)
    question, kind, logits = _asked(model, replace(question, over=over), output, inputs, real)
    rows, classes = logits.shape
    if rows != len(given):
        raise ValueError(f"{type(model).__name__} predicts {rows} times of {len(given)} samples of {over}")
    own = torch.arange(rows, device=logits.device) if kind == "pair" and rows == classes else logits.argmax(-1)
    own = _likely(model, logits).argmax(-1) if kind == "object" else own
    target = question.target if question.target is not None else own if said is None else said
    chosen = {"target": _chosen(target, logits, "target")}
    if question.against is not None:
        chosen["against"] = _chosen(question.against, logits, "against")
        if bool((chosen["against"] == chosen["target"]).any()):
            raise ValueError(f"against {question.against!r}: that is the target itself; name another")
    question = replace(question, **chosen)
    return Prediction(model, inputs, question, kind, given, dims, channel, place, within, again, ids, real)


# What is given


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """A model of one input may call it what it likes."""
    takes = parameters(_bare(model))
    if len(inputs) == 1 and not {*inputs, "kwargs"} & set(takes):
        return model(*inputs.values())
    return model(**inputs)


def _begun(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """With what its decoder has written before it chooses, as `generate` begins; and what it chooses then. [batch]"""
    takes = parameters(_bare(model))
    name = "decoder_input_ids" if "decoder_input_ids" in takes else "input_ids"
    if not writes(model) or name in inputs or name.replace("input_ids", "inputs_embeds") in inputs:
        return inputs, None
    seen: list[tuple[Tensor, Tensor]] = []

    def chooses(ids: Tensor, scores: Tensor) -> Tensor:
        if not seen and bool((scores > -torch.inf).sum(-1).gt(1).all()):
            seen.append((ids.clone(), scores.argmax(-1)))
        return scores

    def enough(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), bool(seen), device=ids.device)

    try:
        plainly = {"do_sample": False, "num_beams": 1, "max_new_tokens": FORCED}
        with _quiet():
            model.generate(**inputs, **plainly, logits_processor=[chooses], stopping_criteria=[enough])
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise ValueError(f"{type(model).__name__} could not begin to write ({error}); give {name}") from error
    if not seen:
        raise ValueError(f"{type(model).__name__} chooses none of its first {FORCED} tokens; give {name}")
    return {**inputs, name: seen[0][0]}, seen[0][1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on the settings of `generate`, which are no user's."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _over(inputs: Mapping[str, Any], wanted: str | None) -> str:
    """The input that is scored."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    floats = [k for k, v in tensors.items() if v.dtype.is_floating_point and v.ndim >= 2 and not k.endswith("mask")]
    among = [k for k in ("input_ids", *floats, "decoder_input_ids") if k in tensors]
    if not among:
        raise ValueError(
            f"inputs hold {', '.join(inputs)}; give pixel_values [batch, channel, row, column], input_ids or sound"
        )
    if wanted is not None and wanted not in among:
        raise ValueError(f"over={wanted!r}: of these inputs, {' and '.join(among)} can be scored")
    return wanted or among[0]


def _features(name: str, value: Tensor) -> tuple[Tensor, tuple[str, ...], int | None]:
    """What is scored of an input of numbers, what its features are called, and which axis is summed over."""
    patches = "patches" in name or "pixel" in name
    if value.ndim == 3 and patches:
        return value[..., WHERE.get(name, 0) :], ("token",), 2
    if value.ndim in (2, 3):  # a wave, or a spectrogram
        return value, ("token",) if value.ndim == 2 else ("row", "column"), None
    if value.ndim in (4, 5):
        return value, ("step", "row", "column")[-value.ndim + 2 :], value.ndim - 3
    raise ValueError(f"{name} {list(value.shape)} is none of: waves, spectrograms, patches, pictures, films")


def _real(inputs: Mapping[str, Any], over: str, given: Tensor, dims: tuple[str, ...]) -> Tensor | None:
    """Which features are not padding, by the mask that goes with them."""
    mask = inputs.get(
        {"decoder_input_ids": "decoder_attention_mask", "pixel_values": "pixel_attention_mask"}.get(
            over, "attention_mask"
        )
    )
    if dims[-1] == "token":
        shape = given.shape[: len(dims) + 1]
        if isinstance(mask, Tensor) and mask.shape == shape:
            return mask.bool()
        return torch.ones(shape, dtype=torch.bool, device=given.device)
    if isinstance(mask, Tensor) and over.startswith("input_") and given.ndim == 3 and mask.ndim == 2:
        for axis in (1, 2):  # of time
            if mask.shape[1] == given.shape[axis]:
                return mask.bool().unsqueeze(3 - axis).expand(given.shape)
    return None


@contextmanager
def _watched(model: nn.Module, over: str, ids: Tensor, copies: bool) -> Iterator[dict[str, _Reads]]:
    """What first reads these ids: a language model as `states`, words and patches together; a `table` of words.

    copies: whether a decoder may read them `again`, each a position later, as classifiers of BART's kind do.
    """
    within, flat = _part(model, over), ids.reshape(-1, ids.shape[-1])
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    outside = not set(tables) & set(within.modules())  # some embed before their encoder runs
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    reader = within if within is not model else decoder
    seen: dict[str, _Reads] = {}
    with ExitStack() as undo:
        part, last = (undo.enter_context(_running(m)) for m in (within, decoder))

        def gave(table: nn.Module, args: Any, output: Tensor) -> None:
            read = args[0] if args else None
            if not isinstance(read, Tensor) or read.shape != flat.shape:
                return
            if (outside or part()) and torch.equal(read, flat.to(read)):
                seen.setdefault("table", _Reads(table, model if outside else within, output))
            elif copies and last() and torch.equal(read[:, 1:], flat[:, :-1].to(read)):
                seen.setdefault("again", _Reads(table, decoder, output))

        def taken(reader: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            states = kwargs.get("inputs_embeds")
            if states is not None and states.shape[:-1] == flat.shape:
                seen.setdefault("states", _Reads(reader, reader, states))

        for table in tables:
            undo.callback(table.register_forward_hook(gave).remove)
        if reader is not model and "inputs_embeds" in parameters(reader):
            undo.callback(reader.register_forward_pre_hook(taken, with_kwargs=True).remove)
        yield seen


@contextmanager
def _running(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Whether it runs now."""
    runs = False

    def starts(*_: Any) -> None:
        nonlocal runs
        runs = True

    def ends(*_: Any) -> None:
        nonlocal runs
        runs = False

    with ExitStack() as undo:
        undo.callback(module.register_forward_pre_hook(starts).remove)
        undo.callback(module.register_forward_hook(ends).remove)
        yield lambda: runs


def _part(model: Any, over: str) -> nn.Module:
    """The encoder or the decoder that reads this, of a model that has both."""
    if "decoder_input_ids" not in parameters(_bare(model)):
        return model
    return model.get_decoder() if over == "decoder_input_ids" else model.get_encoder()


@contextmanager
def _put(
    place: nn.Module, within: nn.Module, new: Tensor, *, later: bool = False, every: bool = False
) -> Iterator[None]:
    """The first embeddings at this place, while `within` runs, are these; or, `later`, all after the first of them.

    every: whenever it runs, and not the first time alone.
    """
    done = False  # a decoder may use the same embeddings after the encoder

    def starts(*_: Any) -> None:
        nonlocal done
        done = False

    with ExitStack() as undo:
        if every:
            undo.callback(within.register_forward_pre_hook(starts).remove)
        runs = undo.enter_context(_running(within))

        def gave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            nonlocal done
            if done or not runs():
                return None
            done = True
            return torch.cat([output[:, :1], new[:, :-1].to(output)], 1) if later else new

        def taken(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            nonlocal done
            if done or kwargs.get("inputs_embeds") is None:
                return None
            done = True
            return args, {**kwargs, "inputs_embeds": new}

        if place is within:
            undo.callback(place.register_forward_pre_hook(taken, with_kwargs=True).remove)
        else:
            undo.callback(place.register_forward_hook(gave).remove)
        yield


# What is predicted


def _asked(
    model: nn.Module, question: Question, output: Any, inputs: Mapping[str, Any], real: Tensor | None
) -> tuple[Question, Kind, Tensor]:
    """What the output predicts, as the question has it, and the logits. [batch, class]"""
    name, found = type(model).__name__, _fields(output)
    over = cast(str, question.over)
    if question.beside is not None:
        field = question.output or _embeds(found, question)
        if field not in found:
            raise ValueError(f"{name} gives {_listed(found)}, and no embedding that could be compared with another")
        question = replace(question, output=field, pool=question.pool or "mean")
        rows = len(_embedding(question, output, real))
        question = replace(question, beside=_other(model, question, rows))
        return question, "likeness", _read(question, "likeness", output, real)
    sides = [key for key in found if key.startswith("logits_per_")]
    kind: Kind = "class"
    if question.output is None and "logits" in found:
        question = replace(question, output="logits")
    elif question.output is None and sides:
        own = next((key for key in sides if (key == "logits_per_text") == (over in WORDS)), sides[0])
        question, kind = replace(question, output=own), "pair"
    if question.output not in found:
        several = [key for key in found if key.endswith("logits")]
        hint = f": say with output= which is meant, {' or '.join(several)}" if several else ""
        if not several and _embeds(found, question):
            hint = ", but embeddings: give a second input that they may be like (beside=; --text or --image twice)"
        raise ValueError(f"{name} gives no logits of classes or tokens (it gives {_listed(found)}){hint}")
    logits = found[question.output]
    if logits.ndim == 3 and BOXES in found:
        question, kind = replace(question, at=_box(model, question, logits)), "object"
    elif logits.ndim == 3:
        kind = "token" if speaks(model) else "class"
        question = replace(question, at=_position(model, question, logits, inputs))
    elif logits.ndim != 2:
        raise ValueError(f"{name}: {question.output} {list(logits.shape)} are many predictions, and none to explain")
    elif question.at is not None:
        raise ValueError(f"at={question.at!r}: {name} gives one row of logits a sample, and none a position")
    return question, kind, _read(question, kind, output, real)


def _read(question: Question, kind: Kind, output: Any, real: Tensor | None) -> Tensor:
    """The logits that are asked for. [n * batch, class]"""
    if kind == "likeness":
        states, other = _embedding(question, output, real), cast(Tensor, question.beside)
        return cosine_similarity(states, other.to(states).repeat(len(states) // len(other), 1), dim=-1)[:, None]
    logits = _fields(output)[cast(str, question.output)]
    if question.at is None:
        return logits
    at = cast(Tensor, question.at)
    return logits[torch.arange(len(logits), device=logits.device), at.repeat(len(logits) // len(at))]


def _fields(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name; of a bare tensor or tuple, the first are logits."""
    if isinstance(output, Tensor):
        return {"logits": output}
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return {"logits": output[0]}
    fields = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    return {k: v for k, v in fields.items() if isinstance(v, Tensor)}


def _listed(found: Mapping[str, Tensor]) -> str:
    return ", ".join(found) or "no tensors by name"


def _position(model: nn.Module, question: Question, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The position whose logits are read. [batch]"""
    batch, n = logits.shape[:2]
    ids, name = inputs.get("input_ids"), type(model).__name__
    if question.at is not None:
        return _chosen(question.at, logits[..., 0], "at")
    if writes(model):
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
        if mask is None or mask.shape[1] != n:
            return torch.full((batch,), n - 1, device=logits.device)
        return (mask.bool() * torch.arange(1, n + 1, device=mask.device)).argmax(-1).to(logits.device)
    if question.mask is None or ids is None or ids.shape != (batch, n):
        raise ValueError(
            f"{name} gives logits for every position, and is none that writes: say which with at=, or, of a masked "
            f"language model, mask one token and give the processor"
        )
    masked = ids == question.mask
    if not bool((masked.sum(-1) == 1).all()):
        counts = ", ".join(map(str, masked.sum(-1).tolist()))
        raise ValueError(f"{name} is asked for masked tokens, and there are {counts} of them: mask one, or say at=")
    return masked.int().argmax(-1).to(logits.device)


def chances(model: nn.Module, logits: Tensor) -> Tensor:
    """Probabilities of classes or tokens, from their logits. [..., class]

    Each class by itself where labels do not exclude each other, as the model's configuration says, or there is one.
    """
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return logits.sigmoid() if several or logits.shape[-1] == 1 else logits.softmax(-1)


def _likely(model: Any, logits: Tensor) -> Tensor:
    """Probabilities of the classes of boxes. [..., class]

    Detectors of a fixed list of labels may hold that there is no object for one more class, the last, which is left
    out. Others hold each class for likely or not by itself; those of words do.
    """
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if "input_ids" not in parameters(_bare(model)) and logits.shape[-1] - 1 == labels:
        return logits.softmax(-1)[..., :-1]
    return logits.sigmoid()


def _box(model: nn.Module, question: Question, logits: Tensor) -> Tensor:
    """The box whose class is read: the likeliest of the target, or of any. [batch]"""
    if question.at is not None:
        return _chosen(question.at, logits[..., 0], "at")
    likely = _likely(model, logits)
    if question.target is None:
        return likely.amax(-1).argmax(-1)
    target = _chosen(question.target, likely[:, 0], "target")
    return likely.gather(-1, target[:, None, None].expand(-1, likely.shape[1], 1))[..., 0].argmax(-1)


def _chosen(target: Index, logits: Tensor, what: str) -> Tensor:
    """One index of the second axis a sample. [batch]"""
    batch, classes = logits.shape
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.dtype.is_floating_point or chosen.dtype == torch.bool or chosen.shape not in ((), (batch,)):
        raise ValueError(f"{what} is one index, or one for each of the {batch} samples; got {target!r}")
    if bool((chosen < 0).any()) or bool((chosen >= classes).any()):
        among = "has logits at" if what == "at" else "scores"
        kinds = "positions" if what == "at" else "classes or tokens"
        raise ValueError(f"{what} {target!r}: this model {among} {classes} {kinds}, from 0 to {classes - 1}")
    return chosen.long().expand(batch)


def _embeds(found: Mapping[str, Tensor], question: Question) -> str | None:
    """The field of an embedding, or of the states that it is made of."""
    text, pooled = question.over in WORDS, ("pooler_output", "last_hidden_state")
    own = [k for k, v in found.items() if k.endswith("_embeds") and v.ndim == 2 and (k == "text_embeds") == text]
    order = (*own, *(pooled[::-1] if text or question.pool else pooled))
    return next((k for k in order if k in found), None)


def _embedding(question: Question, output: Any, real: Tensor | None) -> Tensor:
    """[n * batch, dim]"""
    states = _fields(output)[cast(str, question.output)]
    if states.ndim == 4:  # of a convolutional network
        states = states.flatten(2).mT
    if states.ndim == 2:
        return states
    kept = real if real is not None and real.shape == states.shape[:2] else states.new_ones(states.shape[:2]).bool()
    if question.pool == "cls":
        return states[:, 0]
    if question.pool == "last":
        at = (kept * torch.arange(1, kept.shape[1] + 1, device=kept.device)).argmax(-1)
        return states[torch.arange(len(states), device=states.device), at]
    return (states * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)


def _other(model: nn.Module, question: Question, rows: int) -> Tensor:
    """The embedding that is compared with. [batch, dim]"""
    other = question.beside
    if isinstance(other, Mapping):
        over = _over(other, question.over)
        value = other[over]
        given = value[..., None] if not value.dtype.is_floating_point else _features(over, value)[0]
        with torch.no_grad():
            other = _embedding(question, _run(model, other), _real(other, over, given, ("token",)))
    other = cast(Tensor, other).detach()
    if other.ndim != 2 or len(other) not in (1, rows):
        raise ValueError(f"beside {list(other.shape)}: give one input, or one for each of the {rows} samples")
    return other.expand(rows, -1)


def _repeat(value: Any, n: int, batch: int) -> Any:
    if n == 1 or not isinstance(value, Tensor) or not value.ndim:
        return value
    return _each(value, batch).repeat(n, *[1] * (value.ndim - 1))


def _each(value: Tensor, batch: int) -> Tensor:
    if len(value) != batch:
        raise ValueError(
            f"an input {list(value.shape)} does not hold one for each of {batch} samples, so they cannot be taken apart"
        )
    return value
