"""Decodes image files of any origin safely to upright RGB, or refuses them in one line."""

import io
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.core.errors import DATA, UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")  # of Pillow, which reads others with programs of their own or not safely
MAX_IMAGE_BYTES = 20 * 1024 * 1024
MAX_IMAGE_PIXELS = 40_000_000
MAX_SIDE = 4096  # pixels; a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which costs nothing


class ImageError(UserError):
    """One image cannot be used; `data.on_bad_image` decides what happens. Not raised for an unreadable items.parquet."""


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes an image file to RGB: first frame, upright, transparency on white. Raises `ImageError`, which names `where`."""
    if len(data) > MAX_IMAGE_BYTES:
        raise _bad_image(f"{len(data) / 1e6:.0f} MB, more than {MAX_IMAGE_BYTES // 2**20} MB are not read", where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, which is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise _bad_image(f"{image.width} x {image.height} pixels, too large to decode safely", where)
                shrink = 2 ** max(0, (max(image.size) - 1).bit_length() - MAX_SIDE.bit_length() + 1)
                if shrink > 1:
                    image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
                image.load()
                return _rgb(_upright(image))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _bad_image("too many pixels to decode safely", where) from None
    except UnidentifiedImageError:
        raise _bad_image("not a JPEG, PNG, WebP, GIF, AVIF, BMP or TIFF", where) from None
    except Exception as error:  # hostile bytes make the decoders raise almost anything
        raise _bad_image(f"damaged: {error or type(error).__name__}", where) from None


def _bad_image(fault: str, where: str) -> ImageError:
    way_out = "replace it, or set data.on_bad_image (of `tpad prepare`: --on-bad-image) to text_only"
    return ImageError(f"image cannot be used: {fault} ({where}); {way_out}", DATA)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the image is valid; only its orientation tag cannot be read
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, layer).convert("RGB")
    return image.convert("RGB")


def read_image_file(folder: Path, path: str, where: str) -> bytes:
    """Reads an image file by its path relative to `folder`, which neither the path nor its links may leave. Raises `ImageError`."""
    parts = PurePosixPath(path)
    if "://" in path or "\\" in path or "\0" in path or parts.is_absolute() or ".." in parts.parts:
        raise _bad_image(f"path {path[:100]!r} is not relative and inside the folder of the items", where)
    try:
        root = folder.resolve(strict=True)
        target = (root / parts).resolve(strict=True)
        if not target.is_relative_to(root) or not target.is_file():
            raise _bad_image(f"path {path[:100]!r} leads out of the folder of the items, or to no plain file", where)
        with target.open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, RuntimeError) as error:
        raise _bad_image(f"{getattr(error, 'strerror', None) or error}: {path[:100]!r}", where) from None
