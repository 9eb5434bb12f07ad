"""Decoding is bounded and exact; random changes do what their names say."""

import struct

import cv2
import numpy as np
import pytest
import simplejpeg

from marginface.data.images import Augment, Frame, decode, header_size


def noise(height=30, width=40, seed=0):
    """Smooth enough for JPEG to keep it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image, suffix, *flags):
    return cv2.imencode(suffix, image[..., ::-1], flags)[1].tobytes()


ENCODED = {
    "png": encode(noise(), ".png"),
    "bmp": encode(noise(), ".bmp"),
    "ppm": encode(noise(), ".ppm"),
    "webp": encode(noise(), ".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
    "jpeg": simplejpeg.encode_jpeg(noise(), quality=100, colorsubsampling="444"),
    "lossy webp": encode(noise(), ".webp", cv2.IMWRITE_WEBP_QUALITY, 90),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_decodes_rgb_of_the_size_in_the_header(kind):
    assert header_size(ENCODED[kind]) == (30, 40)
    image = decode(ENCODED[kind])
    tolerance = {"jpeg": 6, "lossy webp": 60}.get(kind, 0)
    assert np.abs(image.astype(int) - noise()).max() <= tolerance
    assert np.abs(image.astype(int) - noise()).mean() <= tolerance / 4


def test_grey_images_get_three_equal_channels():
    grey = noise()[..., 0]
    for encoded in (
        cv2.imencode(".pgm", grey)[1].tobytes(),
        cv2.imencode(".png", grey)[1].tobytes(),
    ):
        np.testing.assert_array_equal(decode(encoded), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.6])
def test_truncated_images_are_value_errors(kind, kept, capfd):
    with pytest.raises(ValueError, match=r"\w"):
        decode(ENCODED[kind][: int(len(ENCODED[kind]) * kept)])
    assert capfd.readouterr().err == ""


def test_a_png_chunk_longer_than_the_file_is_refused_before_it_is_allocated(monkeypatch):
    data = bytearray(ENCODED["png"])
    data[33:37] = (0x720006E3).to_bytes(4, "big")  # the length of the chunk behind the header
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ValueError, match="truncated or broken"):
        decode(bytes(data))


def huge(kind):
    """Small files whose headers promise 60,000 x 50,000 pixels (WebP: 16,000 x 16,000)."""
    data = bytearray(ENCODED[kind])
    match kind:
        case "png":
            struct.pack_into(">II", data, 16, 60_000, 50_000)
        case "bmp":
            struct.pack_into("<ii", data, 18, 60_000, 50_000)
        case "ppm":
            data[:] = b"P6\n# a comment\n60000 50000\n255\n" + data[20:]
        case "webp":
            struct.pack_into("<I", data, 21, 15_999 | 15_999 << 14)
        case "lossy webp":
            struct.pack_into("<HH", data, 26, 16_000, 16_000)
        case "jpeg":
            at = data.index(b"\xff\xc0") + 5
            struct.pack_into(">HH", data, at, 50_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize("kind", ENCODED)
def test_the_header_is_refused_before_pixels_are_allocated(kind, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(cv2, "imdecode", never)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    with pytest.raises(ValueError, match=r"its header says (60000 x 50000|16000 x 16000)"):
        decode(huge(kind))


@pytest.mark.parametrize("data", [b"", b"not an image", b"GIF89a" + bytes(40), b"%PDF-1.4"])
def test_other_files_are_value_errors(data):
    with pytest.raises(ValueError, match=r"not a JPEG|no bytes"):
        decode(data)


def test_large_jpegs_keep_twice_the_needed_sides():
    encoded = simplejpeg.encode_jpeg(noise(800, 1200), quality=95)
    assert min(decode(encoded, min_side=48).shape[:2]) >= 96
    assert decode(encoded, min_side=48).shape[0] < 800
    assert decode(encoded).shape == (800, 1200, 3)


def test_frame_cuts_the_centre_and_averages_areas():
    image = noise(40, 60)
    frame = Frame(10, 10, crop=0.5)
    assert frame.outer == (20, 20)
    box = image[:, 10:50].reshape(20, 2, 20, 2, 3).mean((1, 3))
    fitted = frame.fit(image)
    assert np.abs(fitted - box).max() <= 1
    np.testing.assert_array_equal(frame.centre(fitted), fitted[5:15, 5:15])


@pytest.mark.parametrize("size", [(112, 112), (112, 96), (48, 48), (33, 20)])
@pytest.mark.parametrize("crop", [1.0, 0.9, 0.7])
@pytest.mark.parametrize("shape", [(112, 112), (112, 92), (7, 300), (1, 1)])
def test_any_image_fits_any_frame(size, crop, shape):
    frame = Frame(*size, crop)
    fitted = frame.fit(noise(*shape))
    assert fitted.shape == (*frame.outer, 3)
    assert frame.centre(fitted).shape == (*size, 3)
    assert np.allclose(np.divide(size, frame.outer), crop, atol=1 / min(size))


@pytest.mark.parametrize(("size", "crop"), [(0, 1.0), (16, 0.0), (16, 1.5)])
def test_frame_bounds(size, crop):
    with pytest.raises(ValueError, match="crop"):
        Frame.of(size, crop)


FRAME = Frame(32, 32, crop=0.8)
OUTER = FRAME.fit(noise(64, 64, seed=1))
ALL = {
    "flip": 0.5,
    "shift": 0.1,
    "scale": 0.1,
    "rotation": 20,
    "colour": 0.3,
    "grey": 0.3,
    "cutout": 0.5,
    "cutout_size": 0.4,
}


def change(seed=0, image=OUTER, frame=FRAME, **settings):
    return Augment.of({"flip": 0.0, **settings})(image, frame, np.random.default_rng(seed))


def test_nothing_on_is_the_centre():
    np.testing.assert_array_equal(change(), FRAME.centre(OUTER))


def test_flip_mirrors_about_half_the_images():
    mirrored = [
        bool((change(seed, flip=0.5) == FRAME.centre(OUTER)[:, ::-1]).all()) for seed in range(200)
    ]
    assert 70 < sum(mirrored) < 130
    np.testing.assert_array_equal(change(flip=1.0), FRAME.centre(OUTER)[:, ::-1])


def test_warp_without_amount_is_the_identity():
    np.testing.assert_array_equal(change(shift=1e-12), FRAME.centre(OUTER))


def landmark(image):
    """Centroid (y, x) of brightness, in pixels from the centre of the image."""
    grey = image[..., 0].astype(float)
    where = np.indices(grey.shape).reshape(2, -1) - (np.array(grey.shape) - 1)[:, None] / 2
    return where @ grey.ravel() / grey.sum()


def dot(y, x, side=65):
    image = np.zeros((side, side, 3), np.uint8)
    cv2.circle(image, (side // 2 + x, side // 2 + y), 4, (255, 255, 255), -1)
    return image


def test_shift_scale_and_rotation_move_a_point_as_they_say():
    frame = Frame(65, 65)
    draws = np.random.default_rng(5)
    draws.random(5)
    down, right, size, angle = draws.uniform(-1, 1, 7)[:4]
    shifted = landmark(change(5, dot(0, 0), frame, shift=0.1))
    np.testing.assert_allclose(shifted, [6.5 * down, 6.5 * right], atol=0.1)
    scaled = landmark(change(5, dot(0, 16), frame, scale=0.3))
    np.testing.assert_allclose(scaled, [0, 16 * np.exp(0.3 * size)], atol=0.1)
    turned = landmark(change(5, dot(0, 16), frame, rotation=40.0))
    theta = np.radians(40 * angle)
    np.testing.assert_allclose(turned, [-16 * np.sin(theta), 16 * np.cos(theta)], atol=0.1)


def test_crop_brings_in_real_pixels():
    image = np.full((40, 40, 3), 200, np.uint8)
    image[12:28, 12:28] = 50
    frame = Frame(20, 20, crop=0.5)
    shifted = [change(seed, image, frame, shift=0.3) for seed in range(20)]
    assert all(set(np.unique(s)) & {50} and s.max() == 200 for s in shifted)


def test_grey_has_equal_channels_and_keeps_luminance():
    grey = change(grey=1.0)
    assert (grey == grey[..., :1]).all()
    expected = FRAME.centre(OUTER) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - expected).max() <= 1


def test_colour_stays_within_its_range():
    flat = np.full((40, 40, 3), 100, np.uint8)
    levels = [change(seed, flat, colour=0.2)[0, 0] for seed in range(100)]
    assert np.ptp(levels, axis=1).max() <= 1  # a grey image has no saturation to change
    assert 80 <= np.min(levels) < 85
    assert 115 < np.max(levels) <= 120
    mean = [np.ptp(change(seed, colour=0.5)) for seed in range(5)]
    assert len(set(mean)) > 1


def test_cutout_covers_one_rectangle_of_its_size():
    white = np.full((40, 40, 3), 255, np.uint8)
    sizes = []
    for seed in range(50):
        hidden = (change(seed, white, cutout=1.0, cutout_size=0.25) == 127).all(-1)
        ys, xs = np.nonzero(hidden)
        assert hidden[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
        sizes.append(hidden.sum())
    assert max(sizes) <= 81
    assert np.median(sizes) > 40
    assert (change(cutout=0.0) == change(cutout=0.0, cutout_size=0.9)).all()


def test_changes_depend_on_the_generator_alone():
    first, again, other = (change(seed, **ALL) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (32, 32, 3)
    assert first.flags.c_contiguous


def test_one_change_does_not_move_the_draws_of_another():
    white = np.full((40, 40, 3), 255, np.uint8)
    for seed in range(10):
        cut = change(seed, white, cutout=1.0)
        both = change(seed, white, cutout=1.0, flip=0.5, shift=0.1, rotation=5.0)
        np.testing.assert_array_equal(cut, both)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotatoin": 5.0}, "'rotatoin'; did you mean 'rotation'"),
        ({"color": 0.1}, "did you mean 'colour'"),
        ({"flip": 1.5}, "augment.flip is 1.5; use 0 to 1"),
        ({"rotation": -3.0}, "augment.rotation is -3"),
        ({"scale": float("nan")}, "augment.scale is nan"),
        ({"flip": "often"}, "augment.flip is 'often'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment.of(settings)
