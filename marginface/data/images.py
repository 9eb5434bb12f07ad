"""Encoded images to RGB arrays of one size: bounded decoding and random changes, on the host."""

import dataclasses
import difflib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from marginface.typing import UInt8

# A broken image is reported by name in one line; OpenCV would print several more.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

MAX_PIXELS = 25_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".pgm", ".ppm")

_PNM = re.compile(rb"P[1-6](?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s")
_GREY = np.array([[0.299, 0.587, 0.114]])


def header_size(encoded: bytes) -> tuple[int, int]:
    """Returns (height, width) as the header states it; no pixel is decoded.

    Raises:
      ValueError: not a JPEG, PNG, WebP, BMP, PGM or PPM image.
    """
    try:
        if encoded[:2] == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
            return int(height), int(width)
        if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", encoded, 16)
            return height, width
        if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
            return _webp_size(encoded)
        if encoded[:2] == b"BM":
            core = struct.unpack_from("<I", encoded, 14) == (12,)
            width, height = struct.unpack_from("<HH" if core else "<ii", encoded, 18)
            return abs(height), width
        if found := _PNM.match(encoded[:4096]):
            return int(found[2]), int(found[1])
    except (struct.error, KeyError) as error:
        raise ValueError(f"the image ends within its header ({len(encoded)} bytes)") from error
    raise ValueError("not a JPEG, PNG, WebP, BMP, PGM or PPM image" if encoded else "no bytes")


def _webp_size(encoded: bytes) -> tuple[int, int]:
    chunk = encoded[12:16]
    if chunk == b"VP8X":
        low = struct.unpack_from("<HBHB", encoded, 24)
        return (low[2] | low[3] << 16) + 1, (low[0] | low[1] << 16) + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", encoded, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", encoded, 26)
    return height & 0x3FFF, width & 0x3FFF


def _check_png_chunks(encoded: bytes) -> None:
    """Raises a ValueError if a chunk claims more bytes than there are: OpenCV allocates them."""
    at = 8
    while at + 8 <= len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at)
        if length > len(encoded) - at - 12:
            raise ValueError("truncated or broken image")
        at += 12 + length


