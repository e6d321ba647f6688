"""Images as files: where they are, opening them safely, mirroring them."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

from egm_lib.errors import EgmError
from egm_lib.files import atomic_open

# Far more than any image of COCO or TAO has, and less than a decompression bomb
MAX_PIXELS = 64_000_000


class ImageError(EgmError, ValueError):
    """An image file that cannot be used. The message says which, and why."""


def resolve_image(sample: Mapping, root: str | Path) -> Path:
    """The path of a sample's image; does not check whether it exists.

    root: the data root that `image` is relative to.
    Raises ImageError for a relative path that leaves the root.
    """
    image = Path(sample["image"])
    if image.is_absolute():
        return image
    if os.path.normpath(image).split(os.sep)[0] == "..":
        raise ImageError(
            f"sample {sample.get('sample_id')!r}: image {str(image)!r} leaves the data root {root}"
        )
    return Path(root) / image


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied), fully read.

    Grey, 16-bit grey, palette, CMYK and transparent images become RGB.
    Raises FileNotFoundError, or ImageError for a file that is not an image, is broken, or has more
    than max_pixels.
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
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255 instead of scaling
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")


def image_key(image: Image.Image) -> bytes:
    """A digest of an image's pixels: equal for equal images."""
    return xxhash.xxh3_128_digest(repr((image.mode, image.size)).encode() + image.tobytes())


def mirrored_name(image: str) -> str:
    """Path of the mirrored image, in a sibling folder.

    `train2014/a.jpg` becomes `train2014_flip/a.jpg`, and the other way round.
    """
    path = PurePosixPath(image)
    folder = path.parent.name
    twin = folder.removesuffix("_flip") if folder.endswith("_flip") else folder + "_flip"
    return str(path.parent.parent / twin / path.name)


def write_mirrored(source: Path, target: Path) -> None:
    """Writes the mirrored image, as JPEG or PNG by the suffix of `target`; whole or not at all."""
    mirrored = ImageOps.mirror(open_image(source))
    lossy = target.suffix.lower() in (".jpg", ".jpeg")
    options = {"format": "JPEG", "quality": 95, "subsampling": 0} if lossy else {"format": "PNG"}
    with atomic_open(target, "wb") as file:
        mirrored.save(file, **options)
