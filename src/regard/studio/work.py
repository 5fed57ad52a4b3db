"""What the studio does: it looks, and changes and looks again; each run is kept in a folder of the user's."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .. import recording as recordings
from .. import report, sites
from ..cli import beside, look
from ..cli.inputs import InputError, Written, hear, png, prepare, seen, written
from ..data import media
from ..files import written_aside
from ..interventions import after_steps, painted
from ..loading import INDEX, Loaded, load, parameters, zoo
from ..observations import observe
from ..prediction import chances, writes
from ..recording import statistic
from ..seam import intervene, record
from ..tokens import chat_roles
from . import steps as stepping
from .jobs import Job
from .steps import Name, Step, Upload

BARS = 10  # of the likeliest next tokens, before and after
MOST_TEXT = 400_000  # characters
LOADED = 2  # models that stay in memory
HELD = 24  # answers that stay in memory
PAGES = 6  # recordings that do, with all their weights
UPLOADS = 16
MOST_LABELS = 1000
OBSERVED = 4096  # tokens up to which it is looked for what stands out
EVERY = 0.4  # seconds between pages while a model generates
HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
SOURCES = ("source.png", "source.wav")  # the file that a recording was made of
SOUND = (b"RIFF", b"RIFX")
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", re.ASCII)


class Turn(BaseModel):
    role: Annotated[str, Field(pattern="^(system|user|assistant)$")]
    content: Annotated[str, Field(max_length=MOST_TEXT)]


class Given(BaseModel):
    """What a model is to look at."""

    model: Name = "reader"
    text: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    turns: Annotated[list[Turn], Field(max_length=200)] = []
    upload: Upload | None = None
    generate: Annotated[int, Field(strict=True, ge=0, le=512)] = 0


class Change(BaseModel):
    """Steps to be taken on what a recording was made of."""

    recording: Name
    steps: Annotated[list[Step], Field(max_length=64)]


@dataclass
class Answer:
    """What a model gave: words or classes, and the probabilities that the first of them was chosen by."""

    said: str = ""
    kind: str = ""  # token, class, or none of them
    shares: Tensor | None = None
    picture: Image.Image | None = None
    labels: Any = None
    wrote: Written | None = None  # the ids of prompt and words, and what each word was chosen by


@dataclass
class Prepared:
    inputs: dict[str, Any]
    roles: list[str] | None = None
    picture: Image.Image | None = None
    pictures: list[Image.Image] = field(default_factory=list)
    text: str = ""
    generate: int = 0
    source: tuple[str, bytes] | None = None  # the file that was given: its name here, and what it holds


@dataclass
class Again:
    """What a recording was made of, to run it anew."""

    given: Given
    loaded: Loaded
    ready: Prepared
    inputs: dict[str, Any]
    next: int = -1  # the token that comes next, where one of those generated is asked for


@dataclass
class Page:
    header: dict[str, Any]
    blocks: list[report.Block]


class _Kept(OrderedDict[str, Any]):
    """The last few of what was put in."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: str, value: Any) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)


class _Tokens(BaseStreamer):
    """Hears each token as a model generates it."""

    def __init__(self, heard: Any) -> None:
        self.heard, self.ids, self.begun = heard, [], False

    def put(self, value: Tensor) -> None:
        if self.begun:  # the first is the prompt
            self.ids += value.flatten().tolist()
            self.heard(self.ids)
        self.begun = True

    def end(self) -> None:
        pass


