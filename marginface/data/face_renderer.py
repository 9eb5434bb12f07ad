"""Drawing one face: who it is (Traits), how it was photographed (Shot), and the picture.

A head is an ellipsoid whose width changes with height, with bumps along z for nose, sockets, lips
and so on. Each pixel's ray meets it in closed form; a second pass corrects the bumps' parallax.
Features are painted in head coordinates with edges one pixel wide, so that they turn with the
head. Hair is a second, larger ellipsoid with an opening for the face. Units: half a head's
height; x to the picture's right, y up, z towards the camera. Colours are [3, 1, 1], planes [h, w].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from marginface.typing import Array, Float

_SKIN = np.array([[0.97, 0.83, 0.75], [0.87, 0.67, 0.54], [0.66, 0.45, 0.33], [0.36, 0.23, 0.17]])
_HAIR = np.array(
    [[0.06, 0.05, 0.05], [0.22, 0.13, 0.08], [0.45, 0.27, 0.14], [0.83, 0.66, 0.38]]
)
_EYES = np.array([[0.16, 0.09, 0.05], [0.36, 0.24, 0.10], [0.30, 0.42, 0.24], [0.35, 0.52, 0.68]])
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]
_BLOCK = 8
_DCT = np.cos(np.pi * np.arange(_BLOCK)[:, None] * (np.arange(_BLOCK) + 0.5) / _BLOCK) / 2
_DCT[0] /= np.sqrt(2)
_DCT = _DCT.astype(np.float32)


class _Draws:
    """Uniform numbers of one key, handed out one after another."""

    def __init__(self, key: Array, count: int):
        self._numbers = iter(jax.random.uniform(key, (count,)))

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * next(self._numbers)

    def about(self, middle, spread):
        """Bell-shaped (mean of two uniforms) on middle ± spread."""
        return middle + spread * (next(self._numbers) + next(self._numbers) - 1.0)

    def chance(self, probability):
        return (next(self._numbers) < probability).astype(jnp.float32)

    def point(self, low=-1.0, high=1.0):
        return self.uniform(low, high), self.uniform(low, high)


def _ramp(table, position):
    """Colour [3] at `position` in 0..1 along the rows of `table`."""
    stops = jnp.linspace(0.0, 1.0, len(table))
    table = jnp.asarray(table, jnp.float32)
    return jnp.stack([jnp.interp(position, stops, table[:, i]) for i in range(3)])


class Traits(NamedTuple):
    """All that makes an identity; lengths in half head heights, the rest in 0..1."""

    width: Array
    depth: Array
    jaw: Array
    cheekbone: Array
    forehead: Array
    chin: Array
    crooked: Array
    skin: Array  # [3]
    blush: Array
    mottle: Array
    oily: Array
    texture: Array  # integer that seeds skin cells
    age: Array
    freckles: Array
    mole_x: Array  # [3]
    mole_y: Array  # [3]
    mole_size: Array  # [3]
    scar: Array  # [4]: x, y, slope, presence
    eye_x: Array
    eye_y: Array
    eye_width: Array
    eye_open: Array
    eye_slant: Array
    eye_color: Array  # [3]
    iris: Array
    lid: Array
    lashes: Array
    socket: Array
    brow_y: Array
    brow_thick: Array
    brow_arch: Array
    brow_slope: Array
    brow_gap: Array
    brow_length: Array
    nose_y: Array
    nose_width: Array
    nose_height: Array
    nose_bridge: Array
    nose_wings: Array
    mouth_y: Array
    mouth_width: Array
    upper_lip: Array
    lower_lip: Array
    bow: Array
    mouth_curve: Array
    lip_color: Array  # [3]
    hair_color: Array  # [3]
    brow_color: Array  # [3]
    hair_volume: Array
    hair_line: Array
    hair_peak: Array
    hair_side: Array
    hair_back: Array
    hair_part: Array
    hair_curl: Array
    fringe: Array
    ear_size: Array
    ear_out: Array
    beard: Array
    moustache: Array
    stubble: Array
    beard_line: Array


def draw_traits(key: Array) -> Traits:
    """Identity parameters of one key."""
    d = _Draws(key, 160)
    feminine = jnp.clip(d.about(0.5, 1.1), 0, 1)
    age = d.uniform() ** 1.4
    tone = d.uniform()
    skin = _ramp(_SKIN, tone) * jnp.stack([d.about(1, 0.05), d.about(1, 0.05), d.about(1, 0.08)])
    lightness = d.uniform() * jnp.clip(1.3 - 1.5 * tone, 0.12, 1.0)
    hair = _ramp(_HAIR, lightness) * d.about(1, 0.15)
    red = d.chance(0.1) * jnp.clip(1 - 2 * tone, 0, 1)
    hair = hair + red * (jnp.array([0.55, 0.22, 0.08]) - hair)
    grey = jnp.clip((age - d.uniform(0.45, 1.0)) * 4, 0, 1)
    brow = hair * 0.75
    hair = hair + grey * (d.uniform(0.5, 0.85) - hair)
    brow = brow + 0.5 * grey * (0.45 - brow)
    male = 1 - feminine
    bald = d.chance(0.25 * male * (0.3 + age))
    long = d.chance(0.1 + 0.7 * feminine) * (1 - bald)
    fringe = d.chance(0.3) * (1 - bald)
    tied = d.chance(0.25) * feminine
    makeup = d.chance(0.5) * feminine
    bearded = d.chance(0.3) * jnp.clip(2 * male - 0.4, 0, 1)
    lip = skin * jnp.array([0.86, 0.62, 0.62]) * d.about(1.0, 0.1)
    rouge = jnp.stack([d.uniform(0.5, 0.8), d.uniform(0.08, 0.3), d.uniform(0.15, 0.35)])
    lip = lip + 0.75 * makeup * (rouge - lip)
    return Traits(
        width=d.about(0.73, 0.1),
        depth=d.about(0.82, 0.08),
        jaw=d.about(0.02 + 0.07 * male, 0.16),
        cheekbone=d.about(0.03, 0.07),
        forehead=d.about(0.02, 0.08),
        chin=d.about(0.04 + 0.04 * male, 0.06),
        crooked=d.about(0.0, 0.05),
        skin=skin,
        blush=d.uniform(0.0, 0.3) * (1 - 0.7 * tone),
        mottle=d.uniform(0.0, 0.12),
        oily=d.uniform(0.05, 0.3),
        texture=d.uniform(0.0, 4096.0),
        age=age,
        freckles=d.chance(0.3) * d.uniform(0.2, 0.6) * jnp.clip(1.4 - 2 * tone, 0, 1),
        mole_x=jnp.stack([d.about(0, 0.6) for _ in range(3)]),
        mole_y=jnp.stack([d.uniform(-0.85, 0.45) for _ in range(3)]),
        mole_size=jnp.stack([d.uniform(0.02, 0.05) * d.chance(0.45) for _ in range(3)]),
        scar=jnp.stack([d.about(0, 0.5), d.uniform(-0.8, 0.4), d.uniform(-2, 2), d.chance(0.15)]),
        eye_x=d.about(0.305, 0.045),
        eye_y=d.about(0.02, 0.06),
        eye_width=d.about(0.15, 0.03),
        eye_open=d.about(0.068, 0.032),
        eye_slant=d.about(0.08, 0.22),
        eye_color=_ramp(_EYES, d.uniform() ** (1 + 6 * tone)),
        iris=d.about(0.068, 0.012),
        lid=d.uniform(),
        lashes=0.4 + 0.6 * jnp.clip(feminine + d.about(0, 0.3), 0, 1),
        socket=d.about(0.07, 0.05),
        brow_y=d.about(0.2, 0.06),
        brow_thick=d.about(0.028 + 0.022 * male, 0.022),
        brow_arch=d.about(0.035 + 0.03 * feminine, 0.05),
        brow_slope=d.about(0.0, 0.16),
        brow_gap=d.about(0.13, 0.06),
        brow_length=d.about(0.36, 0.07),
        nose_y=d.about(-0.34, 0.07),
        nose_width=d.about(0.105 + 0.03 * tone, 0.04),
        nose_height=d.about(0.23 - 0.04 * tone, 0.08),
        nose_bridge=d.about(0.6, 0.4),
        nose_wings=d.about(0.05, 0.035),
        mouth_y=d.about(-0.61, 0.055),
        mouth_width=d.about(0.25, 0.055),
        upper_lip=d.about(0.05 + 0.015 * feminine + 0.02 * tone, 0.03),
        lower_lip=d.about(0.072 + 0.015 * feminine + 0.02 * tone, 0.035),
        bow=d.uniform(0.0, 0.5),
        mouth_curve=d.about(0.0, 0.5),
        lip_color=lip,
        hair_color=hair,
        brow_color=brow,
        hair_volume=jnp.where(
            bald == 1, 0.015, d.uniform(0.05, 0.16) + 0.22 * d.chance(0.12 + 0.15 * tone)
        ),
        hair_line=jnp.where(
            bald == 1, 2.0, jnp.where(fringe == 1, d.uniform(0.28, 0.42), d.about(0.63, 0.1))
        ),
        hair_peak=d.about(0.0, 0.25) + 0.2 * male * age,
        hair_side=jnp.where(long * (1 - tied) == 1, d.uniform(-2.2, -0.6), d.uniform(-0.1, 0.3)),
        hair_back=jnp.where(long * (1 - tied) == 1, d.uniform(-2.2, -0.9), d.uniform(-0.6, -0.3)),
        hair_part=d.about(0.0, 0.7),
        hair_curl=d.uniform() * d.chance(0.5),
        fringe=fringe,
        ear_size=d.about(0.17, 0.05),
        ear_out=d.about(0.03, 0.04),
        beard=bearded * d.chance(0.7) * d.uniform(0.5, 0.95),
        moustache=bearded * d.chance(0.8) * d.uniform(0.5, 0.95),
        stubble=male * d.uniform(0.0, 0.3),
        beard_line=d.about(0.0, 0.15),
    )


class Shot(NamedTuple):
    """All that changes from one photograph of an identity to the next."""

    yaw: Array
    pitch: Array
    roll: Array
    scale: Array
    shift_x: Array
    shift_y: Array
    distance: Array
    light: Array  # [3], unit, towards the light
    light_color: Array  # [3]
    ambient: Array
    exposure: Array
    contrast: Array
    smile: Array
    mouth_open: Array
    brow_raise: Array
    eyelid: Array
    gaze_x: Array
    gaze_y: Array
    hair_mess: Array
    beard_growth: Array
    glasses: Array
    sunglasses: Array
    glasses_size: Array
    glasses_color: Array  # [3]
    hat: Array
    hat_line: Array
    hat_color: Array  # [3]
    shirt: Array  # [3]
    backdrop: Array  # [4, 3]: the colours of the corners
    blur: Array
    noise: Array
    quantum: Array


def draw_shot(key: Array, difficulty: float | Array) -> Shot:
    """Nuisance parameters of one key; their spread grows with `difficulty`."""
    d = _Draws(key, 96)
    hard = jnp.asarray(difficulty, jnp.float32)
    side = d.about(0.0, 0.25 + 1.0 * hard)
    height = d.about(0.45, 0.2 + 0.4 * hard)
    light = jnp.stack([side, height, jnp.asarray(1.0)])
    warmth = d.about(0.0, 0.03 + 0.12 * hard)
    hats = d.chance(0.09 * hard)
    glasses = d.chance(0.16 * hard)
    base = jnp.stack([d.uniform(0.1, 0.85) for _ in range(3)])
    vary = 0.12 + 0.2 * hard
    return Shot(
        yaw=d.about(0.0, 0.05 + 0.5 * hard),
        pitch=d.about(0.0, 0.03 + 0.22 * hard),
        roll=d.about(0.0, 0.02 + 0.14 * hard),
        scale=1 + d.about(0.0, 0.02 + 0.09 * hard),
        shift_x=d.about(0.0, 0.02 + 0.08 * hard),
        shift_y=d.about(0.0, 0.02 + 0.08 * hard),
        distance=d.uniform(4.0, 8.0),
        light=light / jnp.linalg.norm(light),
        light_color=jnp.stack([1 + warmth, 1 + d.about(0.0, 0.03 * hard), 1 - warmth]),
        ambient=d.about(0.5, 0.08 + 0.13 * hard),
        exposure=1 + d.about(0.0, 0.04 + 0.2 * hard),
        contrast=d.about(0.0, 0.03 + 0.12 * hard),
        smile=d.about(0.1, 0.15 + 0.5 * hard),
        mouth_open=jnp.maximum(d.about(-0.3, 0.15 + 0.6 * hard), 0.0),
        brow_raise=d.about(0.0, 0.2 + 0.5 * hard),
        eyelid=jnp.clip(1 - jnp.maximum(d.about(0.0, 0.05 + 0.4 * hard), -0.2), 0.1, 1.2),
        gaze_x=d.about(0.0, 0.2 + 0.5 * hard),
        gaze_y=d.about(0.0, 0.1 + 0.3 * hard),
        hair_mess=d.about(0.0, 0.2 + 0.4 * hard),
        beard_growth=d.about(0.0, 0.1 + 0.35 * hard),
        glasses=glasses,
        sunglasses=glasses * d.chance(0.12 * hard),
        glasses_size=d.about(0.19, 0.05),
        glasses_color=_ramp(_HAIR, d.uniform()) * 0.8,
        hat=hats,
        hat_line=d.uniform(0.3, 0.55),
        hat_color=jnp.stack([d.uniform(0.05, 0.8) for _ in range(3)]),
        shirt=jnp.stack([d.uniform(0.05, 0.9) for _ in range(3)]),
        backdrop=jnp.stack(
            [base + vary * jnp.stack([d.uniform(-1, 1) for _ in range(3)]) for _ in range(4)]
        ),
        blur=d.uniform() ** 2 * 0.55 * hard,
        noise=0.004 + d.uniform() ** 2 * 0.05 * hard,
        quantum=0.01 + d.uniform() ** 2 * 0.16 * hard,
    )


def _mix(a, b, t):
    return a + (b - a) * t


def _step(low, high, value):
    """0 below `low`, 1 above `high`, straight between."""
    return jnp.clip((value - low) / (high - low), 0.0, 1.0)


def _bell(x, y, width, height):
    return jnp.exp(-((x / width) ** 2) - (y / height) ** 2)


def _cells(x, y, seed):
    """White noise in 0..1 of unit cells; `seed` moves the pattern."""
    i = jnp.floor(x).astype(jnp.int32).astype(jnp.uint32)
    j = jnp.floor(y).astype(jnp.int32).astype(jnp.uint32)
    h = i * np.uint32(0x9E3779B1) + j * np.uint32(0x85EBCA77)
    h = h + seed.astype(jnp.uint32) * np.uint32(0xC2B2AE3D)
    h = (h ^ (h >> 15)) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> 12)) * np.uint32(0x297A2D39)
    return (h >> 8).astype(jnp.float32) * np.float32(2**-24)


def _column(color):
    return color[:, None, None]


def _bumps(t: Traits, s: Shot):
    """Rows (x, y, width, height, above, amount): bumps on both sides where x > 0.

    `above` is the vertical extent above the middle, `height` the one below.
    """
    open_y = 0.06 * s.mouth_open
    smile = jnp.maximum(s.smile, 0.0)
    mouth = t.mouth_y
    nose_top = t.eye_y - t.nose_y
    return [
        (0.0, t.nose_y, 0.75 * t.nose_width, 0.09, nose_top * 0.85, 0.85 * t.nose_height),
        (0.0, t.nose_y + 0.02, 0.8 * t.nose_width, 0.09, 0.1, 0.35 * t.nose_height),
        (0.0, t.eye_y - 0.05, 0.09, 0.2, 0.2, 0.09 * t.nose_bridge),
        (t.nose_width, t.nose_y - 0.02, 0.055, 0.06, 0.07, t.nose_wings),
        (t.eye_x, t.eye_y + 0.17, 0.24, 0.08, 0.1, 0.045),
        (t.eye_x, t.eye_y, 0.16, 0.11, 0.11, -t.socket - 0.02),
        (t.eye_x, t.eye_y, 0.1, 0.08, 0.08, 0.04),
        (0.43, -0.24 + 0.03 * smile, 0.2, 0.16, 0.16, 0.05 + t.cheekbone * 0.4 + 0.04 * smile),
        (0.42, -0.55, 0.13, 0.2, 0.2, -0.05 * t.age - 0.01),
        (0.0, mouth, t.mouth_width, 0.13 + open_y, 0.13, 0.04),
        (0.0, mouth - 0.16 - open_y, 0.15, 0.05, 0.05, -0.035),
        (0.0, -0.87, 0.17, 0.12, 0.12, t.chin + 0.04),
    ]


def _relief(bumps, x, y):
    """Height of the bumps at (x, y) and its two slopes."""
    side = jnp.abs(x)
    sign = jnp.where(x < 0, -1.0, 1.0)
    height = slope_x = slope_y = jnp.zeros_like(x)
    for cx, cy, width, below, above, amount in bumps:
        u = ((x - cx) if isinstance(cx, float) and cx == 0.0 else (side - cx)) / width
        mirror = 1.0 if isinstance(cx, float) and cx == 0.0 else sign
        extent = jnp.where(y > cy, above, below)
        v = (y - cy) / extent
        g = amount * jnp.exp(-u * u - v * v)
        height = height + g
        slope_x = slope_x - 2 * u / width * mirror * g
        slope_y = slope_y - 2 * v / extent * g
    return height, slope_x, slope_y


def _half_width(t: Traits, y):
    """Half width of the head at height y, and its derivative."""
    value, slope = 1.0, 0.0
    for amount, middle, extent in (
        (t.jaw, -0.66, 0.26),
        (t.cheekbone, -0.12, 0.22),
        (t.forehead, 0.5, 0.35),
    ):
        v = (y - middle) / extent
        g = amount * jnp.exp(-v * v)
        value = value + g
        slope = slope - 2 * v / extent * g
    return t.width * value, t.width * slope


def _meet(o, d, a, b, c):
    """Where rays o + t·d meet the ellipsoid (a, b, c): near t, far t, discriminant."""
    ox, oy, oz = o[0] / a, o[1] / b, o[2] / c
    dx, dy, dz = d[0] / a, d[1] / b, d[2] / c
    aa = dx * dx + dy * dy + dz * dz
    bb = ox * dx + oy * dy + oz * dz
    cc = ox * ox + oy * oy + oz * oz - 1.0
    disc = bb * bb - aa * cc
    root = jnp.sqrt(jnp.maximum(disc, 1e-6))
    return (-bb + root) / aa, (-bb - root) / aa, disc / aa


def _at(o, d, t):
    return tuple(oi + t * di for oi, di in zip(o, d, strict=True))


def _unit(x, y, z):
    r = jax.lax.rsqrt(x * x + y * y + z * z + 1e-9)
    return x * r, y * r, z * r


def _blur(image, sigma):
    """Gaussian of `sigma` pixels over [3, h, w], five taps."""
    weights = jnp.exp(-(jnp.arange(3) ** 2) / (2 * sigma**2 + 1e-4))
    weights = weights / (weights[0] + 2 * weights[1] + 2 * weights[2])
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (2, 2)
        size = image.shape[axis]
        p = jnp.pad(image, pad, mode="edge")
        image = sum(
            weights[abs(k - 2)] * jax.lax.slice_in_dim(p, k, k + size, axis=axis) for k in range(5)
        )
    return image


def _compress(image, quantum):
    """Quantise the 8 x 8 cosine transform of [3, h, w], coarser for colour and detail.

    The staircase q(x) = x - sin(2πx)/2π stands in for rounding: it is continuous, so that two
    devices that differ in the last bit draw the same picture.
    """
    _, h, w = image.shape
    luma = (image * _LUMA).sum(0, keepdims=True)
    planes = jnp.concatenate([luma, image[0:1] - luma, image[2:3] - luma])
    blocks = planes.reshape(3, h // _BLOCK, _BLOCK, w // _BLOCK, _BLOCK)
    waves = jnp.einsum("ui,cyixj,vj->cyxuv", _DCT, blocks, _DCT)
    order = np.add.outer(np.arange(_BLOCK), np.arange(_BLOCK))
    grain = np.stack([1 + 0.4 * order, 2 + 0.8 * order, 2 + 0.8 * order])[:, None, None]
    q = quantum * jnp.asarray(grain, jnp.float32)
    level = waves / q
    waves = q * (level - jnp.sin(2 * jnp.pi * level) / (2 * jnp.pi))
    planes = jnp.einsum("ui,cyxuv,vj->cyixj", _DCT, waves, _DCT).reshape(3, h, w)
    luma, red, blue = planes
    green = -(_LUMA[0] * red + _LUMA[2] * blue) / _LUMA[1]
    return luma + jnp.stack([red, green, blue])


def draw(t: Traits, s: Shot, key: Array, size: int) -> Float[Array, "3 {size} {size}"]:
    """The picture, in 0..1 before clipping; `key` draws the sensor noise."""
    t, s = jax.lax.optimization_barrier((t, s))
    grid = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2.0 / size) - 1.0
    u0, v0 = jnp.broadcast_arrays(grid[None, :], -grid[:, None])
    zoom = 1.3 / s.scale
    px = zoom * 2.0 / size
    cr, sr = jnp.cos(s.roll), jnp.sin(s.roll)
    pu, pv = zoom * u0 - s.shift_x, zoom * v0 - s.shift_y + 0.04
    u, v = cr * pu + sr * pv, cr * pv - sr * pu

    cy, sy, cp, sp = jnp.cos(s.yaw), jnp.sin(s.yaw), jnp.cos(s.pitch), jnp.sin(s.pitch)

    def to_head(x, y, z):
        y, z = cp * y + sp * z, cp * z - sp * y
        return cy * x - sy * z, y, cy * z + sy * x

    def to_view(x, y, z):
        x, z = cy * x + sy * z, cy * z - sy * x
        return x, cp * y - sp * z, cp * z + sp * y

    o = to_head(u, v, jnp.zeros_like(u))
    d = to_head(-u / s.distance, -v / s.distance, jnp.ones_like(u))
    light = to_head(*s.light)
    eye = to_head(0.0, 0.0, 1.0)

    # The head: width and relief depend on the point, so meet it three times.
    bumps = _bumps(t, s)
    y = o[1]
    width, _ = _half_width(t, y)
    near, _, disc = _meet(o, d, width, 1.0, t.depth)
    x, y, _ = _at(o, d, near)
    width, _ = _half_width(t, y)
    lift, _, _ = _relief(bumps, x, y)
    near, _, disc = _meet((o[0], o[1], o[2] - lift), d, width, 1.0, t.depth)
    x, y, z = _at((o[0], o[1], o[2] - lift), d, near)
    width, narrowing = _half_width(t, y)
    lift, slope_x, slope_y = _relief(bumps, x, y)
    nz = z / t.depth**2
    n = _unit(
        x / width**2 - nz * slope_x,
        y - x * x / width**3 * narrowing - nz * slope_y,
        nz,
    )
    head = _step(-0.5, 0.5, disc / (2 * px))
    x, y, z, n, head = jax.lax.optimization_barrier((x, y, z, n, head))

    def lit(n, wrap):
        dot = n[0] * light[0] + n[1] * light[1] + n[2] * light[2]
        return jnp.maximum((dot + wrap) / (1 + wrap), 0.0)

    lamp = _column(s.light_color)
    sky = s.ambient * (0.8 + 0.2 * n[1])
    facing = jnp.maximum(n[0] * eye[0] + n[1] * eye[1] + n[2] * eye[2], 0.0)
    diffuse = lit(n, 0.2)
    half = _unit(light[0] + eye[0], light[1] + eye[1], light[2] + eye[2])
    gloss = jnp.maximum(n[0] * half[0] + n[1] * half[1] + n[2] * half[2], 0.0) ** 16

    # Skin.
    side = jnp.abs(x + t.crooked * y)
    skin = _column(t.skin) ** 2
    patch = _cells(9 * x + 40, 9 * y + 40, t.texture) - 0.5
    pore = _cells(24 * x + 90, 24 * y + 90, t.texture) - 0.5
    tone = 1 + t.mottle * (patch + pore) * 1.2
    red = t.blush * (
        _bell(side - 0.4, y + 0.25, 0.2, 0.18) + 0.7 * _bell(side, y - t.nose_y, 0.12, 0.12)
    )
    albedo = skin * tone * (1 - red * np.array([0.0, 1.0, 0.8], np.float32)[:, None, None])
    fx, fy = 20 * x + 60, 20 * y + 60
    spot = _cells(fx, fy, t.texture + 7)
    near_dot = _step(0.5, 0.1, jnp.hypot(fx % 1 - 0.5, fy % 1 - 0.5))
    spread = _bell(side - 0.2, y + 0.18, 0.45, 0.3)
    dots = t.freckles * near_dot * (spot > 0.55) * spread
    for i in range(3):
        r = jnp.hypot(x - t.mole_x[i], y - t.mole_y[i])
        dots = jnp.maximum(
            dots, 0.75 * _step(0.5, -0.5, (r - t.mole_size[i]) / px) * (t.mole_size[i] > 0)
        )
    albedo = albedo * (1 - dots * np.array([0.55, 0.75, 0.85], np.float32)[:, None, None])
    sx, sy_ = x - t.scar[0], y - t.scar[1]
    along = sx + t.scar[2] * sy_
    across = (sy_ - t.scar[2] * sx) / jnp.sqrt(1 + t.scar[2] ** 2)
    scar = t.scar[3] * _bell(across, along, 0.018, 0.2)
    albedo = _mix(albedo, skin * np.array([1.15, 0.85, 0.85], np.float32)[:, None, None], scar)

    # Lines of age: forehead, beside the mouth, under the eyes.
    smile_y = 0.45 * s.smile * side * side / t.mouth_width
    ex, ey = side - t.eye_x, y - t.eye_y
    wave = jnp.abs((y * 11 + 0.25 * x * x * 11) % 1 - 0.5) * 2
    lines = t.age * 0.5 * _step(0.75, 1.0, wave) * _bell(x, y - 0.42, 0.4, 0.14)
    fold = side - t.nose_width - 0.07 - 0.35 * (t.nose_y - y)
    lines = lines + (0.15 + 0.5 * t.age + 0.3 * jnp.maximum(s.smile, 0)) * _bell(
        fold, y - 0.5 * (t.nose_y + t.mouth_y), 0.025, 0.15
    )
    bags = ey + 0.11 - 0.8 * ex * ex
    lines = lines + (0.12 + 0.4 * t.age) * _bell(bags, ex, 0.022, 0.13)
    shade = 1 - 0.55 * jnp.clip(lines, 0, 1)

    # Beard and moustache.
    strand = _cells(26 * x + 30, 14 * y + 30, t.texture + 3) - 0.5
    jawline = -0.42 + t.beard_line + 0.25 * _step(0.35, 0.7, side) - 0.12 * _step(0.3, 0.0, side)
    below_mouth = jnp.hypot(x / (t.mouth_width + 0.03), (y - t.mouth_y) / 0.16) - 1
    area = _step(0.0, 0.18, jawline - y) * _step(0.0, 0.25, below_mouth)
    upper = _step(-0.5, 0.5, (0.055 - jnp.abs(y - t.mouth_y - 0.12 + 0.5 * side * side)) / 0.04)
    upper = upper * _step(0.08, 0.0, side - t.mouth_width - 0.02)
    growth = 1 + s.beard_growth
    whiskers = jnp.clip(
        jnp.maximum(t.beard * area, t.moustache * upper) * growth * (1 + 0.5 * strand)
        + t.stubble * growth * jnp.maximum(area, upper) * (0.7 + strand),
        0,
        0.95,
    )
    hair_tint = _column(t.hair_color) ** 2
    brow_tint = _column(t.brow_color) ** 2
    albedo = _mix(albedo, brow_tint * (1 + strand), whiskers)

    # Nostrils.
    hole = _bell(side - 0.6 * t.nose_width, y - t.nose_y + 0.075, 0.035, 0.024)
    under = _bell(side, y - t.nose_y + 0.1, t.nose_width * 1.1, 0.035)
    shade = shade * (1 - 0.75 * hole) * (1 - 0.35 * under)

    # Mouth.
    gap = 0.11 * s.mouth_open
    my = y - t.mouth_y - smile_y - t.mouth_curve * 0.3 * side * side + 0.5 * gap
    mw = t.mouth_width * (1 + 0.22 * s.smile)
    arc = 1 - (side / mw) ** 2
    bow = 1 - t.bow * _bell(side, 0.0, 0.045, 1.0)
    thin = 1 - 0.3 * jnp.clip(s.smile, -0.5, 1)
    top = gap * arc + t.upper_lip * thin * arc * bow
    bottom = -gap * arc - t.lower_lip * thin * arc
    lips = _step(-0.5, 0.5, jnp.minimum(top - my, my - bottom) / (1.3 * px))
    inside = _step(-0.5, 0.5, (gap * arc - 0.004 - jnp.abs(my)) / px)
    seam = _bell(my, 0.0, 0.016, 1.0) * _step(1.25, 0.9, side / mw)
    lip_tone = _column(t.lip_color) ** 2 * (0.85 + 0.25 * _step(0.0, -0.1, my))
    albedo = _mix(albedo, lip_tone, 0.85 * lips)
    shade = shade * (1 - 0.7 * seam * (1 - inside))
    corner = _bell(side - mw, my, 0.03, 0.03)
    shade = shade * (1 - 0.45 * corner)
    teeth = inside * _step(-0.5, 0.5, (my + 0.25 * gap) / px)
    albedo = _mix(albedo, np.array([0.09, 0.02, 0.02], np.float32)[:, None, None], inside)
    albedo = _mix(albedo, np.array([0.75, 0.72, 0.66], np.float32)[:, None, None], teeth)

    # Eyes.
    slant = ey - t.eye_slant * ex
    open_ = t.eye_open * s.eyelid
    ew = t.eye_width
    skew = 1 - ((ex + 0.12 * ew) / ew) ** 2
    lid_top = open_ * (1 - (ex / ew) ** 2) * (1 + 0.15 * skew)
    lid_low = -0.75 * open_ * (1 - (ex / ew) ** 2)
    ball = _step(-0.5, 0.5, jnp.minimum(lid_top - slant, slant - lid_low) / px)
    mirror = jnp.where(x < 0, -1.0, 1.0)
    gx = ex - mirror * s.gaze_x * 0.06
    gy = slant - s.gaze_y * 0.03 - 0.006
    r = jnp.hypot(gx, gy)
    iris = _step(-0.5, 0.5, (t.iris - r) / px)
    pupil = _step(-0.5, 0.5, (0.4 * t.iris - r) / px)
    glint = _bell(gx * mirror - 0.4 * t.iris * jnp.sign(light[0]), gy - 0.4 * t.iris, 0.02, 0.02)
    white = 0.72 - 0.25 * _step(0.4, 1.0, jnp.abs(ex) / ew)
    iris_tint = _column(t.eye_color) ** 2 * (0.55 + 0.6 * r / t.iris) * 1.4
    eye_tint = _mix(jnp.broadcast_to(white, (3, *white.shape)), iris_tint, iris)
    eye_tint = eye_tint * (1 - 0.9 * pupil) + 0.8 * glint * iris
    eye_tint = eye_tint * (1 - 0.5 * _step(0.025, 0.0, lid_top - slant))
    albedo = _mix(albedo, eye_tint, ball)
    reach = _step(1.15, 0.95, jnp.abs(ex) / ew)
    lash = t.lashes * _bell(slant - lid_top - 0.004, 0.0, 0.02, 1.0) * reach
    lower = 0.35 * t.lashes * _bell(slant - lid_low, 0.0, 0.013, 1.0) * reach
    crease = (0.25 + 0.35 * t.lid) * _bell(slant - lid_top - 0.055, 0.0, 0.018, 1.0) * reach
    hollow = (0.12 + 2.0 * t.socket) * _bell(ex + 0.05, ey - 0.05, 0.17, 0.1) * (1 - ball)
    shade = shade * (1 - 0.85 * lash) * (1 - lower) * (1 - crease) * (1 - hollow)

    # Brows.
    bx = (side - t.brow_gap) / t.brow_length
    brow_mid = t.eye_y + t.brow_y + 0.03 * s.brow_raise + t.brow_slope * (side - t.eye_x)
    brow_mid = brow_mid + t.brow_arch * (1 - (2 * bx - 1.1) ** 2) - 0.02 * s.brow_raise * (1 - bx)
    thick = t.brow_thick * (1 - 0.6 * jnp.clip(bx, 0, 1) ** 2)
    brow = _step(-0.6, 0.6, (thick - jnp.abs(y - brow_mid)) / (1.4 * px))
    brow = brow * _step(-0.12, 0.06, bx) * _step(1.08, 0.85, bx)
    albedo = _mix(albedo, brow_tint * (0.9 + 0.5 * strand), 0.9 * brow * (1 + 0.25 * strand))

    rim = 0.55 + 0.45 * _step(0.0, 0.55, facing)
    face = albedo * shade * rim * (lamp * diffuse + sky)
    face = face + lamp * (0.5 * t.oily * gloss * (1 - whiskers) * (1 - ball))

    # Behind the head: backdrop, shoulders, neck, ears.
    ramp_x, ramp_y = 0.5 + 0.5 * u0, 0.5 + 0.5 * v0
    corners = [_column(c) ** 2 for c in s.backdrop]
    picture = _mix(
        _mix(corners[0], corners[1], ramp_x), _mix(corners[2], corners[3], ramp_x), ramp_y
    )
    chin = to_view(0.0, -0.75, -0.25)

    # Hair: the near and far side of a larger shell around the head.
    full = _mix(t.hair_volume, 0.07, s.hat)
    grow = 1.0 + full
    top_y = 0.12
    o_hair = (o[0], o[1] - top_y, o[2] + 0.08)
    stretch = jnp.where(v < chin[1] * 0 + top_y, 1.0 + 0.9 * _step(0.0, -1.0, t.hair_back + 0.6), 1)
    shell = (t.width * 1.06 + full, stretch * (grow - 0.06), t.depth + 0.75 * full + 0.1)
    near, far, disc = _meet(o_hair, d, *shell)
    cover = _step(-0.5, 0.5, disc / (2 * px))

    def coat(t_hit):
        hx, hy, hz = _at(o_hair, d, t_hit)
        hn = _unit(hx / shell[0] ** 2, hy / shell[1] ** 2, hz / shell[2] ** 2)
        hy = hy + top_y
        across = jnp.abs(hx) / shell[0]
        return hx, hy, hz, hn, across

    def hair_color(hx, hy, hn):
        flow = hx + 0.35 * (hx - t.hair_part * 0.4) * (hy - 1)
        lock = _cells(17 * flow + 50, 2.0 * hy + t.hair_curl * 14 * hy + 50, t.texture + 11)
        fine = _cells(36 * flow + 50, 3 * hy + t.hair_curl * 20 * hy + 50, t.texture + 13)
        shine = _bell(hy - 0.75, 0.0, 0.2, 1.0) * 0.25
        strands = 0.62 + 0.45 * lock + 0.3 * fine
        return hair_tint * strands * (lamp * (lit(hn, 0.35) * 1.1) + sky) + lamp * (
            shine * lit(hn, 0.0) * lock * 0.25
        )

    hx, hy, hz, hn, across = coat(far)
    ragged = (_cells(13 * hx + 50, 50 + 0 * hy, t.texture + 17) - 0.5) * 0.16 * (1 + s.hair_mess)
    back = cover * _step(-0.5, 0.5, (hy - t.hair_back + ragged) / (2 * px))
    back = back * (t.hair_line < 1.5)
    picture = _mix(picture, 0.6 * hair_color(hx, hy, hn), back)

    nx = (u - chin[0] * 0.6) / (0.42 * t.width / 0.73)
    neck = _step(-0.5, 0.5, (1 - jnp.abs(nx)) * 0.4 / px) * _step(0.5, -0.5, (v - chin[1]) / px)
    round_ = jnp.sqrt(jnp.maximum(1 - nx * nx, 0.05))
    neck_light = lamp * jnp.maximum(round_ * s.light[2] + nx * s.light[0], 0.1) + s.ambient
    dark = 0.45 + 0.35 * _step(chin[1] - 0.3, chin[1] - 0.7, v)
    picture = _mix(picture, skin * neck_light * dark, neck)
    shoulder = -1.2 - 0.22 * u * u + chin[1] * 0.2 + 0.15
    cloth = _step(-0.5, 0.5, (shoulder - v + 0.1 * _step(0.42, 0.2, jnp.abs(u)) * -1.5) / px)
    weave = 0.75 + 0.25 * _step(-1.6, -1.1, v)
    picture = _mix(picture, _column(s.shirt) ** 2 * weave * (lamp * 0.5 + s.ambient), cloth)

    for sign in (-1.0, 1.0):
        cx, cyy, cz = to_view(sign * (t.width * 0.97 + t.ear_out), t.eye_y - 0.1, -0.12)
        ear_w = 0.065 + t.ear_out * 0.6 + 0.08 * jnp.abs(sy)
        q = jnp.hypot((u - cx) / ear_w, (v - cyy + 0.06 * 0) / t.ear_size)
        ear = _step(-0.5, 0.5, (1 - q) * ear_w / px)
        ear_tint = skin * np.array([1.0, 0.85, 0.82], np.float32)[:, None, None]
        ear_light = 0.55 + 0.35 * _step(0.3, 0.9, q)
        side_light = jnp.maximum(0.5 + sign * s.light[0], 0.15) * 0.8
        picture = _mix(picture, ear_tint * ear_light * (lamp * side_light + s.ambient), ear)

    picture = _mix(picture, face, head)

    # Hair and hat in front.
    hx, hy, hz, hn, across = coat(near)
    ragged = (_cells(13 * hx + 50, 50 + 0 * hy, t.texture + 17) - 0.5) * (
        0.05 + 0.16 * t.fringe
    ) * (1 + s.hair_mess)
    parted = 0.1 * jnp.abs(hx - 0.4 * t.hair_part) * (1 - t.fringe)
    line = t.hair_line - t.hair_peak * across * across * -0.6 - parted + ragged
    temple = _step(0.72, 0.95, across)
    edge = jnp.where(hz > 0.0, _mix(line, t.hair_side, temple), t.hair_back)
    edge = jnp.where(t.hair_line > 1.5, 3.0, edge)
    front = cover * _step(-0.5, 0.5, (hy - edge) / (2.5 * px))
    shadow = cover * _step(-0.2, 0.1, hy - edge) * head * (t.hair_line < 1.5)
    picture = picture * (1 - 0.3 * shadow * (1 - front))
    picture = _mix(picture, hair_color(hx, hy, hn), front)

    hat_edge = s.hat_line + 0.05 * hx
    hat = s.hat * cover * _step(-0.5, 0.5, (hy - hat_edge) / px)
    band = 1 - 0.3 * _step(0.16, 0.13, hy - hat_edge)
    rib = 0.85 + 0.15 * _step(0.3, 0.6, jnp.abs((hx * 9) % 1 - 0.5) * 2)
    hat_tint = _column(s.hat_color) ** 2 * (band * rib * 1.0)
    picture = _mix(picture, hat_tint * (lamp * lit(hn, 0.2) + sky), hat)

    # Glasses: in a plane before the eyes.
    reach_t = (t.depth + 0.03 - o[2]) / d[2]
    lx, ly, _ = _at(o, d, reach_t)
    qx = jnp.abs(jnp.abs(lx) - t.eye_x - 0.01) - s.glasses_size * 0.62
    qy = jnp.abs(ly - t.eye_y + 0.03) - s.glasses_size * 0.42
    rim_d = jnp.hypot(jnp.maximum(qx, 0), jnp.maximum(qy, 0)) + jnp.minimum(
        jnp.maximum(qx, qy), 0.0
    ) - s.glasses_size * 0.33
    frame = _step(0.5, -0.5, (jnp.abs(rim_d) - 0.02) / px)
    bridge = _step(0.5, -0.5, (jnp.abs(ly - t.eye_y - 0.03) - 0.016) / px) * (
        jnp.abs(lx) < t.eye_x - s.glasses_size * 0.8
    )
    arm = _step(0.5, -0.5, (jnp.abs(ly - t.eye_y - 0.05) - 0.018) / px) * head
    arm = arm * (jnp.abs(lx) > t.eye_x + s.glasses_size * 0.95)
    frame = s.glasses * jnp.maximum(frame, jnp.maximum(bridge, arm))
    lens = _step(0.5, -0.5, rim_d / px)
    picture = picture * (1 - lens * (0.08 * s.glasses + 0.8 * s.sunglasses))
    picture = _mix(picture, _column(s.glasses_color) ** 2 * (lamp * 0.6 + s.ambient), frame)

    picture = jnp.sqrt(jnp.clip(picture * 0.95 * s.exposure, 0.0, 1.5))
    picture = picture + s.contrast * (picture - 0.5)
    picture = _blur(jax.lax.optimization_barrier(picture), s.blur * size / 48)
    bits = jax.random.bits(key, (size, size))
    grain = jnp.stack([(bits >> shift) & 1023 for shift in (0, 10, 20)]).astype(jnp.float32)
    picture = picture + s.noise * 3.4 * (grain / 1023 - 0.5)
    return _compress(picture, s.quantum)
