"""Boxes drawn on the image that a teacher sees."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from egm_lib.data import open_image

LINE_WIDTH_PX = 5  # Fig. 8 [C]; thinner where the image has less than 320 px
# Larger images are sent smaller: services scale them down anyway, and charge for the bytes
MAX_SIDE_PX = 2048
FAR_PX = 10_000.0  # outside of every image that is sent
JPEG_QUALITY = 90


class Mark(NamedTuple):
    """A box drawn on the image; box: xyxy px, may leave the image."""

    box: tuple[float, ...]
    colour: str
    label: str


@lru_cache(maxsize=4)  # neighbouring samples share an image, and decoding is most of the work
def opened(path: str, size: int, mtime_ns: int) -> Image.Image:
    return open_image(path)


def marked_jpeg(image: Image.Image, marks: list[Mark], sample: Mapping) -> bytes:
    """The image with boxes drawn and labelled, as JPEG, its longer side at most MAX_SIDE_PX."""
    if image.size != (sample["width"], sample["height"]):
        raise ValueError(
            f"the record says {sample['width']} x {sample['height']} px, the image has "
            f"{image.width} x {image.height}: boxes would be drawn in the wrong place"
        )
    scale = min(1.0, MAX_SIDE_PX / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size) if scale < 1 else image.copy()
    draw = ImageDraw.Draw(image)
    width_px = max(3, min(LINE_WIDTH_PX, max(image.size) // 64))
    for box, colour, label in marks:
        # A looping model may name a corner that no drawing library can hold
        x1, y1, x2, y2 = (min(max(value * scale, -FAR_PX), FAR_PX) for value in box)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=width_px)
        tag = _tag(label, colour)
        x = min(max(x1, 0), max(image.width - tag.width, 0))
        y = min(max(y1 - tag.height, 0), max(image.height - tag.height, 0))
        image.paste(tag, (round(x), round(y)))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


@lru_cache(maxsize=16)  # drawn once for all images: text costs more than the boxes
def _tag(label: str, colour: str) -> Image.Image:
    """A mark's label, white on its colour."""
    font = ImageFont.load_default(size=12)
    _, _, right, bottom = font.getbbox(label)
    tag = Image.new("RGB", (round(right) + 1, round(bottom) + 2), colour)
    ImageDraw.Draw(tag).text((0, 0), label, fill="white", font=font)
    return tag
