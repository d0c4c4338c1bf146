"""Printed characters from the fonts inside packages, as small grey images, and their distortions."""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calmerge._errors import DataError, MissingExtra

GLYPH = 40  # pixels a side of a rendered character, before distortion
IMAGE = 28  # of an image
WEIGHTS = (300, 400, 600, 800)
STATIC = ("-Light.", "-Regular.", "-Medium.", "-SemiBold.", "-Bold.")


@dataclass(frozen=True)
class Style:
    """How characters are distorted; every pair is the range of a uniform draw for each image.

    Args:
        rotate: degrees, either way.
        shear: horizontal shear, either way, as a fraction of the height.
        scale: size.
        stretch: width over height is drawn from [1 - stretch, 1 + stretch].
        shift: of the image's side, either way.
        warp: amplitude of a smooth random displacement, as a fraction of half the side.
        thickness: -1 thinner by a pixel, 1 thicker by a pixel.
        outline: share of images that show only the edge of the strokes.
        blur: weight of the image blurred by a 5 x 5 binomial kernel.
        lines: number of random strokes across the image, of which each is there half of the time.
        hide: side of a square that is wiped out, as a fraction of the image's.
        contrast: ink minus paper.
        gradient: difference of the paper's grey from one side to the other.
        blotches: amplitude of smooth random grey on the paper.
        noise: standard deviation of independent noise.
        invert: share of images with light paper and dark ink.
        coarse: share of images that are averaged over 2 x 2 blocks.
    """

    rotate: float = 10
    shear: float = 0.15
    scale: tuple[float, float] = (0.8, 1.05)
    stretch: float = 0.15
    shift: float = 0.06
    warp: float = 0.06
    thickness: tuple[float, float] = (-0.5, 0.5)
    outline: float = 0
    blur: tuple[float, float] = (0, 0.6)
    lines: int = 0
    hide: float = 0
    contrast: tuple[float, float] = (0.6, 1.0)
    gradient: float = 0.2
    blotches: float = 0
    noise: tuple[float, float] = (0.0, 0.1)
    invert: float = 0
    coarse: float = 0


def between(first: Style, second: Style, part: float) -> Style:
    """The style that lies `part` of the way from the first to the second.

    >>> between(Style(rotate=10), Style(rotate=30), 0.5).rotate
    20.0
    """

    def mixed(a: float, b: float) -> float:
        return a + part * (b - a)

    values: dict[str, Any] = {}
    for entry in fields(Style):
        a, b = getattr(first, entry.name), getattr(second, entry.name)
        values[entry.name] = tuple(map(mixed, a, b)) if isinstance(a, tuple) else mixed(a, b)
    return Style(**{**values, "lines": int(values["lines"])})


def distort(glyphs: Tensor, style: Style, generator: torch.Generator) -> Tensor:
    """Distorted images of characters; a function of its arguments alone.

    Args:
        glyphs: ink on empty paper in [0, 1], float32, [N, side, side].
        style: what is done.
        generator: where the draws come from.

    Returns:
        [N, 28, 28], float32, in [0, 1].
    """
    n = len(glyphs)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *(shape or (1, 1)), generator=generator)

    ink = functional.grid_sample(glyphs[:, None], _grid(n, style, draw, generator), align_corners=False)[:, 0]
    thick, thin = _largest(ink), -_largest(-ink)
    t = draw(*style.thickness)
    ink = ink + t.clamp_min(0) * (thick - ink) + (-t).clamp_min(0) * (thin - ink)
    edge = (_largest(ink) - ink).clamp(0, 1)
    ink = torch.where(draw(0, 1) < style.outline, edge, ink)
    if style.lines:
        ink = torch.maximum(ink, _lines(n, style.lines, draw))
    if style.hide:
        at = torch.arange(IMAGE) / IMAGE
        top, left = draw(0, 1 - style.hide), draw(0, 1 - style.hide)
        rows = (at[:, None] >= top) & (at[:, None] < top + style.hide)
        columns = (at[None] >= left) & (at[None] < left + style.hide)
        ink = ink * ~(rows & columns)
    ink = torch.lerp(ink, _blurred(ink), draw(*style.blur))
    mean = functional.avg_pool2d(ink[:, None], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0]
    ink = torch.where(draw(0, 1) < style.coarse, mean, ink)
    return _on_paper(ink, style, draw, generator)


def _on_paper(ink: Tensor, style: Style, draw: Any, generator: torch.Generator) -> Tensor:
    n = len(ink)
    line = torch.linspace(-0.5, 0.5, IMAGE)
    contrast = draw(*style.contrast)
    paper = draw(0, 1) * (1 - contrast)
    slope = draw(-style.gradient, style.gradient) * line[:, None] + draw(-style.gradient, style.gradient) * line
    paper = paper + slope * (1 - ink)
    if style.blotches:
        smooth = _smooth(n, 7, generator) * style.blotches
        paper = paper + smooth * (1 - ink)
    image = paper + contrast * ink
    image = image + draw(*style.noise) * torch.randn(image.shape, generator=generator)
    image = image.clamp(0, 1)
    return torch.where(draw(0, 1) < style.invert, 1 - image, image)


