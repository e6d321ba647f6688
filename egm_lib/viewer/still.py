"""Figures as images: for a notebook's cells, and in place of a widget where no kernel runs."""

import base64
import io

from matplotlib.figure import Figure
from PIL import Image

from egm_lib.viewer.palette import styled

DPI = 110


def figure_bytes(figure: Figure, kind: str, dpi: int = DPI) -> bytes:
    """A figure as a file: kind is "png" or "svg"."""
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format=kind, dpi=dpi)
    return file.getvalue()


def light_png(png: bytes) -> bytes:
    """The image in at most 256 colours, less than half the size, so that notebooks stay small.

    The colours are those that cover the image best: in the figures of a run no channel of a pixel
    is off by more than a few of 255 levels.
    """
    with Image.open(io.BytesIO(png)) as image:
        few = image.convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    file = io.BytesIO()
    few.save(file, format="png", optimize=True)
    return file.getvalue()


def png_bundle(bundle, figure: Figure, summary: str) -> tuple[dict, dict]:
    """A widget's mime bundle with the figure as a PNG and a line of text beside it."""
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    png = base64.b64encode(light_png(figure_bytes(figure, "png"))).decode()
    return {**data, "text/plain": summary, "image/png": png}, metadata