def decode(
    encoded: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes one image after its header was found small enough.

    An orientation in EXIF data is not applied: face crops are stored upright.

    Args:
      encoded: a JPEG, PNG, WebP, BMP, PGM or PPM file.
      max_pixels: the most pixels that are decoded.
      min_side: when > 0, a JPEG may come out smaller, by a whole step of its DCT, as long as no
        side falls below twice this; large photographs decode several times faster.

    Returns:
      RGB [h, w, 3].

    Raises:
      ValueError: unknown, too large, truncated or broken image.
    """
    height, width = header_size(encoded)
    if not 0 < height * width <= max_pixels:
        raise ValueError(f"its header says {width} x {height}; 1 to {max_pixels} pixels are read")
    if encoded[:2] == b"\xff\xd8" and simplejpeg.decode_jpeg_header(encoded)[2] not in (
        "CMYK",
        "YCCK",
    ):
        return simplejpeg.decode_jpeg(encoded, min_height=2 * min_side, min_width=2 * min_side)
    if encoded[:4] == b"\x89PNG":
        _check_png_chunks(encoded)
    try:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f"not decodable: {error.err}") from error
    if image is None or image.shape[:2] != (height, width):
        raise ValueError("truncated or broken image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@dataclasses.dataclass(frozen=True)
class Frame:
    """The part of an image that the network sees, and the size it is given.

    The centre box with the shape of the output is resized so that its middle fraction `crop` has
    height x width pixels. What lies around it is kept up to here, so that random changes bring
    in real pixels, not a border. Sides of the resized box differ from height and width by an even
    number of pixels; the fraction is thus exact to one pixel.
    """

    height: int
    width: int
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or not 0.1 <= self.crop <= 1:
            raise ValueError(
                f"image_size {self.height} x {self.width} must be positive and crop {self.crop} "
                "lie in [0.1, 1]"
            )

    @classmethod
    def of(cls, image_size: int | Sequence[int], crop: float) -> "Frame":
        """Builds it from one side or (height, width)."""
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        return cls(height, width, crop)

    @property
    def outer(self) -> tuple[int, int]:
        """(height, width) of the resized box around the crop."""
        height, width = (
            side + 2 * round(side * (1 / self.crop - 1) / 2) for side in (self.height, self.width)
        )
        return height, width

    def fit(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "oh ow 3"]:
        """Returns the centre box resized to `outer`: area average down, linear up."""
        height, width = self.outer
        h, w = image.shape[:2]
        box_h, box_w = min(h, max(1, w * height // width)), min(w, max(1, h * width // height))
        top, left = (h - box_h) // 2, (w - box_w) // 2
        box = image[top : top + box_h, left : left + box_w]
        if box.shape[:2] == (height, width):
            return box
        area = cv2.INTER_AREA if box_h >= height else cv2.INTER_LINEAR
        return cv2.resize(box, (width, height), interpolation=area)

    def centre(self, image: UInt8[np.ndarray, "oh ow 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the middle height x width pixels."""
        top, left = (
            (side - inner) // 2
            for side, inner in zip(image.shape[:2], (self.height, self.width), strict=True)
        )
        return image[top : top + self.height, left : left + self.width]


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of a training image; each is off at 0.

    flip, grey, cutout: probabilities of a mirror image, of a grey image, of a grey rectangle.
    shift: largest shift, as a fraction of the side. scale: largest |log| of the size factor.
    rotation: largest angle, in degrees. colour: brightness, contrast and saturation are each
    multiplied by a factor within [1 - colour, 1 + colour]. cutout_size: side of the rectangle as
    a fraction of the image's.
    """

    flip: float = 0.5
    shift: float = 0.0
    scale: float = 0.0
    rotation: float = 0.0
    colour: float = 0.0
    grey: float = 0.0
    cutout: float = 0.0
    cutout_size: float = 0.3

    def __post_init__(self) -> None:
        limits = {"scale": 1.0, "rotation": 180.0}
        for key, value in dataclasses.asdict(self).items():
            if not 0 <= value <= limits.get(key, 1.0):
                raise ValueError(f"augment.{key} is {value}; use 0 to {limits.get(key, 1.0)}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Augment":
        """Builds it from a plain dict.

        Raises:
          ValueError: an unknown key (names the nearest), no number, or one out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key, value in settings.items():
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise ValueError(f"augment has no key {key!r}; did you mean {nearest!r}?")
            if not isinstance(value, int | float):
                raise ValueError(f"augment.{key} is {value!r}; it must be a number")
        return cls(**{key: float(value) for key, value in settings.items()})

    def __call__(
        self, image: UInt8[np.ndarray, "oh ow 3"], frame: Frame, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Returns one changed image.

        The number of draws is fixed, so that switching one change on leaves the others as they
        were. Geometry is a single linear interpolation; colour a single affine map of RGB.
        """
        mirror, grey, cutout, *where = rng.random(5).tolist()
        down, right, size, angle, brightness, contrast, saturation = rng.uniform(-1, 1, 7).tolist()
        if self.shift or self.scale or self.rotation:
            image = self._warp(image, frame, down, right, size, angle)
        else:
            image = frame.centre(image)
        if mirror < self.flip:
            image = image[:, ::-1]
        if self.colour or grey < self.grey:
            image = self._recolour(image, brightness, contrast, saturation, grey < self.grey)
        if cutout < self.cutout:
            image = self._cut(image, *where)
        return np.ascontiguousarray(image)

    def _warp(
        self,
        image: UInt8[np.ndarray, "oh ow 3"],
        frame: Frame,
        down: float,
        right: float,
        size: float,
        angle: float,
    ) -> UInt8[np.ndarray, "h w 3"]:
        factor = math.exp(-self.scale * size)
        theta = math.radians(self.rotation * angle)
        cos, sin = factor * math.cos(theta), factor * math.sin(theta)
        inner_y, inner_x = (frame.height - 1) / 2, (frame.width - 1) / 2
        y = (image.shape[0] - 1) / 2 - self.shift * frame.height * down
        x = (image.shape[1] - 1) / 2 - self.shift * frame.width * right
        output_to_input = np.array(
            [
                [cos, -sin, x - cos * inner_x + sin * inner_y],
                [sin, cos, y - sin * inner_x - cos * inner_y],
            ]
        )
        return cv2.warpAffine(
            image,
            output_to_input,
            (frame.width, frame.height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )

    def _recolour(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        brightness: float,
        contrast: float,
        saturation: float,
        grey: bool,
    ) -> UInt8[np.ndarray, "h w 3"]:
        brighter, sharper, richer = (
            1 + self.colour * change for change in (brightness, contrast, saturation)
        )
        richer = 0.0 if grey else richer
        mean = float(_GREY[0] @ cv2.mean(image)[:3])
        colours = brighter * sharper * (richer * np.eye(3) + (1 - richer) * _GREY)
        offset = np.full((3, 1), brighter * (1 - sharper) * mean)
        return cv2.transform(image, np.concatenate([colours, offset], axis=1))

    def _cut(
        self, image: UInt8[np.ndarray, "h w 3"], y: float, x: float
    ) -> UInt8[np.ndarray, "h w 3"]:
        image = image.copy()
        spans = [
            slice(
                max(0, round((at - self.cutout_size / 2) * side)),
                round((at + self.cutout_size / 2) * side),
            )
            for at, side in zip((y, x), image.shape[:2], strict=True)
        ]
        image[spans[0], spans[1]] = 127
        return image
