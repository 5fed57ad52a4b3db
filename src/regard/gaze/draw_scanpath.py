"""A scanpath over its picture: still, or moving."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ..data.loaders import Scanpath
from ..files import MARK, refuse_foreign, replaced

KINDS = (".png", ".svg", ".gif", ".html")
LONGEST = 1024  # pixels of the longer side of what is drawn
COLOUR, PAST = "#ff3b30", "#ffd60a"  # of the present fixation, and of those before
UNTIMED = 300.0  # ms of a fixation whose duration is not known


def draw_scanpath(
    path: Scanpath, picture: Image.Image, out: str | Path, *, title: str = "", speed: float = 1.0
) -> Path:
    """Draw fixations as numbered circles, and what joins them, over the picture that was looked at; returns the file.

    The name's end says what is made: `.png` and `.svg` show all at once, `.gif` and `.html` one after another, over and
    over. SVG and HTML hold all that they need. Circles grow with durations, by area, where these are known; a fixation
    of unknown duration moves on after 0.3 s. Fixations outside the picture are drawn at its border, hollow.

    picture: of any size; it is stretched to the screen of the path. title: what it is of, for those who cannot see it.
    speed: 2 is twice as fast. ValueError for an empty path, or a name with another end; FileExistsError where the file
    is one that Regard did not write.
    """
    out = Path(out)
    check_drawing(out)
    if not len(path):
        raise ValueError("a path without fixations cannot be drawn")
    if speed <= 0:
        raise ValueError(f"speed={speed} is above 0")
    scale = LONGEST / max(path.size)
    size = tuple(max(1, round(side * scale)) for side in path.size)
    screen = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    spots = _spots(path, size)
    lasting = [1.0] * len(path) if path.durations is None else (path.durations / UNTIMED).tolist()
    lasting = [max(0.1, d) * UNTIMED / speed for d in lasting]
    made = {
        ".png": lambda: _png(screen, spots),
        ".gif": lambda: _gif(screen, spots, lasting),
        ".svg": lambda: _svg(screen, spots, title or _said(path)).encode(),
        ".html": lambda: _html(screen, spots, title or _said(path), lasting).encode(),
    }[out.suffix.lower()]()
    with replaced(out) as draft:
        Path(draft).write_bytes(made)
    return out


def check_drawing(out: Path) -> None:
    """ValueError where no scanpath can be drawn into a file of this name, FileExistsError where it is another's."""
    if out.suffix.lower() not in KINDS:
        raise ValueError(f"draw_scanpath makes {', '.join(KINDS)}: got {out.name!r}")
    refuse_foreign(out)


class _Spots:
    """Places in pixels of what is drawn, radii, and which are really there."""

    def __init__(self, places: NDArray[np.float64], radii: NDArray[np.float64], inside: NDArray[np.bool_]) -> None:
        self.places, self.radii, self.inside = places, radii, inside
        near = np.hypot(*(places[:, None] - places[None]).T) < 0.5 * radii
        before = [[j for j in range(i) if near[i, j]] for i in range(len(places))]
        # A circle that hides earlier ones has their numbers too.
        self.labels = [" ".join(str(j + 1) for j in (*hidden, i)) for i, hidden in enumerate(before)]

    def letters(self, i: int) -> float:
        """How high the letters of a number are, so that it fits its circle."""
        return float(self.radii[i]) * min(1.1, 3.0 / len(self.labels[i]))

    def __len__(self) -> int:
        return len(self.places)


def _spots(path: Scanpath, size: tuple[int, ...]) -> _Spots:
    shares = np.asarray(path.places, np.float64) / path.size
    places = np.clip(shares, 0, 1) * size
    inside = ((shares >= 0) & (shares <= 1)).all(1)
    radius = 0.022 * max(size)
    if path.durations is None or not path.durations.any():
        return _Spots(places, np.full(len(path), radius), inside)
    share = path.durations / path.durations.mean()
    return _Spots(places, radius * np.sqrt(np.clip(share, 0.3, 4)), inside)


