"""Every good file becomes 8-bit RGB with the right colours; every bad one is refused in one sentence."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from vitx import glyphs, images, lesions
from vitx.images import ImageError, open_image


def refusal(path) -> str:
    """The message of the refusal, after checking that it is one sentence and that nothing warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            open_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def saved(path, array: np.ndarray, mode: str | None = None, **options):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.fixture
def colours() -> np.ndarray:
    """(10, 12, 3): red on the left half, blue on the right half."""
    array = np.zeros((10, 12, 3), np.uint8)
    array[:, :6, 0] = array[:, 6:, 2] = 255
    return array


def png_header(width: int, height: int, bits: int = 8) -> bytes:
    """A grey PNG that claims a size but has no pixels: signature, IHDR and an empty IDAT."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# --- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("chelsea", (451, 300)),
        ("coffee", (600, 400)),
        ("astronaut", (512, 512)),
        ("rocket", (640, 427)),
        ("motorcycle", (741, 500)),
    ],
)
def test_photographs_are_in_the_installed_scikit_image(name, size):
    picture = open_image(name)
    assert (picture.mode, picture.size) == ("RGB", size)


def test_a_glyph_name_gives_the_scene_of_that_seed():
    expected = glyphs.scenes(1, 5).images[0]
    pixels = torch.from_numpy(np.array(open_image("glyph:5"))).permute(2, 0, 1) / 255
    assert (pixels - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert open_image("sample").tobytes() == open_image(f"glyph:{images.SAMPLE_SEED}").tobytes()


def test_a_lesion_scene_by_its_seed():
    scene = lesions.scenes(1, 4).images[0]
    assert np.array_equal(np.asarray(open_image("lesion:4")), (scene * 255).round().byte().permute(1, 2, 0).numpy())
    assert "a lesion scene is called lesion:<seed>" in refusal("lesion:x")


@pytest.mark.parametrize("name", ["glyph:", "glyph:-1", "glyph:x", "glyph:1.5"])
def test_a_glyph_name_without_a_seed_is_refused(name):
    assert "glyph:<seed>" in refusal(name)


def test_a_photograph_that_scikit_image_lacks_is_refused(monkeypatch):
    monkeypatch.setitem(images.PHOTOGRAPHS, "coffee", "absent.png")
    assert "scikit-image" in refusal("coffee")


# --- good files ----------------------------------------------------------------------------------------


def test_colours_survive_lossless_formats(tmp_path, colours):
    for suffix in ("png", "bmp", "tiff", "ppm"):
        assert (np.array(open_image(saved(tmp_path / f"a.{suffix}", colours))) == colours).all(), suffix
    for suffix in ("webp", "gif"):
        path = saved(tmp_path / f"a.{suffix}", colours, lossless=True)
        assert (np.array(open_image(path)) == colours).all(), suffix


def test_the_name_may_be_a_string_without_the_right_suffix(tmp_path, colours):
    path = tmp_path / "picture"
    saved(path, colours, format="PNG")
    assert (np.array(open_image(str(path))) == colours).all()


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    result = np.array(open_image(saved(tmp_path / "grey.png", grey)))
    assert (result == grey[..., None]).all()


def test_black_and_white_of_one_bit(tmp_path):
    grey = np.indices((10, 10)).sum(0) % 2 * np.uint8(255)
    result = np.array(open_image(saved(tmp_path / "bit.png", grey.astype(np.uint8), mode="1")))
    assert (result == grey[..., None]).all()


def test_a_palette_gives_its_colours(tmp_path, colours):
    path = saved(tmp_path / "palette.png", colours, mode="P")
    with Image.open(path) as file:
        assert file.mode == "P"
    assert (np.array(open_image(path)) == colours).all()


def test_alpha_shows_white_behind(tmp_path, colours):
    alpha = np.full((10, 12, 1), 255, np.uint8)
    alpha[:, 3:6] = 0  # nothing there
    alpha[:, 6:] = 102  # 40 % of blue over white
    result = np.array(open_image(saved(tmp_path / "alpha.png", np.concatenate([colours, alpha], 2))))
    assert (result[:, :3] == (255, 0, 0)).all()
    assert (result[:, 3:6] == 255).all()
    assert (result[:, 6:] == (153, 153, 255)).all()


def test_a_transparent_palette_colour_shows_white(tmp_path, colours):
    path = tmp_path / "clear.png"
    picture = Image.fromarray(colours).quantize(2)
    red = picture.getpixel((0, 0))
    picture.save(path, transparency=red)
    result = np.array(open_image(path))
    assert (result[:, :6] == 255).all()
    assert (result[:, 6:] == (0, 0, 255)).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (values / 257).round()  # 65535 becomes 255
    for suffix in ("png", "tiff"):
        result = np.array(open_image(saved(tmp_path / f"deep.{suffix}", values)))
        assert (result == expected[..., None]).all(), suffix


def test_cmyk_becomes_its_rgb(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)  # no cyan: red
    red, green, blue = np.array(open_image(path)).reshape(-1, 3).mean(0)
    assert red > 200
    assert max(green, blue) < 50


def test_the_orientation_tag_is_applied(tmp_path, colours):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: a quarter clockwise sets it upright, so left becomes up
    Image.fromarray(colours).save(path, exif=exif)
    result = np.array(open_image(path))
    assert result.shape == (12, 10, 3)
    assert (result[:6] == (255, 0, 0)).all()
    assert (result[6:] == (0, 0, 255)).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (np.array(open_image(path)) == (255, 0, 0)).all()


def test_the_smallest_picture_is_eight_by_eight(tmp_path):
    assert open_image(saved(tmp_path / "8.png", np.zeros((8, 8), np.uint8))).size == (8, 8)
    assert "PNG, 9 x 7 pixels" in refusal(saved(tmp_path / "7.png", np.zeros((7, 9), np.uint8)))


# --- bad files -----------------------------------------------------------------------------------------


def test_a_missing_file_names_pictures_that_exist(tmp_path):
    assert "did you mean chelsea?" in refusal("chelsae")
    assert "coffee, astronaut" in refusal(tmp_path / "absent.png")


def test_a_folder_is_not_a_picture(tmp_path):
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"hello\n", b"<svg/>", bytes(1000)])
def test_what_is_not_a_picture_is_refused(tmp_path, content):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    assert "not a picture in PNG, JPEG" in refusal(path)


def test_a_format_that_would_start_another_program_is_refused(tmp_path, colours):
    assert "not a picture in PNG, JPEG" in refusal(saved(tmp_path / "drawing.eps", colours))


@pytest.mark.parametrize(
    "content", [b"P6\n1x 10\n255\n", b"\x89PNG\r\n\x1a\n\0\0\0\2IHDR\0\0\0\0\0\0", b"BM" + bytes(60)]
)
def test_a_damaged_header_is_refused(tmp_path, content):
    path = tmp_path / "header.png"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "cat.png"
    path.touch()
    assert "is empty" in refusal(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, format=kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    assert str(path) in refusal(path)


def test_damaged_pixels_are_refused_with_the_size_and_the_format(tmp_path):
    path = tmp_path / "hollow.png"
    path.write_bytes(png_header(640, 480))
    assert "(PNG, 640 x 480 pixels) is damaged or cut short" in refusal(path)


@pytest.mark.parametrize("size", [(8001, 8000), (100_000, 100_000)])  # beyond Pillow's warning, beyond its error
def test_a_huge_picture_is_refused_from_its_header(tmp_path, monkeypatch, size):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    message = refusal(path)
    assert f"{size[0]} x {size[1]} pixels" in message
    assert "64 megapixels" in message
    assert Image.MAX_IMAGE_PIXELS == 1_000_000


def test_one_pixel_is_refused(tmp_path):
    assert "1 x 1 pixels) is too small" in refusal(saved(tmp_path / "dot.png", np.zeros((1, 1), np.uint8)))


def test_a_ribbon_is_refused(tmp_path):
    saved(tmp_path / "long.png", np.zeros((8, 400), np.uint8))
    assert open_image(tmp_path / "long.png").size == (400, 8)
    assert "50 times" in refusal(saved(tmp_path / "longer.png", np.zeros((8, 401), np.uint8)))


def test_values_of_unknown_range_are_refused(tmp_path):
    assert "floating-point" in refusal(saved(tmp_path / "f.tiff", np.zeros((10, 10), np.float32)))
    for value in (70_000, -1):
        assert "32-bit" in refusal(saved(tmp_path / "i.tiff", np.full((10, 10), value, np.int32)))


# --- display -------------------------------------------------------------------------------------------


def test_to_array_takes_the_normalisation_back():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    shown = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    normalised = (shown - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    result = images.to_array(normalised, mean, std)
    assert result.shape == (6, 5, 3)
    np.testing.assert_allclose(result, shown.permute(1, 2, 0).numpy(), atol=1e-6)
    assert images.to_array(normalised * 100, mean, std).max() == 1
