"""`regard explain`: which words or pixels a prediction rests on, as a page or a picture, and tables."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import catalog
from ..attribution import attribute
from ..attribution._words import joined
from ..evaluation.cross_attention_saliency import attends_across, cross_attention_saliency
from ..evaluation.judgement import judge
from ..evaluation.saliency_verbalization import saliency_verbalization, summary
from ..files import MARK, replaced
from ..loading import Loaded, load, parameters
from ..prediction import predict
from . import judged as judging
from . import painted as painting
from . import sound
from .inputs import InputError, drawn, hear, open_picture, png, prepare, read_text, writable
from .judged import Judged

FOR, AGAINST = (178, 84, 0), (62, 48, 140)  # orange speaks for the prediction, violet against it
PLAIN, INK = (255, 255, 255), (24, 24, 27)
SHOWN = 10  # words that the table names
MASKS = 100  # runs in which parts are hidden, beside which cross attention is laid
SIDE = 448  # pixels of a picture that is shown
FLAT = 4  # how many times longer than wide it may be: spectrograms are stretched
WIDTH, LINE, FONT, MARGIN = 900, 40, 19, 24  # of a text that is drawn
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{mark}">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #18181b;
  background: #fff }}
h1 {{ font-size: 1.3rem; margin-bottom: 0 }} p {{ margin: .3rem 0 1.2rem; color: #52525b }}
h2 {{ font-size: 1rem; margin: 1.4rem 0 .4rem }}
.text {{ font-size: 1.15rem; line-height: 2.1 }} .text span {{ padding: .25em .12em; border-radius: .2em;
  white-space: pre-wrap }}
table {{ border-collapse: collapse; font-size: .95rem }} td, th {{ text-align: left; padding: .1rem .8rem .1rem 0 }}
img {{ image-rendering: pixelated; max-width: 49%; height: auto }} code {{ font-size: .95em }}
.key i {{ display: inline-block; width: 1em; height: 1em; border-radius: .2em; vertical-align: -.15em }}
</style></head><body>
<h1>{title}</h1><p>{about}</p>
{body}
<p class="key"><i style="background: rgb{for_}"></i> speaks for it{against}. The strongest colour is the largest score,
{largest}.</p>
{sentences}
{judged}
</body></html>
"""


class Part(NamedTuple):
    """One of the inputs, scored: words, or the pixels of a picture (of a sound, its spectrogram)."""

    heading: str
    found: xr.DataArray  # of one sample
    picture: Image.Image | None = None


