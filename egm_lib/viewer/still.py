"""The still image that stands for a widget where no kernel runs."""

import base64
import io

from matplotlib.figure import Figure

from egm_lib.viewer.palette import styled

DPI = 110


def figure_bytes(figure: Figure, kind: str, dpi: int = DPI) -> bytes:
    """A figure as a file: kind is "png" or "svg"."""
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format=kind, dpi=dpi)
    return file.getvalue()


def png_bundle(bundle, figure: Figure, summary: str) -> tuple[dict, dict]:
    """A widget's mime bundle with the figure as a PNG and a line of text beside it."""
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    png = base64.b64encode(figure_bytes(figure, "png")).decode()
    return {**data, "text/plain": summary, "image/png": png}, metadata
