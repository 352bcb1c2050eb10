"""Where pictures come from: scikit-image's photographs, glyph scenes, and files of the reader's own."""

import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

# Photographs inside the installed scikit-image: no download.
PHOTOGRAPHS = {
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "astronaut": "astronaut.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
}
SAMPLE_SEED = 7  # of the glyph scene called "sample", and of the scene that the model lesion is shown

# Formats that Pillow decodes by itself; others (EPS, say) would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
MAX_ASPECT = 50  # beyond it, the shorter side at the model's size would make the longer one huge


class ImageError(ValueError):
    """A picture that cannot be used, in one sentence."""


def open_image(name: str | Path) -> Image.Image:
    """A picture as 8-bit RGB.

    Orientation tags are applied, 16-bit grey is scaled to 8 bits, transparency shows white, and of an animation
    the first frame is taken.

    Args:
        name: a file (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM), or one of the names that need no file: a photograph
            (chelsea, coffee, astronaut, rocket, motorcycle), "glyph:<seed>" for scene 0 of that seed of
            vitx.glyphs, whose ground truth is `vitx.glyphs.scenes(1, seed)`, "sample" for one such scene, or
            "lesion:<seed>" for one of vitx.lesions.

    Raises:
        ImageError: no such file, not a picture, damaged, of more than 64 megapixels (known before decoding), of
            fewer than 8 pixels on a side, more than 50 times longer than wide, or of values whose range is unknown.
    """
    text = str(name)
    if text in PHOTOGRAPHS:
        return _read(_photograph(text))
    if text == "sample" or text.startswith(("glyph:", "lesion:")):
        return _scene(f"glyph:{SAMPLE_SEED}" if text == "sample" else text)
    path = Path(name)
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not a picture")
    if not path.is_file():
        samples = [*PHOTOGRAPHS, "sample"]
        near = difflib.get_close_matches(text, samples, n=1)
        raise ImageError(
            f"there is no picture {path}; "
            + (f"did you mean {near[0]}?" if near else f"these need no file: {', '.join(samples)}")
        )
    return _read(path)


def to_array(image: "Tensor", mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What the model saw, for display: (H, W, 3) float32 in [0, 1] from a normalised (3, H, W) tensor."""
    pixels = image.detach().cpu().float().numpy().transpose(1, 2, 0)
    return (pixels * np.asarray(std, np.float32) + np.asarray(mean, np.float32)).clip(0, 1)


def _photograph(name: str) -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "data" / PHOTOGRAPHS[name]
        if path.is_file():
            return path
    raise ImageError(f"the photograph {name} ships with scikit-image, which is not installed here or lacks it")


def _scene(name: str) -> Image.Image:
    from vitx import glyphs, lesions

    world, _, seed = name.partition(":")
    if not seed.isascii() or not seed.isdigit():
        raise ImageError(f"a {world} scene is called {world}:<seed> with a whole number from 0 on, not {name}")
    scene = (glyphs if world == "glyph" else lesions).scenes(1, int(seed)).images[0]  # (3, S, S) in [0, 1]
    return Image.fromarray((scene * 255).round().byte().permute(1, 2, 0).numpy())


def _read(path: Path) -> Image.Image:
    try:
        with _open(path) as file:
            label = f"{path} ({file.format}, {file.width} x {file.height} pixels)"
            if file.width * file.height > MAX_PIXELS:
                raise ImageError(f"{label} is larger than the limit of {MAX_PIXELS // 10**6} megapixels")
            shorter, longer = sorted(file.size)
            if shorter < MIN_SIDE:
                raise ImageError(f"{label} is too small: at least {MIN_SIDE} x {MIN_SIDE} pixels are needed")
            if longer > MAX_ASPECT * shorter:
                raise ImageError(f"{label} is more than {MAX_ASPECT} times longer than wide")
            try:
                upright = ImageOps.exif_transpose(file)  # decodes
            except Exception as error:  # Pillow's decoders raise whatever the damage provokes
                raise ImageError(f"{label} is damaged or cut short") from error
            return _to_rgb(upright, label)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> Image.Image:
    # Only the header is read here. Pillow's own size limit, which warns, gives way to the one in _read.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        empty = path.stat().st_size == 0
        raise ImageError(f"{path} is {'empty' if empty else f'not a picture in {_FORMAT_NAMES}'}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged header
        raise ImageError(f"{path} is damaged or cut short") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


_FORMAT_NAMES = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} format"


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{label} holds floating-point values of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 and its kin, or 16 bits in 32
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{label} holds 32-bit values of unknown range: save it with 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
