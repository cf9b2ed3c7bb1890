"""Potential-based shaping: rewards added on the way that leave the best policy as it is (Ng, Harada, Russell 1999)."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_mask, as_number, require_rank
from rlhfjax.ops.multistep import value_at_next


def potential_shaping(
    potential: ArrayLike,
    *,
    discount: ArrayLike,
    next_potential: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """The reward to add to every action, for a potential Phi of states:

        F[t] = discount * Phi(s[t + 1]) * (1 - terminated[t]) - Phi(s[t])

    The discounted rewards added along an episode sum to -Phi(s[0]), whatever was done, so that every policy's value in
    a state moves by -Phi of the state and no policy overtakes another. That holds only with the discount of the
    returns and a potential of 0 where an episode has terminated, as here. One cut short keeps the potential of its
    final observation, from whose value it is bootstrapped.

    Args:
      potential: float [..., T], Phi(s[t]) of the state that action t was taken in.
      discount: scalar in [0, 1], that of the returns; 1 for text.
      next_potential: float [..., T], Phi of the state that follows. None: that at the next position that counts, and 0
        after the last, i.e. the row is one whole episode, as a text is.
      terminated: bool [..., T], True where action t ended the episode. Needs `next_potential`.
      mask: bool [..., T], True where position t counts. None: all do.

    Returns:
      float32 [..., T]; 0 where masked out.

    >>> potential_shaping([1.0, 3.0], discount=1.0).tolist()  # sums to -1, less the first potential
    [2.0, -3.0]
    """
    potential = as_float("potential", potential)
    mask = as_mask("mask", mask, potential.shape)
    if next_potential is None:
        if terminated is not None:
            raise ValueError(
                "terminated needs next_potential: without it a row is one episode that ends with its last action"
            )
        require_rank("potential", potential, 1, "[..., T]")
        after = value_at_next(potential, mask)
    else:
        ended = (
            jnp.zeros(potential.shape, bool)
            if terminated is None
            else as_mask("terminated", terminated, potential.shape)
        )
        after = jnp.where(ended, 0, as_float("next_potential", next_potential, potential.shape))
    return jnp.where(mask, as_number("discount", discount) * after - potential, 0)