@dataclass
class Explained:
    """What `explain` wrote, and what it found."""

    file: Path
    said: str
    tables: list[Table]
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def explain(
    name: str,
    *,
    texts: Sequence[str] = (),
    file: Path | None = None,
    images: Sequence[Path] = (),
    audio: Path | None = None,
    written: str | None = None,
    target: str | None = None,
    against: str | None = None,
    method: str = "integrated_gradients",
    steps: int | None = None,
    words: bool = False,
    in_words: bool = False,
    judged: bool = False,
    out: Path = Path("regard-explain.html"),
    truncate: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Explained:
    """Score the words or pixels of an input for one prediction, and write a page (.html) or a picture (.png).

    Two texts, or two pictures, are compared by their embeddings; a picture with texts by a model of such pairs.
    in_words: sentences say what matters. judged: each map is checked, and the page says how.
    """
    console = console or Console(quiet=True)
    read = [read_text(text, file) for text in texts] or [read_text(None, file)]
    pictures = [open_picture(image, console) for image in images] or [None]
    heard = sound.read(audio) if audio is not None else None
    explained_by = catalog.method("attribution", method.replace("-", "_"))
    knobs: dict[str, Any] = {} if steps is None else {"steps": steps}
    takes = signature(explained_by).parameters
    if knobs and "steps" not in takes:
        raise InputError(f"--steps {steps}: {method} takes no steps")
    judgements: list[Judged] = []
    sentences: list[str] = []
    remarks: list[str] = []
    page_of = partial(_page, judgements=judgements, sentences=sentences)
    writers: dict[str, Callable[..., bytes]] = {".html": page_of, ".png": _drawn}
    if out.suffix not in writers:
        raise InputError(f"--out {out}: give a name that ends in {' or '.join(writers)}")
    writable(out.parent, out.name)
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code, dtype=torch.float32)  # gradients are small differences
    model: Any = loaded.model
    paints = hasattr(loaded.processor, "scheduler")
    if not hasattr(model, "main_input_name") and not paints:
        raise InputError(f"{type(model).__name__} makes no prediction of a class or token to explain")
    if paints:
        asked = {"--target": target, "--against": against, "--judge": judged, "--steps": steps, "--words": words}
        if refused := [option for option, value in asked.items() if value not in (None, False)]:
            raise InputError(f"{refused[0]}: {type(model).__name__} paints, and predicts nothing that it could be of")
        if len(read) > 1 or len(pictures) > 1:
            raise InputError(f"{type(model).__name__} paints one text, and reads one picture: give --text once")
    if written is not None and "decoder_input_ids" not in parameters(model):
        raise InputError(f"--written: {type(model).__name__} has no decoder beside an encoder; add the words to --text")

    def ask(
        inputs: Mapping[str, Any], *, words: bool = False, sample: int = 0, which: str = "", **asked: Any
    ) -> xr.DataArray:
        """The scores of one sample, which are judged before words are joined."""
        found = attribute(model, inputs, method=method, processor=loaded.processor, **asked, **knobs)
        tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
        if not found.attrs.get("knows_target", True) and any(asked.get(n) is not None for n in ("target", "against")):
            remarks.append(f"{method.replace('-', '_')} knows no target: of any other its scores are the same")
        if (note := _unknown(found[sample], tokenizer)) is not None:
            remarks.append(note)
        if judged:
            seen = "sound" if heard is not None else "picture"
            heading = {"input_ids": "words", "decoder_input_ids": "written"}.get(found.attrs["over"], seen)
            judgements.append(
                Judged(which + heading, judge(model, inputs, found, partial(explained_by, **knobs)).isel(batch=sample))
            )
        if words or (in_words and "text" in found.coords):
            found = joined(found, tokenizer)
        return found[sample]

    chosen = {"target": _index(target, read), "against": _index(against, read)}
    told = ""
    with console.status(f"asking {method}") as status, warnings.catch_warnings(record=True) as warned:
        if "progress" in takes:
            knobs["progress"] = lambda done, of: status.update(f"asking {method}: step {done} of {of}")
        if paints:
            of = painting.painted(loaded, method.replace("-", "_"), read[0], pictures[0])
            parts, inputs, told = [Part(*one) for one in of], {}, str(read[0])
        elif heard is not None or model.main_input_name == "input_features":
            inputs = hear(loaded, name, heard, read != [None] or pictures != [None])
            loud = spectrogram(inputs["input_features"][0], inputs.get("attention_mask"))
            parts = _one(loaded, inputs, loud, written, partial(ask, words=words), chosen)
            parts = [part._replace(heading=part.heading.replace("picture", "sound")) for part in parts]
        elif pictures != [None] and hasattr(model, "get_text_features"):
            parts = _pair(loaded, read, pictures, words, ask, chosen)
        elif len(read) == len(pictures) == 1:
            inputs, _ = prepare(loaded, name, read[0], pictures[0], truncate, 0)
            seen = as_given(pictures[0], inputs, loaded.processor)
            parts = _one(loaded, inputs, seen, written, partial(ask, words=words), chosen)
        else:
            parts = _compared(loaded, name, read, pictures, truncate, partial(ask, words=words), chosen)
            told = f"how alike the two {'texts' if len(read) > 1 else 'pictures'} are"
            inputs = {}
        if judged and inputs and attends_across(model):
            status.update("hiding parts of the input")
            sentences += _across(model, inputs)
    found = parts[-1].found
    told = f"{name}: {told or named_target(loaded, found, read)}"
    score = {"likeness": "cosine", "pair": "similarity"}.get(found.attrs.get("predicts", ""), "logit")
    score += " ahead" if "against" in found.coords else ""
    scored = f"{score} {float(found.score):.2f}" if "score" in found.coords else found.attrs["long_name"]
    about = f"{method.replace('-', '_')}; {scored}"
    for part in parts if in_words else ():
        sentences += _sentences(part, len(parts) > 1)
    page = writers[out.suffix](parts, told, about)
    with replaced(out) as draft:
        draft.write_bytes(page)
    notes = list(dict.fromkeys([*remarks, *(str(one.message) for one in warned)]))
    notes += [note for one in judgements for note in judging.notes(one)]
    tables = [_table(part, len(parts) > 1) for part in parts]
    tables += [judging.table(one, len(judgements) > 1) for one in judgements]
    return Explained(out, f"{told}  ({about})", tables, sentences, notes)


