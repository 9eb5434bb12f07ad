"""The picture of one face, from whom it belongs to (Traits) and how it was taken (Shot).

A head is an ellipsoid whose width changes with height, with bumps along z for nose, sockets, lips
and so on. Each pixel's ray meets it in closed form; a second pass corrects the bumps' parallax.
Features are painted in head coordinates with edges about a pixel wide, so that they turn with the
head. Hair is a second, larger ellipsoid with an opening for the face.

Units: half a head's height; x to the picture's right, y up, z towards the camera; a picture point
is (u, v). Colours are [3, 1, 1] and linear while light falls on them, planes [h, w].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from marginface.data.faces.traits import Shot, Traits, mix, unit
from marginface.typing import Array, Float

__all__ = ["draw"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]
_BLOCK = 8
_waves_1d = np.cos(np.pi * np.arange(_BLOCK)[:, None] * (np.arange(_BLOCK) + 0.5) / _BLOCK) / 2
_DCT = (_waves_1d * np.where(np.arange(_BLOCK) == 0, np.sqrt(0.5), 1.0)[:, None]).astype(np.float32)

Planes = tuple[Any, Any, Any]


def _step(low, high, value):
    """0 at `low`, 1 at `high`, straight between."""
    return jnp.clip((value - low) * (1.0 / (high - low)), 0.0, 1.0)


def _inside(distance, width):
    """Coverage of a pixel by a shape: `distance` > 0 inside, the edge `width` wide."""
    return jnp.clip(distance * (1.0 / width) + 0.5, 0.0, 1.0)


def _bell(r2):
    """Close to exp(-r²), but cheap and zero from r = 2 on."""
    q = jnp.maximum(1 - 0.25 * r2, 0.0)
    return (q * q) * (q * q)


def _spot(x, y, width, height):
    x, y = x * (1.0 / width), y * (1.0 / height)
    return _bell(x * x + y * y)


def _line(distance, width):
    return _bell((distance * (1.0 / width)) ** 2)


def _length(x, y):
    return jnp.sqrt(x * x + y * y + 1e-9)


def _wave(x):
    """A smooth wave of period 1 between -1 and 1, cheaper than a cosine."""
    z = 4 * jnp.abs(x - jnp.floor(x) - 0.5) - 1
    return z * (1.5 - 0.5 * z * z)


def _grain(x, phases):
    """Irregular stripes along x, about -1 to 1, with a mean frequency of about 1."""
    bent = 1.83 * x + 0.3 * _wave(0.37 * x)
    return 0.5 * (_wave(x + phases[0]) + _wave(bent + phases[1]))


def _cells(x, y, seed):
    """White noise in 0..1 of unit cells; x, y > 0."""
    h = jnp.floor(x).astype(jnp.uint32) * np.uint32(0x9E3779B1)
    h = h + jnp.floor(y).astype(jnp.uint32) * np.uint32(0x85EBCA77) + seed
    h = (h ^ (h >> 15)) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> 12)) * np.uint32(0x297A2D39)
    return (h >> 8).astype(jnp.float32) * np.float32(2**-24)


def _column(color):
    return jnp.asarray(color, jnp.float32)[:, None, None]


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


class _View(NamedTuple):
    """The camera: rays and light in head coordinates."""

    frame: tuple[Any, Any]  # picture coordinates in -1..1
    upright: tuple[Any, Any]  # the same without shift, scale and roll
    pixel: Array
    origin: Planes
    ray: Planes
    light: Planes
    eye: Planes
    turn: tuple[Array, Array, Array, Array]  # cos and sin of yaw, of pitch

    def to_view(self, x, y, z):
        cos_yaw, sin_yaw, cos_pitch, sin_pitch = self.turn
        x, z = cos_yaw * x + sin_yaw * z, cos_yaw * z - sin_yaw * x
        return x, cos_pitch * y - sin_pitch * z, cos_pitch * z + sin_pitch * y

    def at(self, t):
        return tuple(o + t * r for o, r in zip(self.origin, self.ray, strict=True))

    def lit(self, normal, wrap):
        return jnp.maximum((_dot(normal, self.light) + wrap) * (1.0 / (1 + wrap)), 0.0)


def _look(s: Shot, size: int) -> _View:
    grid = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2.0 / size) - 1.0
    right, up = jnp.broadcast_arrays(grid[None, :], -grid[:, None])
    zoom = 1.3 / s.scale
    u, v = zoom * right - s.shift_x, zoom * up - s.shift_y + 0.03
    cos, sin = jnp.cos(s.roll), jnp.sin(s.roll)
    u, v = cos * u + sin * v, cos * v - sin * u
    cos_yaw, sin_yaw = jnp.cos(s.yaw), jnp.sin(s.yaw)
    cos_pitch, sin_pitch = jnp.cos(s.pitch), jnp.sin(s.pitch)

    def to_head(x, y, z):
        y, z = cos_pitch * y + sin_pitch * z, cos_pitch * z - sin_pitch * y
        return cos_yaw * x - sin_yaw * z, y, cos_yaw * z + sin_yaw * x

    near = -1.0 / s.distance
    return _View(
        frame=(right, up),
        upright=(u, v),
        pixel=zoom * (2.0 / size),
        origin=to_head(u, v, 0.0),
        ray=to_head(u * near, v * near, 1.0),
        light=to_head(s.light[0], s.light[1], s.light[2]),
        eye=to_head(0.0, 0.0, 1.0),
        turn=(cos_yaw, sin_yaw, cos_pitch, sin_pitch),
    )


def _meet(origin, ray, a, b, c):
    """Where rays meet the ellipsoid (a, b, c): nearest t, farthest t, room inside the outline."""
    a, b, c = 1.0 / a, 1.0 / b, 1.0 / c
    ox, oy, oz = origin[0] * a, origin[1] * b, origin[2] * c
    dx, dy, dz = ray[0] * a, ray[1] * b, ray[2] * c
    inverse = 1.0 / (dx * dx + dy * dy + dz * dz)
    middle = -(ox * dx + oy * dy + oz * dz) * inverse
    room = middle * middle - (ox * ox + oy * oy + oz * oz - 1.0) * inverse
    root = jnp.sqrt(jnp.maximum(room, 1e-6))
    return middle + root, middle - root, room


def _half_width(t: Traits, y):
    """Half width of the head at height y, and its slope."""
    width, slope = 1.0, 0.0
    for amount, middle, extent in (
        (t.jaw, -0.68, 0.26),
        (t.cheekbone, -0.12, 0.22),
        (t.forehead, 0.5, 0.35),
    ):
        r = (y - middle) * (1.0 / extent)
        q = jnp.maximum(1 - 0.25 * r * r, 0.0)
        cube = amount * q * q * q
        width, slope = width + cube * q, slope - (2 / extent) * r * cube
    return t.width * width, t.width * slope


def _relief(t: Traits, s: Shot, x, y):
    """Height of nose, sockets, lips ... at (x, y) and its two slopes."""
    smile, gap = jnp.maximum(s.smile, 0.0), 0.06 * s.mouth_open
    tip, mouth, narrow = t.nose_y, t.mouth_y, t.nose_width
    bridge = 0.85 * (t.eye_y - tip)
    middle = [  # y, half width, extent below and above, height
        (tip, 0.75 * narrow, 0.09, bridge, 0.85 * t.nose_height),
        (tip + 0.02, 0.8 * narrow, 0.09, 0.1, 0.35 * t.nose_height),
        (t.eye_y - 0.05, 0.09, 0.2, 0.2, 0.09 * t.nose_bridge),
        (mouth, t.mouth_width, 0.13 + gap, 0.13, 0.04),
        (mouth - 0.16 - gap, 0.15, 0.05, 0.05, -0.035),
        (-0.87, 0.17, 0.12, 0.12, t.chin + 0.04),
    ]
    paired = [  # the same after the distance from the middle
        (narrow, tip - 0.02, 0.055, 0.06, 0.07, t.nose_wings),
        (t.eye_x, t.eye_y + 0.17, 0.24, 0.08, 0.1, 0.045),
        (t.eye_x, t.eye_y, 0.16, 0.11, 0.11, -t.socket - 0.02),
        (t.eye_x, t.eye_y, 0.1, 0.08, 0.08, 0.04),
        (0.43, 0.03 * smile - 0.24, 0.2, 0.16, 0.16, 0.05 + 0.4 * t.cheekbone + 0.04 * smile),
        (0.42, -0.55, 0.13, 0.2, 0.2, -0.05 * t.age - 0.01),
    ]

    def add(bumps, x):
        height = slope_x = slope_y = jnp.zeros_like(x)
        for cx, cy, width, below, above, amount in bumps:
            width, below, above = 1.0 / width, 1.0 / below, 1.0 / above
            extent = jnp.where(y > cy, above, below)
            i, j = (x - cx) * width, (y - cy) * extent
            q = jnp.maximum(1 - 0.25 * (i * i + j * j), 0.0)
            cube = amount * q * q * q
            height = height + cube * q
            slope_x = slope_x - 2 * width * i * cube
            slope_y = slope_y - 2 * extent * j * cube
        return height, slope_x, slope_y

    height, slope_x, slope_y = add([(0.0, *bump) for bump in middle], x)
    more, more_x, more_y = add(paired, jnp.abs(x))
    return height + more, slope_x + jnp.sign(x) * more_x, slope_y + more_y


def _head(t: Traits, s: Shot, view: _View):
    """Point and normal of the head under each pixel, and the coverage by the head."""

    def skull(y):
        width, slope = _half_width(t, y)
        return width, slope, jnp.where(y > 0, 0.95, 1.0)

    ox, oy, oz = view.origin
    width, _, tall = skull(oy)
    near, _, _ = _meet(view.origin, view.ray, width, tall, t.depth)
    x, y, _ = view.at(near)
    width, _, tall = skull(y)
    lift, _, _ = _relief(t, s, x, y)
    near, _, room = _meet((ox, oy, oz - lift), view.ray, width, tall, t.depth)
    x, y, z = view.at(near)
    width, narrowing, tall = skull(y)
    lift, slope_x, slope_y = _relief(t, s, x, y)
    inverse = 1.0 / width
    flat_x = x * inverse * inverse
    flat_z = (z - lift) * (1.0 / t.depth**2)
    normal = unit(
        flat_x - flat_z * slope_x,
        y / (tall * tall) - flat_x * x * inverse * narrowing - flat_z * slope_y,
        flat_z,
    )
    return (x, y), normal, _inside(room, 2 * view.pixel)


def _skin(t: Traits, s: Shot, x, y, side):
    """Albedo and shade of the bare skin: blush, freckles, moles, scar, lines of age, nostrils."""
    skin = _column(t.skin) ** 2
    cloud = _grain(3.1 * x + 1.7 * y, t.phases) + _grain(3.3 * y - 1.5 * x, t.phases[1:])
    fine = _grain(9 * x - 4 * y, t.phases[2:]) * _grain(8 * y + 5 * x, t.phases[1:])
    red = t.blush * (_spot(side - 0.4, y + 0.25, 0.22, 0.2) + _spot(side, y - t.nose_y, 0.13, 0.13))
    albedo = skin * (1 + t.mottle * (cloud + (0.5 + t.age) * fine))
    albedo = albedo * (1 - red * _column([0.0, 1.0, 0.8]))

    fx, fy = 20 * x + 60, 20 * y + 60
    seed = (t.phases[0] * 65536).astype(jnp.uint32)
    cell = _cells(fx, fy, seed)
    off_x, off_y = 0.25 * _wave(7 * cell), 0.25 * _wave(11 * cell)
    middle = _length(fx - jnp.floor(fx) - 0.5 - off_x, fy - jnp.floor(fy) - 0.5 - off_y)
    where = (cell > 0.55) * _spot(side - 0.2, y + 0.18, 0.45, 0.3)
    dots = t.freckles * where * _step(0.5, 0.1, middle)
    for mx, my, radius in t.marks:
        mole = _step(1.4, 0.6, _length(x - mx, y - my) / jnp.maximum(radius, 0.001))
        dots = jnp.maximum(dots, 0.75 * mole)
    albedo = albedo * (1 - dots * _column([0.55, 0.75, 0.85]))
    sx, sy, slope, there = t.scar[0], t.scar[1], t.scar[2], t.scar[3]
    turn = jax.lax.rsqrt(1 + slope * slope)
    along, across = turn * (x - sx + slope * (y - sy)), turn * (y - sy - slope * (x - sx))
    scar = there * _spot(across, along, 0.02, 0.2)
    albedo = mix(albedo, skin * _column([1.2, 0.8, 0.8]), scar)

    ex, ey = side - t.eye_x, y - t.eye_y
    furrow = _line(_wave(5.5 * y + 1.4 * x * x) - 0.9, 0.25) * _spot(x, y - 0.42, 0.4, 0.14)
    fold = _spot(
        side - t.nose_width - 0.07 - 0.35 * (t.nose_y - y),
        y - 0.5 * (t.nose_y + t.mouth_y),
        0.025,
        0.15,
    )
    bag = _spot(ey + 0.11 - 0.8 * ex * ex, ex, 0.022, 0.13)
    lines = 0.6 * t.age * furrow + (0.1 + 0.4 * t.age) * bag
    lines = lines + (0.1 + 0.5 * t.age + 0.3 * jnp.maximum(s.smile, 0)) * fold
    hole = _spot(side - 0.6 * t.nose_width, y - t.nose_y + 0.075, 0.035, 0.026)
    under = _spot(side, y - t.nose_y + 0.1, 1.1 * t.nose_width, 0.035)
    shade = (1 - 0.55 * jnp.minimum(lines, 1)) * (1 - 0.75 * hole) * (1 - 0.35 * under)
    return albedo, shade


def _whiskers(t: Traits, s: Shot, y, side, strand):
    """Coverage of the skin by beard, moustache and stubble."""
    jawline = -0.42 + t.beard_line + 0.25 * _step(0.35, 0.7, side) - 0.12 * _step(0.3, 0.0, side)
    lips = _length(side / (t.mouth_width + 0.03), (y - t.mouth_y) * (1 / 0.16)) - 1
    low = _step(0.0, 0.18, jawline - y) * _step(0.0, 0.25, lips)
    high = _inside(0.055 - jnp.abs(y - t.mouth_y - 0.12 + 0.5 * side * side), 0.04)
    high = high * _step(0.08, 0.0, side - t.mouth_width - 0.02)
    grown = jnp.maximum(t.beard * low, t.moustache * high) * (1 + 0.3 * strand)
    rough = t.stubble * jnp.maximum(low, high) * (0.7 + 0.4 * strand)
    return jnp.clip((1 + s.beard_growth) * (grown + rough), 0.0, 0.95)


def _mouth(t: Traits, s: Shot, pixel, albedo, shade, y, side):
    gap = 0.11 * s.mouth_open
    width = t.mouth_width * (1 + 0.22 * s.smile)
    lift = (0.45 / t.mouth_width * s.smile + 0.3 * t.mouth_curve) * side * side
    my = y - t.mouth_y - lift + 0.5 * gap
    across = side * (1.0 / width)
    arc = 1 - across * across
    thin = 1 - 0.3 * jnp.clip(s.smile, -0.5, 1)
    bow = 1 - t.cupid_bow * _line(side, 0.045)
    slit = gap * arc
    top, bottom = slit + t.upper_lip * thin * arc * bow, slit + t.lower_lip * thin * arc
    lips = _inside(jnp.minimum(top - my, my + bottom), 1.3 * pixel)
    hole = _inside(slit - 0.004 - jnp.abs(my), pixel)
    teeth = hole * _inside(my + 0.25 * gap, pixel)
    seam = _line(my, 0.018) * _step(1.25, 0.9, across) * (1 - hole)
    corner = _spot(side - width, my, 0.03, 0.03)
    lip_tone = _column(t.lip_color) ** 2 * (0.85 + 0.25 * _step(0.0, -0.1, my))
    albedo = mix(albedo, lip_tone, 0.85 * lips)
    albedo = mix(albedo, _column([0.09, 0.02, 0.02]), hole)
    albedo = mix(albedo, _column([0.72, 0.69, 0.63]), teeth)
    return albedo, shade * (1 - 0.7 * seam) * (1 - 0.45 * corner)


def _eyes(t: Traits, s: Shot, pixel, light, albedo, shade, x, y, side):
    mirror = jnp.sign(x)
    ex, level = side - t.eye_x, y - t.eye_y
    ey = level - t.eye_slant * ex
    across = ex * (1.0 / t.eye_width)
    arc = t.eye_open * s.eyelid * (1 - across * across)
    top, bottom = arc * (1.05 - 0.15 * across), -0.75 * arc
    ball = _inside(jnp.minimum(top - ey, ey - bottom), pixel)
    gx, gy = ex - mirror * s.gaze_x * 0.06, ey - s.gaze_y * 0.03 - 0.006
    r = _length(gx, gy)
    iris, pupil = _inside(t.iris - r, pixel), _inside(0.4 * t.iris - r, pixel)
    glint = _spot(gx * mirror - 0.4 * t.iris * jnp.sign(light[0]), gy - 0.4 * t.iris, 0.02, 0.02)
    color = mix(
        0.6 - 0.2 * _step(0.4, 1.0, jnp.abs(across)),
        _column(t.eye_color) ** 2 * (0.8 + 0.8 * r / t.iris),
        iris,
    )
    color = (color * (1 - 0.9 * pupil) + 0.8 * glint * iris) * (1 - 0.5 * _step(0.025, 0, top - ey))
    reach = _step(1.15, 0.95, jnp.abs(across))
    lash = t.lashes * _line(ey - top - 0.004, 0.022) * reach
    lower = 0.35 * t.lashes * _line(ey - bottom, 0.014) * reach
    crease = (0.2 + 0.4 * t.lid) * _line(ey - top - 0.055, 0.02) * reach
    hollow = (0.1 + 2.0 * t.socket) * _spot(ex + 0.05, level - 0.05, 0.17, 0.1) * (1 - ball)
    shade = shade * (1 - 0.85 * lash) * (1 - lower) * (1 - crease) * (1 - hollow)
    return mix(albedo, color, ball), shade, ball


def _brows(t: Traits, s: Shot, pixel, y, side, strand):
    along = (side - t.brow_gap) * (1.0 / t.brow_length)
    curve = t.brow_slope * (side - t.eye_x) + t.brow_arch * (1 - (2 * along - 1.1) ** 2)
    height = t.eye_y + t.brow_y + curve + s.brow_raise * (0.01 + 0.02 * along)
    thick = t.brow_thick * (1 - 0.6 * jnp.clip(along, 0, 1) ** 2)
    brow = _inside(thick - jnp.abs(y - height), 1.5 * pixel)
    ends = _step(-0.12, 0.06, along) * _step(1.08, 0.85, along)
    return 0.85 * brow * ends * (1 + 0.15 * strand)


def _face(t: Traits, s: Shot, view: _View, point, normal):
    """The lit face."""
    x, y = point
    pixel, side = view.pixel, jnp.abs(x + t.crooked * y)
    strand = _grain(17 * x + 3 * y, t.phases) * _wave(7 * y - 2 * x)
    albedo, shade = _skin(t, s, x, y, side)
    fur = _column(t.brow_color) ** 2 * (1 + 0.4 * strand)
    whiskers = _whiskers(t, s, y, side, strand)
    albedo = mix(albedo, fur, whiskers)
    albedo, shade = _mouth(t, s, pixel, albedo, shade, y, side)
    albedo, shade, ball = _eyes(t, s, pixel, view.light, albedo, shade, x, y, side)
    albedo = mix(albedo, fur, _brows(t, s, pixel, y, side, strand))
    lamp = _column(s.light_color)
    half = unit(*(a + b for a, b in zip(view.light, view.eye, strict=True)))
    gloss = jnp.maximum(_dot(normal, half), 0.0) ** 16 * (1 - whiskers) * (1 - ball)
    rim = 0.55 + 0.45 * _step(0.0, 0.55, _dot(normal, view.eye))
    sky = s.ambient * (0.8 + 0.2 * normal[1])
    return albedo * (shade * rim) * (lamp * view.lit(normal, 0.2) + sky) + lamp * (
        0.5 * t.oily * gloss
    )


class _Hair(NamedTuple):
    """The shell around the head that carries hair or a hat."""

    cover: Array
    near: Planes
    far: Planes
    normal: Planes
    across: Array


def _shell(t: Traits, s: Shot, view: _View) -> _Hair:
    full = mix(t.hair_volume, 0.05, s.hat)
    ox, oy, oz = view.origin
    low = 1.0 + 0.9 * _step(-0.5, -1.4, t.hair_back)
    a, c = 1.06 * t.width + full, t.depth + 0.1 + 0.75 * full
    b = (0.9 + full) * jnp.where(view.upright[1] < 0.12, low, 1.0)
    near, far, room = _meet((ox, oy - 0.12, oz + 0.08), view.ray, a, b, c)
    x, y, z = view.at(near)
    normal = unit(x * (1 / a**2), (y - 0.12) / (b * b), (z + 0.08) * (1 / c**2))
    cover = _inside(room, 2 * view.pixel)
    return _Hair(cover, (x, y, z), view.at(far), normal, jnp.abs(x) * (1.0 / a))


def _behind(t: Traits, s: Shot, view: _View, hair: _Hair):
    """Backdrop, the far side of the hair, neck, shoulders and ears."""
    u, v = view.upright
    right, up = view.frame
    pixel, lamp = view.pixel, _column(s.light_color)
    wall = [_column(jnp.clip(color, 0.02, 0.98)) ** 2 for color in s.backdrop]
    picture = mix(wall[0], wall[1], 0.5 + 0.4 * right + 0.1 * up)
    picture = mix(picture, wall[2], _step(-0.06, 0.06, right - s.edge[0] - s.edge[1] * up))

    hair_tint = _column(t.hair_color) ** 2
    x, y, _ = hair.far
    below_top = _inside(t.hair_top - y, 4 * pixel)
    ragged = 0.05 * (1 + s.hair_mess) * _grain(5 * x, t.phases)
    back = t.hair * hair.cover * below_top * _inside(y - t.hair_back + ragged, 2 * pixel)
    bun_x, bun_y, _ = view.to_view(0.0, 1.02 + t.hair_volume, -0.35)
    bun = t.bun * _inside(0.26 - _length(u - bun_x, v - bun_y), pixel)
    dim = hair_tint * (0.85 + 0.25 * _grain(8 * x, t.phases)) * (0.2 * lamp + 0.4 * s.ambient)
    picture = mix(picture, dim, jnp.maximum(back, bun))

    skin = _column(t.skin) ** 2
    chin_x, chin_y, _ = view.to_view(0.0, -0.75, -0.25)
    nx = (u - 0.6 * chin_x) * (1.0 / (0.53 * t.width))
    neck = _inside(0.4 * (1 - jnp.abs(nx)), pixel) * _inside(chin_y - v, pixel)
    bulge = jnp.sqrt(jnp.maximum(1 - nx * nx, 0.05))
    glow = lamp * jnp.maximum(bulge * s.light[2] + nx * s.light[0], 0.1) + s.ambient
    picture = mix(picture, skin * glow * (0.4 + 0.4 * _step(chin_y - 0.3, chin_y - 0.7, v)), neck)
    collar = 0.2 * chin_y - 1.05 - 0.22 * u * u - 0.15 * _step(0.42, 0.2, jnp.abs(u))
    cloth = _column(s.shirt) ** 2 * (0.5 * lamp + s.ambient)
    picture = mix(picture, cloth, _inside(collar - v, pixel))

    for side in (-1.0, 1.0):
        ear_x, ear_y, _ = view.to_view(side * (0.97 * t.width + t.ear_out), t.eye_y - 0.1, -0.12)
        breadth = 0.065 + 0.6 * t.ear_out + 0.08 * jnp.abs(view.turn[1])
        r = _length((u - ear_x) * (1.0 / breadth), (v - ear_y) * (1.0 / t.ear_size))
        glow = lamp * (0.8 * jnp.maximum(0.5 + side * s.light[0], 0.15)) + s.ambient
        tint = skin * _column([1.0, 0.85, 0.82]) * (0.55 + 0.35 * _step(0.3, 0.9, r))
        picture = mix(picture, tint * glow, _inside((1 - r) * breadth, pixel))
    return picture


def _before(t: Traits, s: Shot, view: _View, hair: _Hair, picture, head):
    """The near side of the hair, a hat, glasses."""
    pixel, lamp = view.pixel, _column(s.light_color)
    x, y, z = hair.near
    across, sky = hair.across, s.ambient * (0.8 + 0.2 * hair.normal[1])

    part = x - 0.8 * t.hair_sweep
    flow = part * (1.25 + 0.35 * jnp.abs(part) - 0.3 * y)
    flow = flow + 0.05 * t.hair_curl * _wave(4.1 * y + t.phases[2])
    locks = _grain(6.5 * flow, t.phases) + 0.6 * _grain(19 * flow, t.phases[2:])
    curls = _grain(7 * y + 2 * x, t.phases[1:]) * _wave(6 * x - 2 * y) * t.hair_curl
    strands = 0.85 + 0.2 * locks + 0.25 * curls
    ragged = (0.02 + 0.05 * t.fringe) * (1 + s.hair_mess) * _grain(5 * x, t.phases)
    temple = across * across
    line = t.hair_line + ragged + 0.45 * t.hair_sweep * (x + 0.15) + t.hair_recede * temple
    line = line - 0.3 * temple * (1 - t.fringe)
    edge = mix(line, t.hair_side, _step(0.7, 0.97, across))
    edge = jnp.where(z > 0.0, edge, t.hair_back)
    worn = t.hair * hair.cover * _inside(t.hair_top - y, 4 * pixel)
    front = worn * _inside(y - edge, 3 * pixel)
    shadow = worn * head * _step(-0.18, 0.05, y - edge) * (1 - front)
    shine = _line(y - 0.72 + 0.1 * x * x, 0.22) * view.lit(hair.normal, 0.0) * (1 + locks)
    light = lamp * (1.1 * view.lit(hair.normal, 0.35)) + sky
    tint = _column(t.hair_color) ** 2 * (strands * light) + lamp * (0.05 * shine)
    picture = mix(picture * (1 - 0.35 * shadow), tint, front)

    rise = y - s.hat_line - 0.05 * x
    knit = (1 - 0.3 * _step(0.16, 0.13, rise)) * (0.85 + 0.15 * _wave(9 * x))
    cap = _column(s.hat_color) ** 2 * knit * (lamp * view.lit(hair.normal, 0.2) + sky)
    picture = mix(picture, cap, s.hat * hair.cover * _inside(rise, pixel))

    size = s.glasses_size
    x, y, _ = view.at((t.depth + 0.03 - view.origin[2]) / view.ray[2])
    side, y = jnp.abs(x), y - t.eye_y
    qx, qy = jnp.abs(side - t.eye_x - 0.01) - 0.62 * size, jnp.abs(y + 0.03) - 0.42 * size
    rim = _length(jnp.maximum(qx, 0), jnp.maximum(qy, 0)) - 0.33 * size
    bridge = _inside(0.016 - jnp.abs(y - 0.03), pixel) * (side < t.eye_x - 0.8 * size)
    arm = _inside(0.018 - jnp.abs(y - 0.05), pixel) * (side > t.eye_x + 0.95 * size) * head
    frame = jnp.maximum(_inside(0.02 - jnp.abs(rim), pixel), jnp.maximum(bridge, arm))
    lens = _inside(-rim, pixel) * (0.08 * s.glasses + 0.8 * s.sunglasses)
    metal = _column(s.glasses_color) ** 2 * (0.6 * lamp + s.ambient)
    return mix(picture * (1 - lens), metal, s.glasses * frame)


def _blur(image, sigma):
    """Gaussian of `sigma` pixels over [3, h, w], five taps."""
    taps = jnp.exp(-(np.arange(3) ** 2) / (2 * sigma**2 + 1e-4))
    taps = taps / (taps[0] + 2 * taps[1] + 2 * taps[2])
    for axis in (1, 2):
        size = image.shape[axis]
        wide = jnp.pad(image, [(2, 2) if k == axis else (0, 0) for k in range(3)], mode="edge")
        image = sum(
            (
                taps[abs(k - 2)] * jax.lax.slice_in_dim(wide, k, k + size, axis=axis)
                for k in range(5)
            ),
            start=jnp.zeros_like(image),
        )
    return image


def _compress(image, quantum):
    """Quantise the 8 x 8 cosine transform of [3, h, w], coarser for colour and for detail.

    The staircase n + 4f³ (n the nearest integer, f the rest) stands in for rounding: it is
    continuous, so that devices that differ in the last bit draw the same picture.
    """
    _, h, w = image.shape
    luma = (image * _LUMA).sum(0, keepdims=True)
    planes = jnp.concatenate([luma, image[0:1] - luma, image[2:3] - luma])
    blocks = planes.reshape(3, h // _BLOCK, _BLOCK, w // _BLOCK, _BLOCK)
    waves = jnp.einsum("ui,cyixj,vj->cyuxv", _DCT, blocks, _DCT, precision="highest")
    order = np.add.outer(np.arange(_BLOCK), np.arange(_BLOCK))[:, None, :]
    coarse = np.stack([1 + 0.4 * order, 2 + 0.8 * order, 2 + 0.8 * order])[:, None]
    step = quantum * coarse.astype(np.float32)
    level = waves / step
    whole = jnp.round(level)
    waves = step * (whole + 4 * (level - whole) ** 3)
    planes = jnp.einsum("ui,cyuxv,vj->cyixj", _DCT, waves, _DCT, precision="highest")
    luma, red, blue = planes.reshape(3, h, w)
    green = -(_LUMA[0] * red + _LUMA[2] * blue) / _LUMA[1]
    return luma + jnp.stack([red, green, blue])


def draw(t: Traits, s: Shot, key: Array, size: int) -> Float[Array, "3 {size} {size}"]:
    """The picture of `t` as `s` has it, about 0 to 1; `key` draws the sensor noise."""
    view = _look(s, size)
    point, normal, head = jax.lax.optimization_barrier(_head(t, s, view))
    hair = _shell(t, s, view)
    picture = mix(_behind(t, s, view, hair), _face(t, s, view, point, normal), head)
    picture = _before(t, s, view, hair, picture, head)

    picture = jnp.sqrt(jnp.clip(0.95 * s.exposure * picture, 0.0, 1.5))
    picture = picture + s.contrast * (picture - 0.5)
    picture = _blur(jax.lax.optimization_barrier(picture), s.blur * (size / 48))
    bits = jax.random.bits(key, (size, size))
    noise = jnp.stack([(bits >> shift) & 1023 for shift in (0, 10, 20)]).astype(jnp.float32)
    return _compress(picture + s.noise * (noise * (3.4 / 1023) - 1.7), s.quantum)
