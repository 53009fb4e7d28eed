import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from clipdistill.data.pictures import FORMATS, PictureError, check_header, decode, measured
from clipdistill.data.records import Picture

LIMIT = 1_000_000


def pixels(data):
    image = decode(data, LIMIT, "it")
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that is only a header: what it claims costs nothing to claim."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    idat = b"IDAT" + zlib.compress(b"")
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
    )  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_measured_and_decoded_from_memory_from_a_file_and_inside_another(format, encode, tmp_path):
    data = encode(format, size=(31, 17))
    (tmp_path / "whole.bin").write_bytes(data)
    (tmp_path / "inside.bin").write_bytes(b"x" * 777 + data + b"y" * 99)
    places = [
        Picture("memory", data=data),
        Picture("file", path=tmp_path / "whole.bin"),
        Picture("member", path=tmp_path / "inside.bin", offset=777, size=len(data)),
    ]
    assert [check_header(place, LIMIT) for place in places] == [(31, 17)] * 3
    assert [place.read() for place in places] == [data] * 3
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels(data), reference)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"quality": 50, "exif": b"Exif\0\0MM"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_headers_of_all_three_kinds_are_read_without_the_decoder(options, mode, encode):
    for size in ((1, 1), (300, 2), (2, 300), (257, 129)):
        assert check_header(Picture("it", data=encode("WEBP", size, mode, **options)), LIMIT) == size


def test_header_check_reads_a_small_part_of_a_large_file(encode, tmp_path, monkeypatch):
    read = []
    original = io.FileIO.readinto

    class Counting(io.FileIO):
        def readinto(self, buffer):
            got = original(self, buffer)
            read.append(got)
            return got

    paths = [tmp_path / format for format in ("JPEG", "PNG", "BMP", "WEBP")]
    for path in paths:
        path.write_bytes(encode(path.name, size=(600, 600)))
    monkeypatch.setattr(type(tmp_path), "open", lambda self, *_, **__: Counting(self, "rb"))
    for path in paths:
        read.clear()
        assert check_header(Picture("it", path=path), LIMIT) == (600, 600)
        assert 0 < sum(read) <= 20_000 < path.stat().st_size


def test_header_check_follows_a_tiff_directory_at_the_end_of_the_file(encode, tmp_path):
    data = encode("TIFF", size=(200, 150))
    assert struct.unpack("<I", data[4:8])[0] in range(len(data))
    (tmp_path / "a.tif").write_bytes(data)
    assert check_header(Picture("it", path=tmp_path / "a.tif"), LIMIT) == (200, 150)