class Desk:
    """Models, uploads and recordings of one studio. `folder` is the user's; `models` a folder of further models."""

    def __init__(self, folder: Path, models: Path | None = None, named: str | None = None) -> None:
        self.folder, self.models, self.named = folder, models, named
        folder.mkdir(parents=True, exist_ok=True)
        self._loaded, self._pages, self._uploads = _Kept(LOADED), _Kept(PAGES), _Kept(UPLOADS)
        self._answers, self._loading, self._saving = _Kept(HELD), threading.Lock(), threading.Lock()

    # What there is.

    def names(self) -> dict[str, str]:
        """Models by name: where each is."""
        found = {name: name for name in zoo()}
        if self.models is not None:
            for path in sorted(self.models.iterdir()):
                if (path / "config.json").is_file() or (path / INDEX).is_file():
                    found[path.name] = str(path)
        if self.named is not None:
            found = {self.named: self.named} | found
        return found

    def where(self, name: str) -> str:
        """What to load by a name that a page gave: one of `names`, or a hub id, never a path."""
        names = self.names()
        if name in names:
            return names[name]
        if HUB.fullmatch(name) and not Path(name).exists():
            return name
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.7)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise InputError(
            f"{name!r} is no model of this studio{hint}; choose one of {', '.join(names)}, or give a hub id"
        )

    def model(self, name: str) -> Loaded:
        with self._loading:
            if name not in self._loaded:
                self._loaded.keep(name, load(self.where(name)))
            return self._loaded[name]

    def upload(self, data: bytes) -> dict[str, Any]:
        """A picture or a WAV file, decoded; DataError where it is none, or too large."""
        sound = data[:4] in SOUND
        held = media.sound(data, "the sound") if sound else media.picture(data, "the picture")
        key = secrets.token_hex(8)
        self._uploads.keep(key, (held, data))
        told = {"seconds": round(held.seconds, 2)} if sound else {"width": held.width, "height": held.height}
        return {"id": key, "kind": "sound" if sound else "picture", **told}

    def keep(self, data: bytes) -> str:
        """A file that is read later."""
        key = secrets.token_hex(8)
        self._uploads.keep(key, (None, data))
        return key

    def file(self, key: str) -> bytes:
        if key not in self._uploads:
            raise InputError("the file is no longer here; choose it again")
        return self._uploads[key][1]

    def picture(self, key: str) -> Image.Image:
        """A picture that was uploaded."""
        self.file(key)
        held = self._uploads[key][0]
        if not isinstance(held, Image.Image):
            raise InputError("the file is no picture")
        return held

    def takes(self, job: Job, name: str) -> None:
        """Tell what a model takes and gives."""
        job.tell("progress", what=f"loading {name}")
        loaded = self.model(name)
        model, processor = loaded
        paints = hasattr(processor, "scheduler")
        main = getattr(model, "main_input_name", "")
        sees = any("pixel_values" in parameters(m) for m in model.modules() if hasattr(m, "config"))
        found = {} if paints else sites.find(model)
        job.tell(
            "model",
            name=name,
            kind=type(model).__name__,
            takes={
                "text": paints or main == "input_ids",
                "chat": bool(getattr(processor, "chat_template", None)) and main == "input_ids" and not paints,
                "picture": sees and not paints,
                "sound": main == "input_features",
                "generate": not paints and writes(model),
                "paints": paints,
            },
            labels=list(getattr(model.config, "id2label", {}).values())[:MOST_LABELS] if _classes(model) else [],
            sites=len(found),
        )

    # Recordings.

    def listed(self) -> list[dict[str, Any]]:
        """The recordings of the folder, the newest first."""
        found = []
        for path in sorted(self.folder.iterdir(), reverse=True):
            if ID.fullmatch(path.name):
                with contextlib.suppress(OSError, ValueError):  # one that is being written has no card yet
                    found.append({"id": path.name, **json.loads((path / "card.json").read_text("utf-8"))})
        return found

    def card(self, key: str) -> dict[str, Any]:
        path = self.folder / key / "card.json"
        if ID.fullmatch(key) and not path.is_file():
            with self._saving:  # its page may have been told a moment ago, and its card comes last
                pass
        if not ID.fullmatch(key) or not path.is_file():
            raise KeyError(f"there is no recording {key!r}")
        return json.loads(path.read_text("utf-8"))

    def page(self, key: str) -> Page:
        if key not in self._pages:
            self.card(key)
            tree = recordings.open(self.folder / key / "recording.zarr")[0]
            pictures = [Image.open(one) for one in sorted((self.folder / key).glob("picture-*.png"))]
            self._pages.keep(key, _page(tree, pictures))
        return self._pages[key]

    def _keep(
        self,
        key: str,
        tree: xr.DataTree,
        pictures: Sequence[Image.Image],
        card: dict[str, Any],
        source: tuple[str, bytes] | None,
    ) -> None:
        """Save a recording; its card comes last, so that what is listed is whole."""
        at = self.folder / key
        at.mkdir()
        recordings.Recording([tree]).save(at / "recording.zarr")
        for i, picture in enumerate(pictures):
            with written_aside(at / f"picture-{i}.png", lasting=True) as draft:
                draft.write_bytes(png(picture))
        if source is not None:
            with written_aside(at / source[0], lasting=True) as draft:
                draft.write_bytes(source[1])
        with written_aside(at / "card.json", lasting=True) as draft:
            draft.write_text(json.dumps(card), "utf-8")

    # Look and change.

    def look(self, job: Job, given: Given) -> None:
        job.tell("progress", what=f"loading {given.model}")
        loaded = self.model(given.model)
        ready = self._prepared(loaded, given)
        self._recorded(job, loaded, given, ready, [])

    def change(self, job: Job, change: Change) -> None:
        steps = [step for step in change.steps if step.on]
        if not steps:
            raise InputError("no step is on: mute a head, cut what flows between tokens, or add an intervention")
        again = self.again(change.recording)
        loaded, ready = again.loaded, again.ready
        before = self.answer(change.recording, again)
        after = self._answer(loaded, ready, steps)
        job.tell("answer", **compared(loaded, before, after))
        self._recorded(job, loaded, again.given, ready, steps, base=change.recording, answer=after)

    def again(self, key: str) -> Again:
        """What a recording was made of."""
        given = Given(**self.card(key)["given"])
        loaded = self.model(given.model)
        source = next((path for path in self.sources(key) if path.is_file()), None)
        held = None if source is None else _decoded(source.read_bytes())
        ready = self._prepared(loaded, given, held)
        return Again(given, loaded, ready, ready.inputs)

    def sources(self, key: str) -> list[Path]:
        """Where the file that a recording was made of is, if it was made of one."""
        return [self.folder / key / name for name in SOURCES]

    def answer(self, key: str, again: Again) -> Answer:
        """What a model gave as a recording was made."""
        found = self._answers.get(key) or self._answer(again.loaded, again.ready, [])
        self._answers.keep(key, found)
        return found

    def _prepared(self, loaded: Loaded, given: Given, held: Any = None) -> Prepared:
        model, processor = loaded
        source = None
        if given.upload and held is None:
            if given.upload not in self._uploads:
                raise InputError("the file is no longer here; choose it again")
            held, data = self._uploads[given.upload]
            source = (SOURCES[1], data) if isinstance(held, media.Sound) else (SOURCES[0], png(held))
        sound = held if isinstance(held, media.Sound) else None
        picture = held if isinstance(held, Image.Image) else None
        text = given.text if given.text and given.text.strip() else None
        if hasattr(processor, "scheduler"):
            if text is None or picture is not None or given.turns:
                raise InputError(f"{type(model).__name__} paints a text; give it one, and nothing else")
            return Prepared({}, text=text)
        if sound is not None or model.main_input_name == "input_features":
            inputs = hear(loaded, given.model, sound, text is not None or picture is not None)
            return Prepared(inputs, generate=given.generate or look.DECODED, source=source)
        roles = None
        if given.turns:
            inputs, roles = _chat(loaded, given, picture)
        else:
            inputs, roles = prepare(loaded, given.model, text, picture, False, given.generate)
        decoder = bool(getattr(model.config, "is_encoder_decoder", False)) and model.can_generate()
        generate = given.generate or (look.DECODED if decoder else 0)
        if generate and not writes(model):
            raise InputError(f"{type(model).__name__} does not generate; set the tokens to generate to 0")
        shown = seen(processor, inputs, picture) if picture else []
        return Prepared(inputs, roles, picture, shown, text or "", generate, source)

    def _answer(self, loaded: Loaded, ready: Prepared, steps: Sequence[Any]) -> Answer:
        with _taken(loaded, ready, steps) as options:
            return self._run(loaded, ready, options)

    def _run(self, loaded: Loaded, ready: Prepared, options: dict[str, Any], streamer: Any = None) -> Answer:
        """Run the model once, under whatever is open around it."""
        model, processor = loaded
        if hasattr(processor, "scheduler"):
            picture = painted(processor, {"prompt": [ready.text]}, **options)[0]
            return Answer(picture=Image.fromarray((255 * picture).round().astype(np.uint8)))
        if ready.generate:
            wrote = written(loaded, ready.inputs, ready.generate, streamer=streamer, **options)
            tokenizer = getattr(processor, "tokenizer", processor)
            said = tokenizer.decode(wrote.ids[wrote.start :], skip_special_tokens=True)
            return Answer(said, "token", wrote.scores[0].float().softmax(-1), labels=tokenizer, wrote=wrote)
        if options:
            raise InputError("a step changes what is said next: set the tokens to generate to 1 or more")
        out = model(**ready.inputs)
        logits = getattr(out, "logits", None)
        if logits is None:
            return Answer()
        if logits.ndim == 2 and hasattr(model.config, "id2label"):
            names = model.config.id2label
            best = int(logits[0].argmax())
            return Answer(str(names.get(best, best)), "class", chances(model, logits[0].float()), labels=names)
        if writes(model):
            return Answer(
                "", "token", logits[0, -1].float().softmax(-1), labels=getattr(processor, "tokenizer", processor)
            )
        return Answer()

    def _recorded(
        self,
        job: Job,
        loaded: Loaded,
        given: Given,
        ready: Prepared,
        steps: Sequence[Any],
        base: str | None = None,
        answer: Answer | None = None,
    ) -> None:
        """Run the model, tell its page, and save what was recorded."""
        model, processor = loaded
        began = time.perf_counter()
        paints = hasattr(processor, "scheduler")
        key = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        calls = len(sites.find(model)) * max(1, ready.generate)

        @statistic("batch", title="Progress")
        def tick(call: Any) -> None:
            nonlocal done
            job.check()
            done += 1
            if done % 16 == 0:
                job.tell("progress", what="painting" if paints else "looking", done=done, of=calls)

        done, shown_at = 0, time.perf_counter()

        def heard(ids: list[int]) -> None:
            nonlocal shown_at
            job.check()
            job.tell("said", text=getattr(processor, "tokenizer", processor).decode(ids, skip_special_tokens=True))
            if time.perf_counter() - shown_at > EVERY and len(recording):
                self._pages.keep(key, _page(recording[0], ready.pictures, observed=False))
                shown_at = time.perf_counter()
                job.tell("page", id=key, partial=True)

        if paints:
            with _taken(loaded, ready, steps) as options:
                run, picture, _ = look.painting(loaded, given.model, ready.text, tick, **options)
            if picture is None:
                raise InputError("the painting was interrupted")
            tree, answer, pictures = run[0], Answer(picture=picture), [look.enlarged(picture)]
        else:
            attributes = look.attributes(model, given.model) | {"attention": model.config._attn_implementation}
            statistics = look.statistics(model, ready.inputs, ready.generate) | {"tick": tick}
            streamer = _Tokens(heard) if ready.generate and base is None else None
            with (
                _taken(loaded, ready, steps) as options,
                record(model, processor=processor, roles=ready.roles, attributes=attributes, **statistics) as recording,
            ):
                answer = self._run(loaded, ready, options, streamer)
            if not len(recording):
                raise InputError(f"{type(model).__name__} attended to nothing that can be read")
            if answer.wrote is not None:
                look.note_said(recording, loaded, answer.wrote)
            tree, pictures = recording[0], ready.pictures
        tree.attrs["seconds"] = round(time.perf_counter() - began, 2)
        self._pages.keep(key, _page(tree, pictures))
        self._answers.keep(key, answer)
        told = {"said": answer.said, "bars": bars(answer)}
        if answer.picture is not None:
            told["picture"] = _address(answer.picture)
        stored = given.model_dump() | ({"upload": "0" * 16} if given.upload else {})
        card = {
            "model": given.model,
            "title": _title(given),
            "when": time.time(),
            "said": answer.said,
            "base": base,
            "given": stored,
            "steps": [step.model_dump() for step in steps],
        }
        source = ready.source
        if source is None and base is not None:
            there = next((path for path in self.sources(base) if path.is_file()), None)
            source = None if there is None else (there.name, there.read_bytes())
        with self._saving:
            job.tell("page", id=key, partial=False, base=base, **told)
            self._keep(key, tree, pictures, card, source)
        job.tell("saved", id=key)

    def python(self, change: Change) -> str:
        """Code that does the same from a terminal."""
        again = self.again(change.recording)
        source = next((path for path in self.sources(change.recording) if path.is_file()), None)
        return code(again, self.where(again.given.model), [step for step in change.steps if step.on], source)


