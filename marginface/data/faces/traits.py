"""Who a face belongs to (Traits) and how it was photographed (Shot), drawn from random keys.

Units: half a head's height; x to the picture's right, y up, z towards the camera; a picture point
is (u, v). Colours are linear RGB.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from marginface.typing import Array

_SKIN = np.array(
    [[0.95, 0.80, 0.72], [0.87, 0.68, 0.56], [0.70, 0.50, 0.38], [0.42, 0.28, 0.21]], np.float32
)
_HAIR = np.array(
    [[0.07, 0.06, 0.06], [0.24, 0.15, 0.10], [0.46, 0.29, 0.17], [0.82, 0.67, 0.42]], np.float32
)
_EYES = np.array(
    [[0.18, 0.10, 0.06], [0.36, 0.24, 0.12], [0.34, 0.42, 0.26], [0.40, 0.52, 0.64]], np.float32
)


class _Draws:
    """Random numbers of one key, handed out one after another."""

    def __init__(self, key: Array, count: int):
        u = jax.random.uniform(key, (3, count))
        self._flat, self._bell = iter(u[0]), iter(u[1] + u[2] - 1.0)

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * next(self._flat)

    def about(self, middle, spread):
        """Triangular on middle ± spread."""
        return middle + spread * next(self._bell)

    def chance(self, probability):
        return (next(self._flat) < probability).astype(jnp.float32)

    def color(self, low, high):
        return jnp.stack([self.uniform(low, high) for _ in range(3)])


def _ramp(table, position):
    """Colour [3] at `position` in 0..1 along the rows of `table`."""
    row = position * (len(table) - 1)
    return sum(color * jnp.maximum(1 - jnp.abs(row - i), 0) for i, color in enumerate(table))


def mix(a, b, t):
    return a + (b - a) * t


def unit(x, y, z):
    r = jax.lax.rsqrt(x * x + y * y + z * z + 1e-9)
    return x * r, y * r, z * r


class Traits(NamedTuple):
    """All that makes an identity: lengths in half head heights, amounts from 0 to 1."""

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
    age: Array
    freckles: Array
    phases: Array  # [4]: of all textures
    marks: Array  # [3, 3]: x, y, radius of three moles
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
    brow_color: Array  # [3]
    nose_y: Array
    nose_width: Array
    nose_height: Array
    nose_bridge: Array
    nose_wings: Array
    mouth_y: Array
    mouth_width: Array
    mouth_curve: Array
    upper_lip: Array
    lower_lip: Array
    cupid_bow: Array
    lip_color: Array  # [3]
    hair: Array
    hair_color: Array  # [3]
    hair_volume: Array
    hair_line: Array
    hair_top: Array
    hair_recede: Array
    hair_sweep: Array
    hair_side: Array
    hair_back: Array
    hair_curl: Array
    fringe: Array
    bun: Array
    ear_size: Array
    ear_out: Array
    beard: Array
    moustache: Array
    stubble: Array
    beard_line: Array


def draw_traits(key: Array) -> Traits:
    """Identity parameters of one key."""
    d = _Draws(key, 80)
    male = jnp.clip(d.about(0.5, 1.1), 0, 1)
    female = 1 - male
    age = d.uniform() ** 1.4
    tone = d.uniform()
    skin = _ramp(_SKIN, tone) * (1 + d.about(0, 0.06) * np.array([0.3, 0, -1], np.float32))

    hair = _ramp(_HAIR, d.uniform() * jnp.clip(1.35 - 1.5 * tone, 0.12, 1.0))
    red = d.chance(0.15) * jnp.clip(1 - 2 * tone, 0, 1)
    hair = mix(hair, np.array([0.52, 0.25, 0.12], np.float32), red)
    grey = jnp.clip((age - d.uniform(0.45, 1.0)) * 4, 0, 1)
    brow = mix(0.75 * hair, 0.45, 0.5 * grey)
    hair = mix(hair, d.uniform(0.45, 0.8), grey)

    thinning = male * (0.15 + age)
    shaved = d.chance(0.16 * thinning)
    horseshoe = d.chance(0.2 * thinning) * (1 - shaved)
    crop = (1 - d.chance(0.15 + 0.7 * female)) * (1 - horseshoe)
    long = (1 - crop) * (1 - horseshoe) * (1 - d.chance(0.3))
    fringe = d.chance(0.33) * (1 - horseshoe)
    afro = d.chance(0.06 + 0.2 * tone) * (1 - horseshoe) * (1 - long)
    line = mix(d.about(0.64, 0.13), d.uniform(0.3, 0.46), fringe)
    long_side, long_back = d.uniform(-1.6, -0.2), d.uniform(-1.8, -0.7)

    makeup = d.chance(0.5) * female
    lip = skin * np.array([0.88, 0.66, 0.66], np.float32) * d.about(1.0, 0.1)
    rouge = jnp.stack([d.uniform(0.5, 0.75), d.uniform(0.12, 0.3), d.uniform(0.16, 0.36)])
    bearded = d.chance(0.35) * jnp.clip(2 * male - 0.4, 0, 1)
    marks = [
        jnp.stack([d.about(0, 0.6), d.uniform(-0.85, 0.45), d.uniform(0.018, 0.05) * d.chance(0.4)])
        for _ in range(3)
    ]
    scar = [d.about(0, 0.5), d.uniform(-0.8, 0.4), d.about(0.0, 2.5), d.chance(0.15)]
    return Traits(
        width=d.about(0.735, 0.1),
        depth=d.about(0.82, 0.08),
        jaw=d.about(0.06 + 0.06 * male, 0.16),
        cheekbone=d.about(0.03, 0.07),
        forehead=d.about(0.05, 0.08),
        chin=d.about(0.04 + 0.04 * male, 0.06),
        crooked=d.about(0.0, 0.06),
        skin=skin,
        blush=d.uniform(0.0, 0.35) * (1 - 0.8 * tone),
        mottle=d.uniform(0.0, 0.08),
        oily=d.uniform(0.05, 0.3),
        age=age,
        freckles=d.chance(0.3) * d.uniform(0.3, 0.7) * jnp.clip(1.4 - 2 * tone, 0, 1),
        phases=jnp.stack([d.uniform() for _ in range(4)]),
        marks=jnp.stack(marks),
        scar=jnp.stack(scar),
        eye_x=d.about(0.305, 0.05),
        eye_y=d.about(0.02, 0.06),
        eye_width=d.about(0.15, 0.035),
        eye_open=d.about(0.067, 0.034),
        eye_slant=d.about(0.08, 0.25),
        eye_color=_ramp(_EYES, d.uniform() * jnp.clip(1.5 - 1.6 * tone, 0.2, 1)),
        iris=d.about(0.068, 0.012),
        lid=d.uniform(),
        lashes=jnp.clip(d.about(0.5 + 0.4 * female, 0.3), 0, 1),
        socket=d.about(0.07, 0.05),
        brow_y=d.about(0.2, 0.06),
        brow_thick=d.about(0.03 + 0.02 * male, 0.024),
        brow_arch=d.about(0.035 + 0.03 * female, 0.05),
        brow_slope=d.about(0.0, 0.18),
        brow_gap=d.about(0.13, 0.06),
        brow_length=d.about(0.36, 0.07),
        brow_color=brow,
        nose_y=d.about(-0.34, 0.08),
        nose_width=d.about(0.105 + 0.03 * tone, 0.045),
        nose_height=d.about(0.22 - 0.04 * tone, 0.09),
        nose_bridge=d.about(0.6, 0.4),
        nose_wings=d.about(0.055, 0.035),
        mouth_y=d.about(-0.61, 0.06),
        mouth_width=d.about(0.25, 0.06),
        mouth_curve=d.about(0.0, 0.2),
        upper_lip=d.about(0.047 + 0.015 * female + 0.02 * tone, 0.032),
        lower_lip=d.about(0.07 + 0.015 * female + 0.02 * tone, 0.038),
        cupid_bow=d.uniform(0.0, 0.5),
        lip_color=mix(lip, rouge, 0.75 * makeup),
        hair=1 - shaved,
        hair_color=hair,
        hair_volume=d.uniform(0.03, 0.14) * (1 - 0.5 * horseshoe) + 0.22 * afro,
        hair_line=line + 0.6 * horseshoe,
        hair_top=mix(3.0, d.uniform(0.25, 0.6), horseshoe),
        hair_recede=jnp.maximum(d.about(0.0, 0.2) + 0.3 * male * age, 0.0) * (1 - fringe),
        hair_sweep=d.about(0.0, 0.5),
        hair_side=mix(d.uniform(-0.05, 0.3), long_side, long),
        hair_back=mix(mix(d.uniform(-0.15, 0.25), d.uniform(-0.7, -0.3), afro), long_back, long),
        hair_curl=jnp.maximum(d.uniform() * d.chance(0.5), afro),
        fringe=fringe,
        bun=d.chance(0.3) * female * (1 - crop) * (1 - long) * (1 - horseshoe),
        ear_size=d.about(0.17, 0.05),
        ear_out=d.about(0.03, 0.04),
        beard=bearded * d.chance(0.7) * d.uniform(0.5, 0.95),
        moustache=bearded * d.chance(0.8) * d.uniform(0.5, 0.95),
        stubble=male * d.uniform(0.0, 0.35),
        beard_line=d.about(0.0, 0.16),
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
    backdrop: Array  # [3, 3]: left, right, and what stands behind the head
    edge: Array  # [2]: where it stands, and its slope
    blur: Array
    noise: Array
    quantum: Array


def draw_shot(key: Array, difficulty: Any) -> Shot:
    """Nuisance parameters of one key; their spread grows with `difficulty`."""
    d = _Draws(key, 48)
    hard = jnp.asarray(difficulty, jnp.float32)
    light = unit(d.about(0.0, 0.3 + 1.1 * hard), d.about(0.4, 0.2 + 0.5 * hard), 1.0)
    warm, green = d.about(0.0, 0.03 + 0.22 * hard), d.about(0.0, 0.01 + 0.06 * hard)
    glasses = d.chance(0.16 * hard)
    wall, tint = d.about(0.55, 0.08 + 0.4 * hard), 0.03 + 0.15 * hard
    return Shot(
        yaw=d.about(0.0, 0.05 + 0.55 * hard),
        pitch=d.about(0.0, 0.03 + 0.25 * hard),
        roll=d.about(0.0, 0.02 + 0.16 * hard),
        scale=1 + d.about(0.0, 0.02 + 0.1 * hard),
        shift_x=d.about(0.0, 0.02 + 0.1 * hard),
        shift_y=d.about(0.0, 0.02 + 0.1 * hard),
        distance=d.uniform(4.0, 8.0),
        light=jnp.stack(light),
        light_color=jnp.stack([1 + warm, 1 + green, 1 - warm]),
        ambient=d.about(0.42, 0.06 + 0.14 * hard),
        exposure=1 + d.about(0.0, 0.05 + 0.35 * hard),
        contrast=d.about(0.0, 0.03 + 0.15 * hard),
        smile=d.about(0.1, 0.15 + 0.6 * hard),
        mouth_open=jnp.maximum(d.about(-0.3, 0.15 + 0.7 * hard), 0.0),
        brow_raise=d.about(0.0, 0.2 + 0.5 * hard),
        eyelid=jnp.clip(d.about(1.0, 0.05 + 0.4 * hard), 0.1, 1.2),
        gaze_x=d.about(0.0, 0.2 + 0.5 * hard),
        gaze_y=d.about(0.0, 0.1 + 0.3 * hard),
        hair_mess=d.about(0.0, 0.2 + 0.5 * hard),
        beard_growth=d.about(0.0, 0.1 + 0.4 * hard),
        glasses=glasses,
        sunglasses=glasses * d.chance(0.12 * hard),
        glasses_size=d.about(0.19, 0.05),
        glasses_color=0.8 * _ramp(_HAIR, d.uniform()),
        hat=d.chance(0.09 * hard),
        hat_line=d.uniform(0.32, 0.55),
        hat_color=d.color(0.05, 0.75),
        shirt=d.color(0.05, 0.9),
        backdrop=jnp.stack(
            [wall + d.about(0, 0.05 + 0.2 * hard) + d.color(-tint, tint) for _ in range(3)]
        ),
        edge=jnp.stack([d.uniform(-1.0, 1.0), d.about(0.0, 0.3)]),
        blur=d.uniform() ** 2 * (0.1 + 0.8 * hard),
        noise=0.004 + d.uniform() ** 2 * 0.035 * hard,
        quantum=0.01 + d.uniform() ** 2 * 0.16 * hard,
    )