def _paint(screen: Image.Image, spots: _Spots, until: int, present: int | None = None) -> Image.Image:
    """Fixations before `until`; `present` in another colour."""
    scale = 2  # drawn larger, so that edges are smooth
    layer = Image.new("RGBA", (scale * screen.width, scale * screen.height))
    pen = ImageDraw.Draw(layer)
    at = [tuple(scale * place) for place in spots.places[:until]]
    if len(at) > 1:
        pen.line(at, fill="black", width=scale * 6, joint="curve")
        pen.line(at, fill="white", width=scale * 3, joint="curve")
    for i, ((x, y), radius, inside) in enumerate(zip(at, scale * spots.radii, spots.inside)):
        colour = COLOUR if i == present else PAST
        box = [x - radius, y - radius, x + radius, y + radius]
        pen.ellipse(box, fill=colour + "d0" if inside else None, outline="black" if inside else colour, width=scale * 2)
        font = ImageFont.load_default(size=scale * spots.letters(i))
        pen.text((x, y), spots.labels[i], fill="black", anchor="mm", font=font, stroke_width=scale, stroke_fill="white")
    over = layer.resize(screen.size, Image.Resampling.LANCZOS)
    return Image.alpha_composite(screen.convert("RGBA"), over).convert("RGB")


def _png(screen: Image.Image, spots: _Spots) -> bytes:
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    _paint(screen, spots, len(spots)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _gif(screen: Image.Image, spots: _Spots, lasting: list[float]) -> bytes:
    frames = [_paint(screen, spots, i + 1, i) for i in range(len(spots))]
    frames.append(_paint(screen, spots, len(spots)))
    palette = screen.quantize(200)  # one for all, so that the picture does not flicker
    marks = Image.new("P", (1, 1))
    marks.putpalette((palette.getpalette() or [])[: 3 * 200] + _ramp())
    frames = [frame.quantize(palette=marks, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    durations = [max(20, round(d)) for d in (*lasting, 1500.0)]
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=False,
        disposal=1,
        comment=MARK,
    )
    return buffer.getvalue()


def _ramp() -> list[int]:
    """Colours of the marks, and steps from black to white. [168]"""
    marks = [int(colour[i : i + 2], 16) for colour in (COLOUR, PAST) for i in (1, 3, 5)]
    return marks + [value for step in range(54) for value in [round(255 * step / 53)] * 3]


def _svg(screen: Image.Image, spots: _Spots, title: str, lasting: list[float] | None = None) -> str:
    """With `lasting`, ms, fixations appear one after another, in a loop, where motion is not unwanted."""
    buffer = io.BytesIO()
    screen.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = screen.size
    marks, style, total = [], "", 1500.0 + sum(lasting or [])
    for i, ((x, y), radius, inside) in enumerate(zip(spots.places, spots.radii, spots.inside)):
        fill = f'fill="{PAST}" fill-opacity="0.82" stroke="black"' if inside else f'fill="none" stroke="{PAST}"'
        line = ""
        if i:
            ends = " ".join(f'{end}="{value:.1f}"' for end, value in zip(("x1", "y1"), spots.places[i - 1]))
            ends += f' x2="{x:.1f}" y2="{y:.1f}"'
            line = f'<line {ends} stroke="black" stroke-width="6"/><line {ends} stroke="white" stroke-width="3"/>'
        marks.append(
            f'<g class="f{i}">{line}</g>',
        )
        marks.append(
            f'<g class="f{i}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {fill} stroke-width="2"/>'
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{spots.letters(i):.1f}">{spots.labels[i]}</text></g>'
        )
        if lasting is not None:
            starts = 100 * sum(lasting[:i]) / total
            style += f".f{i}{{animation:a{i} {total / 1000:.2f}s step-end infinite}}"
            begin = "" if i == 0 else "0%{opacity:0}"
            style += f"@keyframes a{i}{{{begin}{starts:.2f}%{{opacity:1}}}}"
    if style:
        style = f"@media (prefers-reduced-motion: no-preference){{{style}}}"
    lines, circles = marks[::2], marks[1::2]  # circles lie over all lines
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{html.escape(title)}</title><!-- {MARK} -->"
        f"<style>text{{font-family:sans-serif;text-anchor:middle;dominant-baseline:central;"
        f"paint-order:stroke;stroke:white;stroke-width:2px}}{style}</style>"
        f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/>'
        f"{''.join(lines)}{''.join(circles)}</svg>"
    )


def _html(screen: Image.Image, spots: _Spots, title: str, lasting: list[float]) -> str:
    said = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{said}</title>'
        f'<meta name="generator" content="{MARK}"><meta name="viewport" content="width=device-width">'
        f"<style>body{{margin:1rem;font-family:sans-serif;"
        f"background:#111;color:#eee}}svg{{max-width:100%;max-height:90vh}}</style></head><body>"
        f"{_svg(screen, spots, title, lasting)}<p>{said}</p></body></html>"
    )


def _said(path: Scanpath) -> str:
    places = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in path.places)
    return f"{len(path)} fixations on {path.size[0]} by {path.size[1]} pixels: {places}"