def _unknown(found: xr.DataArray, tokenizer: Any) -> str | None:
    """How many of the words the tokenizer does not know: one token stands for all of them."""
    unk = getattr(tokenizer, "unk_token_id", None)
    if unk is None or "id" not in found.coords or not (n := int((found["id"] == unk).sum())):
        return None
    return f"{n} of {found.sizes['token']} tokens are {tokenizer.unk_token}: the tokenizer does not know these words"


def _sentences(part: Part, several: bool) -> list[str]:
    """What is most important, and the largest snippets and words with their shares."""
    found = part.found
    if "image" in found.coords:  # patches are told of the picture
        found = found[(found.image < 0).values]
    head = [f"{part.heading}:"] if several else []
    try:
        return [*head, *map(str, (*summary(found), *saliency_verbalization(found, most=3)))]
    except ValueError as error:
        return [*head, f"{error}."]


def _across(model: Any, inputs: Mapping[str, Any]) -> list[str]:
    """How far cross attention says what hiding parts shows, of all that the model writes."""
    found = {}
    for on, of in (("input", "the input"), ("encoder", "what the encoder makes of it")):
        try:
            found[of] = cross_attention_saliency(model, inputs, on=on, masks=MASKS)  # type: ignore[arg-type]
        except ValueError as error:
            return [f"Cross attention was not laid beside hiding: {error}."]
    agree = " and ".join(f"{float(one['rho_all'].mean()):+.2f} of {of}" for of, one in found.items())
    heads = found["the input"]["rho"].mean("batch")
    layer, head = np.unravel_index(int(np.nan_to_num(heads.values, nan=-2).argmax()), heads.shape)
    tokens = int(found["the input"]["tokens"].sum())
    return [
        f"Cross attention, the mean of all heads, agrees with what hiding parts shows by {agree} (1: wholly), over the "
        f"{tokens} tokens that are written; of single heads most {heads.layer.values[layer]}.{head}, "
        f"{float(heads[layer, head]):+.2f} of the input."
    ]


def _index(name: str | None, texts: Sequence[str | None]) -> int | str | None:
    """A number, the number of a text among several, or what the model may know by this name."""
    if name is not None and len(texts) > 1 and name in texts:
        return list(texts).index(name)
    return int(name) if name is not None and name.isdecimal() else name


def _one(
    loaded: Loaded,
    inputs: dict[str, Any],
    picture: Image.Image | None,
    written: str | None,
    ask: Callable[..., xr.DataArray],
    chosen: dict[str, Any],
) -> list[Part]:
    """What a prediction of one input rests on, and, where a decoder has written something, on that."""
    if written is None:
        return shown_parts(ask(inputs, **chosen), picture)
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    with predict(loaded.model, inputs) as prediction:  # it begins as `generate` does
        begun = prediction.inputs["decoder_input_ids"]
    ids = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs = {**inputs, "decoder_input_ids": torch.cat([begun, ids.to(begun)], 1)}
    own = ask(inputs, **chosen, over="decoder_input_ids")
    return [*shown_parts(ask(inputs, **chosen), picture), Part("written", own)]


