"""Top-k, top-p and min-p as one threshold a row on the probabilities, found without a sort of the vocabulary.

All three keep the likeliest tokens, so each is a threshold, and what all keep is told by the largest of the three.

Shapes: R rows, V vocabulary. "Mass" is exp(logit - largest logit), float32 in [0, 1]: the probability up to a factor,
1 at the likeliest token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_ONE = 0x3F800000  # the bits of 1.0; those of floats in [0, 1] order as their values do


def filter_logits(
    logits_RV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float, min_p: jax.Array | float
) -> jax.Array:
    """Sets what top-k, then top-p, then min-p leave out to -inf; [R, V] float32. Settings are scalars or [R].

    Ties with the least token kept are kept, where tokens tie whose masses are the same float32.
    """
    logits_RV = logits_RV.astype(jnp.float32)
    mass_RV = jnp.exp(logits_RV - jnp.max(logits_RV, axis=1, keepdims=True))
    threshold_R = least_mass(mass_RV, jnp.sum(mass_RV, axis=1), top_k, top_p, min_p)
    return jnp.where(mass_RV >= threshold_R[:, None], logits_RV, -jnp.inf)


def least_mass(
    mass_RV: jax.Array,
    total_R: jax.Array,
    top_k: jax.Array | int,
    top_p: jax.Array | float,
    min_p: jax.Array | float,
) -> jax.Array:
    """The threshold [R] at and above which the filters keep; `total` is the sum of each row's mass.

    The cost is that of the filters in use: a pass of compare and sum for each halving of the candidates, until one
    is left in every row; min-p is free.
    """
    rows, size = mass_RV.shape
    top_k, top_p, min_p = (jnp.broadcast_to(jnp.asarray(x), (rows,)) for x in (top_k, top_p, min_p))
    none_R = jnp.zeros(rows, jnp.float32)

    def kth_mass() -> tuple[jax.Array, jax.Array]:
        active_R = top_k > 0
        k_R = jnp.minimum(top_k, size).astype(jnp.float32)

        def count(threshold_R):
            return jnp.sum(jnp.where(mass_RV >= threshold_R[:, None], 1.0, 0.0), axis=1)

        least_R = _search(count, k_R, none_R, lambda _: jnp.ones_like(none_R), active_R)
        return least_R, mass_above(least_R)

    def nucleus(kth_R: jax.Array, kept_R: jax.Array) -> jax.Array:
        active_R = top_p < 1
        share_R = top_p.astype(jnp.float32)
        # All tokens below this together have less than what may be left out.
        low_R = jnp.where(active_R, jnp.maximum(kth_R, 0.99 * (1 - share_R) * kept_R / size), kth_R)
        return _search(mass_above, share_R * kept_R, low_R, lambda low: low, active_R)

    def mass_above(threshold_R: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mass_RV >= threshold_R[:, None], mass_RV, 0.0), axis=1)

    kth_R, kept_R = jax.lax.cond(jnp.any(top_k > 0), kth_mass, lambda: (none_R, total_R))
    least_R = jax.lax.cond(jnp.any(top_p < 1), nucleus, lambda kth, _: kth, kth_R, kept_R)
    return jnp.minimum(jnp.maximum(least_R, min_p.astype(jnp.float32)), 1.0)


def _search(
    above: Callable[[jax.Array], jax.Array],
    target_R: jax.Array,
    low_R: jax.Array,
    least_part: Callable[[jax.Array], jax.Array],
    active_R: jax.Array,
) -> jax.Array:
    """A threshold that keeps what the largest t in [low, 1] with above(t) >= target keeps; low in rows not active.

    Bisection over the bits of a float32, which ends in a row when at most one token lies between the bounds: each
    adds at least `least_part(low)` to `above`. A row's result depends on no other row.
    """

    def value(bits_R):
        return jax.lax.bitcast_convert_type(bits_R, jnp.float32)

    def unsettled(state):
        low_R, high_R, above_low_R, above_high_R = state
        # One and a half: the sums are rounded.
        several_R = above_low_R - above_high_R > 1.5 * least_part(value(low_R))
        return active_R & several_R & (high_R - low_R > 1)

    def halve(state):
        low_R, high_R, above_low_R, above_high_R = state
        middle_R = (low_R + high_R) >> 1  # both below 2^30
        above_R = above(value(middle_R))
        open_R = unsettled(state)
        rise_R, fall_R = open_R & (above_R >= target_R), open_R & (above_R < target_R)
        return (
            jnp.where(rise_R, middle_R, low_R),
            jnp.where(fall_R, middle_R, high_R),
            jnp.where(rise_R, above_R, above_low_R),
            jnp.where(fall_R, above_R, above_high_R),
        )

    low_bits_R = jax.lax.bitcast_convert_type(low_R, jnp.int32)
    high_bits_R = jnp.full_like(low_bits_R, _ONE + 1)  # keeps nothing
    start = (low_bits_R, high_bits_R, above(low_R), jnp.zeros_like(target_R))
    return value(jax.lax.while_loop(lambda s: jnp.any(unsettled(s)), halve, start)[0])
