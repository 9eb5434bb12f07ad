"""placeholder"""
import functools
import jax, jax.numpy as jnp
from marginface.data import face_renderer
def render(seed, identity, sample, *, size, difficulty=1.0):
    def one(identity, sample):
        who, when = jax.random.split(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), identity))
        shot, noise = jax.random.split(jax.random.fold_in(when, sample))
        traits = face_renderer.draw_traits(who)
        s = face_renderer.draw_shot(shot, difficulty)
        return face_renderer.draw(traits, s, noise, size)
    images = jax.vmap(one)(identity, sample)
    return jnp.clip(jnp.moveaxis(images, 1, -1), 0.0, 1.0) * 2.0 - 1.0