def _pair(
    loaded: Loaded,
    texts: Sequence[str | None],
    pictures: Sequence[Image.Image | None],
    words: bool,
    ask: Callable[..., xr.DataArray],
    chosen: dict[str, Any],
) -> list[Part]:
    """The words and the pixels of a picture and a text, of several the one that is explained."""
    model, processor = loaded
    if len(pictures) > 1 or texts[0] is None or not hasattr(processor, "tokenizer"):
        raise InputError(
            f"{type(model).__name__} compares one picture, --image, with texts, --text, by a processor of both"
        )
    inputs = dict(processor(text=list(texts), images=pictures[0], return_tensors="pt", padding=True))
    seen = ask(inputs, **chosen, over="pixel_values")
    read = ask(inputs, over="input_ids", words=words, sample=int(seen.target))
    return [Part("words", read), *shown_parts(seen, as_given(pictures[0], inputs, processor))]


def _compared(
    loaded: Loaded,
    name: str,
    texts: Sequence[str | None],
    pictures: Sequence[Image.Image | None],
    truncate: bool,
    ask: Callable[..., xr.DataArray],
    chosen: dict[str, Any],
) -> list[Part]:
    """The words or pixels of two texts or two pictures that make them alike."""
    if sorted((len(texts), len(pictures))) != [1, 2] or any(value is not None for value in chosen.values()):
        raise InputError("two texts, or two pictures, can be compared, and then there is no --target and no --against")
    each = zip([*texts] * (3 - len(texts)), [*pictures] * (3 - len(pictures)))
    both = [prepare(loaded, name, text, picture, truncate, 0)[0] for text, picture in each]
    parts = []
    for i, which in enumerate(("first", "second")):
        picture = as_given(pictures[i % len(pictures)], both[i], loaded.processor)
        scored = ask(both[i], beside=both[1 - i], which=f"{which} ")
        parts += [part._replace(heading=f"{which} {part.heading}") for part in shown_parts(scored, picture)]
    return parts


def named_target(loaded: Loaded, found: xr.DataArray, texts: Sequence[str | None]) -> str:
    """What is predicted, in words."""
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    labels = getattr(loaded.model.config, "id2label", None) or {}

    def named(index: int) -> str:
        kind = found.attrs["predicts"]
        if kind == "token":
            return repr(tokenizer.decode([index])) if hasattr(tokenizer, "decode") else f"token {index}"
        return repr(texts[index]) if kind == "pair" else str(labels.get(index, index))

    instead = f" rather than {named(int(found.against))}" if "against" in found.coords else ""
    return f"{named(int(found.target))}{instead}"


def shown_parts(found: xr.DataArray, picture: Image.Image | None) -> list[Part]:
    """Words, and what is seen of the picture: pixels, or the patches that are among the words."""
    if found.dims == ("row", "column"):
        shown = found if picture is None else found[:, : picture.width]  # of a sound, what is not silence at its end
        return [Part("picture", shown, picture)]
    if found.ndim > 1:
        raise InputError(f"scores over {', '.join(map(str, found.dims))} are read from Python: regard.attribute")
    parts = [Part("words", found)]
    if picture is not None and "image" in found.coords and bool((found.image == 0).any()):
        here = found[(found.image == 0).values]
        grid = np.zeros((int(here.row.max()) + 1, int(here.column.max()) + 1))
        grid[here.row.values, here.column.values] = here.values
        told = {k: here.coords[k] for k in ("target", "against", "score") if k in here.coords}
        parts.append(Part("picture", xr.DataArray(grid, told, ("row", "column"), attrs=found.attrs), picture))
    return parts


def as_given(picture: Image.Image | None, inputs: Mapping[str, Any], processor: Any) -> Image.Image | None:
    """The picture as the model is given it, cut and scaled, where that is a picture."""
    pixels = inputs.get("pixel_values")
    shown = drawn(processor, pixels) if picture is not None and getattr(pixels, "ndim", 0) == 4 else []
    return shown[0] if shown else picture


