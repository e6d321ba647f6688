"""Images as files: where they are, opening them safely, mirroring them."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from egm_lib.errors import EgmError
from egm_lib.files import atomic_open

# 64 megapixels: no image of COCO or TAO comes near, a decompression bomb does
MAX_PIXELS = 64_000_000


class ImageError(EgmError, ValueError):
    """A file that cannot be shown; the message says which and why."""


def resolve_image(sample: Mapping, root: str | Path) -> Path:
    """Where the image of a sample lies; root: the data root its `image` is relative to. Does not
    look at the disk.

    Raises ValueError for a relative path that climbs out of the root.
    """
    image = Path(sample["image"])
    if image.is_absolute():
        return image
    if os.path.normpath(image).split(os.sep)[0] == "..":
        raise ValueError(
            f"sample {sample.get('sample_id')!r}: image {str(image)!r} leaves the data root {root}"
        )
    return Path(root) / image


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied), fully read.

    Grey, 16-bit grey, palette, CMYK and transparent images become RGB.
    Raises FileNotFoundError, or ImageError for a file that is no image, is broken or has over
    max_pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(
                        f"{path}: {image.width} x {image.height} px, over the limit of "
                        f"{max_pixels} px"
                    )
                return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no image {path}; is the data root right? `python -m egm_lib.data check` lists "
            "every missing one"
        ) from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ImageError(f"{path}: not a readable image ({error}); fetch it again") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip at 255 instead of scaling
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")


def mirrored_name(image: str) -> str:
    """Path of the mirrored twin of an image, in a sibling folder: `train2014/a.jpg` <->
    `train2014_flip/a.jpg`.
    """
    path = PurePosixPath(image)
    folder = path.parent.name
    twin = folder.removesuffix("_flip") if folder.endswith("_flip") else folder + "_flip"
    return str(path.parent.parent / twin / path.name)


def write_mirrored(source: Path, target: Path) -> None:
    """Write the mirror image of `source` to `target` (same format by suffix), whole or not at
    all.
    """
    mirrored = ImageOps.mirror(open_image(source))
    lossy = target.suffix.lower() in (".jpg", ".jpeg")
    with atomic_open(target, "wb") as file:
        mirrored.save(
            file,
            format="JPEG" if lossy else "PNG",
            **({"quality": 95, "subsampling": 0} if lossy else {}),
        )