def test_exif_orientation_is_applied_to_all_eight_values():
    upright = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    # What a camera stores for each orientation, by the EXIF standard's table, undone here with numpy alone.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    for orientation, expected in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("PNG", "TIFF"):
            data = saved(Image.fromarray(upright), format, exif=exif)
            np.testing.assert_array_equal(pixels(data), expected(upright), err_msg=f"{format} {orientation}")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_cost_the_picture(encode):
    data = encode("JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    assert pixels(data).shape == (9, 12, 3)


def test_transparency_is_composited_on_white():
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    expected = [[[255, 255, 255], [127, 127, 127]]]
    assert pixels(saved(clear, "PNG")).tolist() == expected
    assert pixels(saved(clear, "WEBP", lossless=True)).tolist() == expected
    grey = Image.new("LA", (1, 1), (7, 0))
    assert pixels(saved(grey, "PNG")).tolist() == [[[255, 255, 255]]]


def test_palettes_with_and_without_a_transparent_entry_are_decoded():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image, "PNG")).tolist() == [[[9, 8, 7], [200, 100, 50]]]
    for format in ("PNG", "GIF"):
        assert pixels(saved(image, format, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_sixteen_bit_grey_is_scaled_and_not_cut():
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        assert pixels(saved(Image.fromarray(values), format))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_float_grey_is_scaled_from_either_range():
    for values in ([[0.0, 0.5, 1.0, np.nan]], [[0.0, 127.5, 255.0, np.nan]]):
        data = saved(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
        assert pixels(data)[0, :, 0].tolist() == [0, 128, 255, 0]


def test_cmyk_and_one_bit_pictures_are_decoded(encode):
    white = saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert pixels(white).min() > 250
    ink = saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG")
    assert pixels(ink).max() < 5
    assert pixels(saved(Image.new("1", (3, 2), 1), "PNG")).tolist() == [[[255] * 3] * 3] * 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(format):
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(red, format, save_all=True, append_images=[blue], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_a_header_that_claims_too_much_is_refused_before_decoding():
    data = png_header(100_000, 100_000)
    for refuse in (
        lambda: check_header(Picture("huge.png", data=data), 100_000_000),
        lambda: decode(data, 100_000_000, "huge.png"),
    ):
        with pytest.raises(PictureError) as caught:
            refuse()
        assert caught.value.reason == "too many pixels: 100000x100000 is over data.max_pixels 100000000"
        assert str(caught.value).startswith("huge.png: ")


def test_the_limit_is_the_users_own_in_both_directions(encode):
    data = encode("PNG", size=(20, 10))
    assert check_header(Picture("it", data=data), 200) == (20, 10)
    with pytest.raises(PictureError, match=r"too many pixels: 20x10 is over data\.max_pixels 199"):
        check_header(Picture("it", data=data), 199)
    # Pillow's own limit of 179 million pixels does not stand in the way of a larger one.
    assert check_header(Picture("it", data=png_header(30_000, 30_000)), 10**9) == (30_000, 30_000)


def test_a_webp_canvas_is_checked_before_it_is_allocated(encode):
    data = bytearray(encode("WEBP", size=(16, 16), mode="RGBA", exif=b"Exif\0\0MM"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_000 - 1).to_bytes(3, "little") * 2
    with pytest.raises(PictureError, match="too many pixels: 16000x16000"):
        decode(bytes(data), LIMIT, "it")


def test_files_that_are_no_picture_are_named_so(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"this is a text, and not a short one at all")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    cases = {
        "text.jpg": "not a picture (wrongly named?): none of JPEG, PNG, WEBP, GIF, BMP, TIFF",
        "empty.png": "empty file",
        "folder.png": "not a plain file",
        "absent.png": "missing file",
        "text.jpg/below.png": "missing file",
        "nul\0.png": "missing file",
    }
    for name, reason in cases.items():
        with pytest.raises(PictureError) as caught:
            check_header(Picture(name, path=tmp_path / name), LIMIT)
        assert caught.value.reason == reason, name


def test_a_picture_without_bytes_or_path_is_empty():
    with pytest.raises(PictureError, match="empty file"):
        check_header(Picture("it"), LIMIT)


def test_the_content_decides_and_not_the_name(encode, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode("PNG", size=(5, 4)))
    assert check_header(Picture("it", path=path), LIMIT) == (5, 4)
    assert decode(path.read_bytes(), LIMIT, "it").size == (5, 4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_picture_cut_anywhere_is_refused_and_never_half_decoded(format, encode):
    data = encode(format, size=(64, 64), mode="L" if format == "GIF" else "RGB")
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(PictureError) as caught:
            decode(data[: int(len(data) * share)], LIMIT, "cut")
        assert caught.value.origin == "cut"


def test_a_cut_body_is_called_truncated(encode):
    for format in ("JPEG", "PNG", "WEBP"):
        data = encode(format, size=(64, 64))
        with pytest.raises(PictureError, match="truncated picture"):
            decode(data[: len(data) * 2 // 3], LIMIT, "cut")


def test_a_cut_webp_is_noticed_from_its_header_alone(encode):
    data = encode("WEBP", size=(64, 64))
    with pytest.raises(PictureError, match="truncated picture"):
        check_header(Picture("it", data=data[:-50]), LIMIT)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bytes_never_raise_anything_else(encode):
    random = np.random.default_rng(5)
    refused = 0
    for format in FORMATS:
        data = encode(format, size=(24, 24), mode="L" if format == "GIF" else "RGB")
        for _ in range(150):
            broken = bytearray(data)
            for place in random.integers(0, len(data), 4):
                broken[place] = random.integers(0, 256)
            try:
                assert decode(bytes(broken), LIMIT, "it").mode == "RGB"
            except PictureError:
                refused += 1
    assert refused > 50


def test_truncated_loading_is_never_switched_on():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_measuring_fills_in_the_size_and_leaves_the_rest(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    assert measured(Picture("it", path=path)).size == 5
    assert measured(Picture("it", path=path, offset=2)).size == 3
    held = Picture("it", data=b"12")
    assert measured(held) is held


def test_the_error_crosses_from_a_worker_process():
    copy = pickle.loads(pickle.dumps(PictureError("empty file", "a.jpg")))
    assert (copy.reason, copy.origin, str(copy)) == ("empty file", "a.jpg", "a.jpg: empty file")