def spectrogram(features: Tensor, mask: Tensor | None) -> Image.Image:
    """A sound as the model takes it, dark where it is loud, without the silence that fills it up."""
    if mask is not None and mask.shape[1] == features.shape[1]:
        features = features[:, : int(mask[0].sum())]
    loud = features.double().numpy()
    low, high = np.quantile(loud, (0.02, 0.98))
    grey = 255 * (1 - ((loud - low) / max(high - low, 1e-9)).clip(0, 1))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _table(part: Part, several: bool) -> Table:
    """The words, or the quarters of the picture's sides, with the largest scores."""
    found = part.found
    table = Table(box=None, header_style="bold", title=part.heading if several else None, title_justify="left")
    if "token" in found.dims:
        columns, values = ["position", "token"], found.values
        rows = [[str(i), repr(str(t))] for i, t in enumerate(found.text.values)]
        if "image" in found.coords and (found.image >= 0).any():
            columns += ["row", "column"]
            places = zip(rows, found.row.values, found.column.values)
            rows = [[*row, *("" if at < 0 else str(at) for at in place)] for row, *place in places]
    else:
        columns, (values, rows) = ["rows", "columns"], _quarters(found.values)
    for column in [*columns, "score", "share"]:
        table.add_column(column, justify="right")
    whole = abs(values).sum() or 1.0
    for i in np.argsort(-abs(values), kind="stable")[: min(SHOWN, np.count_nonzero(values))]:
        table.add_row(*rows[i], f"{values[i]:+.4g}", f"{abs(values[i]) / whole:.0%}")
    return table


def _quarters(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[list[str]]]:
    """The sum over each of four by four parts of a picture, and where it is."""
    sides = [np.linspace(0, n, 5).astype(int) for n in values.shape]
    spans = [[(a, b) for a, b in pairwise(side)] for side in sides]
    sums = [values[a:b, c:d].sum() for a, b in spans[0] for c, d in spans[1]]
    return np.array(sums), [[f"{a}-{b - 1}", f"{c}-{d - 1}"] for a, b in spans[0] for c, d in spans[1]]


def _colour(share: float) -> tuple[int, int, int]:
    """White for 0, to the full colour for 1 or -1; a root makes small shares visible."""
    end, much = (FOR if share > 0 else AGAINST), min(1.0, abs(share)) ** 0.7
    return tuple(round((1 - much) * a + much * b) for a, b in zip(PLAIN, end))  # type: ignore[return-value]


def _ink(fill: tuple[int, int, int]) -> tuple[int, int, int]:
    return INK if sum(fill) > 380 else PLAIN


def _shares(found: xr.DataArray) -> NDArray[np.float64]:
    return found.values / (abs(found.values).max() or 1.0)


def _page(
    parts: Sequence[Part], title: str, about: str, judgements: Sequence[Judged] = (), sentences: Sequence[str] = ()
) -> bytes:
    body = "\n".join(f"<h2>{part.heading}</h2>\n" * (len(parts) > 1) + _body(part) for part in parts)
    signed = any((part.found.values < 0).any() for part in parts)
    largest = [f"{part.found.values.flat[abs(part.found.values).argmax()]:.4g}" for part in parts]
    return PAGE.format(
        mark=MARK,
        title=escape(title),
        about=escape(about),
        body=body,
        for_=FOR,
        against=f', <i style="background: rgb{AGAINST}"></i> against it' if signed else "",
        largest=" and ".join(dict.fromkeys(largest)),
        sentences="\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        judged=judging.page(judgements),
    ).encode()


def _body(part: Part) -> str:
    found, picture = part.found, part.picture
    if "token" in found.dims:
        spans = []
        for share, value, token in _written_words(found):
            fill = _colour(share)
            spans.append(
                f'<span style="background: rgb{fill}; color: rgb{_ink(fill)}" title="{value:.4g}">'
                f"{escape(_shown(token))}</span>"
            )
        return f'<div class="text">{_spaced(found, spans)}</div>'
    assert picture is not None
    both = (_resized(picture, found), _heat(found, picture))
    return "\n".join(f'<img alt="{alt}" src="{_data(one)}">' for alt, one in zip(("picture", "heat"), both))