@contextlib.contextmanager
def _taken(loaded: Loaded, ready: Prepared, steps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The steps in order around a run; gives what the run is to be called with."""
    model, processor = loaded
    paints = hasattr(processor, "scheduler")
    given = {"prompt": [ready.text]} if paints else ready.inputs
    made = [stepping.made(step, loaded, given, ready.picture) for step in steps]
    inside = [thing for thing in made if not callable(thing)]
    options: dict[str, Any] = {}
    if says := [thing for thing in made if callable(thing)]:
        if paints:
            raise InputError(f"{type(says[0]).__name__} changes words that are said, and {type(model).__name__} paints")
        options["logits_processor"] = says
    options |= after_steps(inside)
    with torch.inference_mode(), intervene(model, *inside):
        yield options


def _chat(loaded: Loaded, given: Given, picture: Image.Image | None) -> tuple[dict[str, Any], list[str] | None]:
    """Turns in the model's own template."""
    model, processor = loaded
    if picture is not None:
        raise InputError("a picture goes with a text, not with turns; leave one out")
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(tokenizer, "chat_template", None) and not getattr(processor, "chat_template", None):
        raise InputError(f"{given.model} has no chat template; give a text")
    turns = [turn.model_dump() for turn in given.turns]
    if not hasattr(tokenizer, "chat_template") or not tokenizer.chat_template:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return {
            k: v
            for k, v in tokenizer(prompt, add_special_tokens=False, return_tensors="pt").items()
            if k in parameters(model)
        }, None
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    roles = chat_roles(tokenizer, turns, add_generation_prompt=True)
    return {k: v for k, v in inputs.items() if k in parameters(model)}, roles


def _classes(model: Any) -> bool:
    return not writes(model) and type(model).__name__.endswith("Classification")


def _decoded(data: bytes) -> Any:
    """A file of `SOURCES`."""
    return media.sound(data, "the sound") if data[:4] in SOUND else media.picture(data, "the picture")


def _page(tree: xr.DataTree, pictures: Sequence[Image.Image], observed: bool = True) -> Page:
    """What a page draws. observed: whether what stands out is looked for, which of long texts takes too long."""
    longest = max((node.sizes.get("query", 0) for node in tree.children.values()), default=0)
    findings = observe(tree) if observed and longest <= OBSERVED else ()
    return Page(*report.pack(tree, findings=findings, pictures=pictures))


def _title(given: Given) -> str:
    text = given.text or " / ".join(turn.content for turn in given.turns) or ("a file" if given.upload else "")
    return " ".join(text.split())[:80]


def _address(picture: Image.Image) -> str:
    return report.picture(look.enlarged(picture))["source"]


def bars(answer: Answer, among: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The likeliest first tokens or classes with their probabilities; of `among` where it is given."""
    if answer.shares is None:
        return []
    if among is None:
        among = answer.shares.topk(min(BARS, len(answer.shares))).indices.tolist()

    def named(i: int) -> str:
        return str(answer.labels.get(i, i)) if answer.kind == "class" else answer.labels.decode([i])

    return [{"id": i, "label": named(i), "share": float(answer.shares[i])} for i in among]


def compared(loaded: Loaded, before: Answer, after: Answer) -> dict[str, Any]:
    """Both answers as the page of `regard steer` has them: the words, and how likely they were where they part."""
    told: dict[str, Any] = {}
    if before.wrote is not None and after.wrote is not None:
        both = [beside.Said(one.said, one.wrote.ids[one.wrote.start :], one.wrote.scores) for one in (before, after)]
        told["said"] = dict(zip(("before", "after"), beside.pieces(before.said, after.said)))
        told["step"] = beside.step(*both, loaded.processor)._asdict()
    elif before.shares is not None and after.shares is not None:
        among = list(dict.fromkeys(bar["id"] for answer in (before, after) for bar in bars(answer)))
        pairs = zip(bars(before, among), bars(after, among))
        rows = [{"label": x["label"], "before": x["share"], "after": y["share"]} for x, y in pairs]
        told["bars"] = sorted(rows, key=lambda row: -max(row["before"], row["after"]))[: BARS + 2]
        told["kind"] = before.kind
    if before.picture is not None and after.picture is not None:
        told["views"] = [beside.shown(beside.View("", before.picture, after.picture))]
    return told


def code(again: Again, where: str, steps: Sequence[Any], source: Path | None) -> str:
    """Python that does what the studio did: `shares` are the probabilities of what comes first, `said` the words,
    `picture` what was painted."""
    given, generate, paints = again.given, again.ready.generate, hasattr(again.loaded.processor, "scheduler")
    imports = [*stepping.imports(steps)]
    loaded = "regard.loading.Loaded(model, processor)"
    body = [f"model, processor = regard.load({where!r})"]
    pictured = again.ready.picture is not None
    if paints:
        imports.append("from regard.interventions import after_steps, painted")
        body.append(f"inputs = {{'prompt': [{given.text!r}]}}")
    elif given.turns:
        turns = [turn.model_dump() for turn in given.turns]
        body += [
            f"turns = {turns!r}",
            "tokenizer = getattr(processor, 'tokenizer', processor)",
            "inputs = dict(tokenizer.apply_chat_template(",
            "    turns, add_generation_prompt=True, return_dict=True, return_tensors='pt'",
            "))",
        ]
    elif source is not None and not pictured:
        imports += ["from pathlib import Path", "from regard.cli import sound", "from regard.cli.inputs import hear"]
        body.append(f"inputs = hear({loaded}, {given.model!r}, sound.read(Path({str(source)!r})), False)")
    else:
        text = given.text if given.text and given.text.strip() else None
        imports.append("from regard.cli.inputs import prepare")
        if pictured:
            imports += ["from pathlib import Path", "from regard.cli.inputs import open_picture"]
            body.append(f"picture = open_picture(Path({str(source)!r}))")
        named = f"{given.model!r}, {text!r}, {'picture' if pictured else None}"
        body.append(f"inputs, _ = prepare({loaded}, {named}, False, {given.generate})")
    made = [(stepping.written(step, pictured), stepping.processes(step)) for step in steps]
    body += ["steps = [", *(f"    {one}," for one, says in made if not says), "]"]
    if more := [f"    {one}," for one, says in made if says]:
        body += ["processors = [", *more, "]"]
    body.append("with torch.inference_mode(), regard.intervene(model, *steps):")
    if paints:
        body += [
            "    pixels = painted(processor, inputs, **after_steps(steps))[0]",
            "picture = Image.fromarray((255 * pixels).round().astype('uint8'))",
        ]
        imports.append("from PIL import Image")
    elif generate:
        imports.append("from regard.cli.inputs import written")
        body += [
            f"    out = written({loaded}, inputs, {generate}{', logits_processor=processors' if more else ''})",
            "shares = out.scores[0].float().softmax(-1)",
            "tokenizer = getattr(processor, 'tokenizer', processor)",
            "said = tokenizer.decode(out.ids[out.start :], skip_special_tokens=True)",
            "print(said)",
        ]
    else:
        imports.append("from regard.prediction import chances")
        body += [
            "    logits = model(**inputs).logits",
            "shares = chances(model, (logits[0, -1] if logits.ndim == 3 else logits[0]).float())",
        ]
    if not paints:
        body += ["for share, i in zip(*shares.topk(min(10, len(shares)))):", "    print(f'{share:.1%}', int(i))"]
    return "\n".join(["import torch", "", "import regard", *imports, "", *body]) + "\n"