def _grid(n: int, style: Style, draw: Any, generator: torch.Generator) -> Tensor:
    """Where each pixel of the result looks in the glyph, [N, 28, 28, 2], in [-1, 1]."""
    angle = draw(-style.rotate, style.rotate) * torch.pi / 180
    size, stretch, shear = (
        draw(*style.scale),
        draw(1 - style.stretch, 1 + style.stretch),
        draw(-style.shear, style.shear),
    )
    line = torch.linspace(-1, 1, IMAGE)
    x = line[None, None, :] - draw(-2 * style.shift, 2 * style.shift)
    y = line[None, :, None] - draw(-2 * style.shift, 2 * style.shift)
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    x, y = (x + shear * y) / (size * stretch.sqrt()), y / (size / stretch.sqrt())
    grid = torch.stack((x, y), -1)
    if style.warp:
        grid = grid + style.warp * torch.stack((_smooth(n, 4, generator), _smooth(n, 4, generator)), -1)
    return grid


def _smooth(n: int, knots: int, generator: torch.Generator) -> Tensor:
    """Smooth random fields of about unit variance, [N, 28, 28]."""
    coarse = torch.randn(n, 1, knots, knots, generator=generator)
    return functional.interpolate(coarse, (IMAGE, IMAGE), mode="bicubic", align_corners=True)[:, 0]


def _lines(n: int, count: int, draw: Any) -> Tensor:
    """Random straight strokes, [N, 28, 28]."""
    at = torch.linspace(0, 1, IMAGE)
    image = torch.zeros(n, IMAGE, IMAGE)
    for _ in range(count):
        x0, y0, angle, half = draw(0, 1), draw(0, 1), draw(0, 2 * torch.pi), draw(0.2, 0.6)
        x, y = at[None, None, :] - x0, at[None, :, None] - y0
        along = (x * angle.cos() + y * angle.sin()).abs() - half
        across = (y * angle.cos() - x * angle.sin()).abs()
        distance = torch.maximum(along, across) * IMAGE
        stroke = (1.4 - distance).clamp(0, 1) * (draw(0, 1) < 0.5)
        image = torch.maximum(image, stroke)
    return image


def _largest(ink: Tensor) -> Tensor:
    return functional.max_pool2d(ink[:, None], 3, stride=1, padding=1)[:, 0]


def _blurred(ink: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    rows = functional.conv2d(ink[:, None], kernel.reshape(1, 1, 5, 1), padding=(2, 0))
    return functional.conv2d(rows, kernel.reshape(1, 1, 1, 5), padding=(0, 2))[:, 0]


def atlas(wheels: Sequence[Path], characters: str) -> list[Tensor]:
    """Every character in every upright face of the fonts, for each character uint8, [faces, 40, 40].

    A face that lacks a character contributes nothing to it; which faces there are depends on the wheels alone.
    """
    found: list[list[Tensor]] = [[] for _ in characters]
    for wheel in wheels:
        for data, weight in faces(wheel):
            for index, glyph in render(data, weight, characters).items():
                found[index].append(glyph)
    return [torch.stack(glyphs) if glyphs else torch.empty(0, GLYPH, GLYPH, dtype=torch.uint8) for glyphs in found]


def faces(wheel: Path) -> Iterator[tuple[bytes, int | None]]:
    """The upright faces of a wheel: the font file and, for a variable font, each weight to set."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith((".ttf", ".otf")) and "Italic" not in n)
        for name in names:
            data = archive.read(name)
            if "[" in name or "-Variable" in name:
                yield from ((data, weight) for weight in WEIGHTS)
            elif any(part in name for part in STATIC):
                yield data, None


def render(data: bytes, weight: int | None, characters: str) -> Mapping[int, Tensor]:
    """The characters that a face has, by their index, each scaled so that its longer side fills 32 of 40 pixels."""
    try:
        import numpy
        from fontTools.ttLib import TTFont
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtra("fonttools" if "fontTools" in str(error) else "pillow", "demo") from None
    covered = TTFont(io.BytesIO(data), lazy=True, fontNumber=0).getBestCmap()
    font = ImageFont.truetype(io.BytesIO(data), 64, layout_engine=ImageFont.Layout.BASIC)
    if weight is not None:
        axes: Sequence[Mapping[str, Any]] = font.get_variation_axes()  # type: ignore[assignment]
        font.set_variation_by_axes([_setting(axis, weight) for axis in axes])
    glyphs = {}
    for index, character in enumerate(characters):
        if ord(character) not in covered:
            continue
        left, top, right, bottom = font.getbbox(character)
        width, height = round(right - left), round(bottom - top)
        if width < 2 or height < 2:
            continue
        canvas = Image.new("L", (width, height), 0)
        ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
        factor = 32 / max(width, height)
        small = canvas.resize(
            (max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.LANCZOS, reducing_gap=3
        )
        page = Image.new("L", (GLYPH, GLYPH), 0)
        page.paste(small, ((GLYPH - small.width) // 2, (GLYPH - small.height) // 2))
        glyphs[index] = torch.from_numpy(numpy.asarray(page).copy())
    return glyphs


def _setting(axis: Mapping[str, Any], weight: int) -> float:
    wanted = weight if axis["name"] == b"Weight" else axis["default"]
    return float(min(max(wanted, axis["minimum"]), axis["maximum"]))


def require(glyphs: Sequence[Tensor], characters: str, least: int, where: str) -> None:
    """Raise if a character is in fewer faces than that."""
    lacking = [c for c, found in zip(characters, glyphs, strict=True) if len(found) < least]
    if lacking:
        raise DataError(f"{where}: the fonts lack {' '.join(lacking)}.")