def _written_words(found: xr.DataArray) -> list[tuple[float, float, str]]:
    """Share, score and text of each token, but for patches: the picture shows them."""
    patch = found.image.values >= 0 if "image" in found.coords else np.zeros(len(found), bool)
    every = zip(_shares(found), found.values, found.text.values, patch)
    return [(share, value, str(token)) for share, value, token, is_patch in every if not is_patch]


def _shown(token: str) -> str:
    return token.replace("\n", "↵") or " "


def _spaced(found: xr.DataArray, spans: list[str]) -> str:
    """Tokens that carry their blanks stand side by side, others apart."""
    carried = any(str(token).startswith(" ") for token in found.text.values)
    return ("" if carried else " ").join(spans)


def _drawn(parts: Sequence[Part], title: str, about: str) -> bytes:
    drawn = []
    for i, part in enumerate(parts):
        if "token" in part.found.dims:
            drawn.append(_sentence(part.found, *((title, about) if i == 0 else (part.heading, ""))))
            continue
        assert part.picture is not None
        both = _resized(part.picture, part.found), _heat(part.found, part.picture)
        image = Image.new("RGB", (2 * both[0].width + MARGIN, both[0].height), PLAIN)
        image.paste(both[0], (0, 0))
        image.paste(both[1], (both[0].width + MARGIN, 0))
        drawn.append(image)
    whole = Image.new("RGB", (max(one.width for one in drawn), sum(one.height for one in drawn)), PLAIN)
    y = 0
    for one in drawn:
        whole.paste(one, (0, y))
        y += one.height
    return png(whole)


def _sentence(found: xr.DataArray, title: str, about: str) -> Image.Image:
    """The words in lines, each on its colour."""
    font, small = ImageFont.load_default(FONT), ImageFont.load_default(FONT - 5)
    gap = 0 if any(str(t).startswith(" ") for t in found.text.values) else 6
    x, y, boxes = MARGIN, MARGIN + 2 * LINE, []
    for share, _, token in _written_words(found):
        shown = _shown(token)
        width = round(font.getlength(shown)) + 6
        if x + width > WIDTH - MARGIN and x > MARGIN:
            x, y = MARGIN, y + LINE
        boxes.append((x, y, width, shown, _colour(share)))
        x += width + gap
    image = Image.new("RGB", (WIDTH, y + LINE + MARGIN), PLAIN)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, INK, font)
    draw.text((MARGIN, MARGIN + 30), about, (82, 82, 91), small)
    for x, y, width, shown, fill in boxes:
        draw.rounded_rectangle((x, y, x + width, y + LINE - 8), 5, fill)
        draw.text((x + 3, y + 4), shown, _ink(fill), font)
    return image


def _resized(picture: Image.Image, found: xr.DataArray) -> Image.Image:
    """The picture as large as it is shown, in the shape of the model's pixels."""
    rows, columns = found.shape
    larger = SIDE / max(rows, columns)
    height, width = round(rows * larger), round(columns * larger)
    size = max(width, height // FLAT), max(height, width // FLAT)
    return picture.resize(size, Image.Resampling.NEAREST if max(picture.size) < SIDE // 4 else Image.Resampling.BICUBIC)


def _heat(found: xr.DataArray, picture: Image.Image) -> Image.Image:
    """Scores in colour over the picture, which is made grey and pale."""
    shares = _shares(found)
    colours = np.where(shares[..., None] > 0, FOR, AGAINST).astype(np.uint8)
    grey = _resized(picture, found).convert("L").convert("RGB")
    under = Image.blend(grey, Image.new("RGB", grey.size, PLAIN), 0.6)
    over = Image.fromarray(colours).resize(under.size, Image.Resampling.NEAREST)
    much = Image.fromarray((255 * abs(shares) ** 0.7).clip(0, 255).astype(np.uint8))
    much = much.resize(under.size, Image.Resampling.NEAREST)
    return Image.composite(over, under, much)


def _data(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
