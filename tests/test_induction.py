"""A fresh decoder with induction heads copies what it has seen; without them it cannot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import Decoder
from rlhfjax.networks import causal_mask, decoder, with_induction_heads

CONFIG = Decoder(vocab_size=256, layers=2, mlp_width=64, max_positions=64)  # width 128, four heads of 32
LM = decoder(CONFIG)
ROWS, SPAN = 16, 20


@pytest.fixture(scope="module")
def plain() -> dict:
    return jax.jit(LM.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def accuracy():
    """params -> share of the second copy of a random span that is predicted from the first."""
    span = jax.random.randint(jax.random.key(1), (ROWS, SPAN), 0, CONFIG.vocab_size)
    token = jnp.concatenate([span, span], axis=1)
    position = jnp.broadcast_to(jnp.arange(2 * SPAN), token.shape)

    @jax.jit
    def share(params):
        hidden, _ = LM.apply(params, token, position_BT=position, mask_BTS=causal_mask(jnp.ones_like(token)))
        best = jnp.argmax(LM.logits(params, hidden), axis=2)
        # From the second token of the copy on: before it there is nothing to match.
        return jnp.mean((best[:, SPAN:-1] == token[:, SPAN + 1 :]).astype(jnp.float32))

    return lambda params: float(share(params))


def test_copies_from_the_start(plain, accuracy):
    assert accuracy(plain) < 0.1
    assert accuracy(with_induction_heads(jax.random.key(2), plain, CONFIG)) > 0.8


def test_both_layers_of_the_circuit_are_needed(plain, accuracy):
    params = with_induction_heads(jax.random.key(2), plain, CONFIG)
    for layer in ("layer_0", "layer_1"):
        silenced = jax.tree.map(lambda x: x, params)
        silenced[layer]["attention"]["output"]["kernel"] *= 0
        assert accuracy(silenced) < 0.2


def test_the_key_decides_and_the_input_stays(plain):
    before = jax.tree.map(np.array, plain)
    one, again, other = (with_induction_heads(jax.random.key(i), plain, CONFIG) for i in (2, 2, 3))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.array_equal(one["embedding"], other["embedding"])
    jax.tree.map(np.testing.assert_array_equal, plain, before)
    assert jax.tree.structure(one) == jax.tree.structure(plain)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(
        lambda x: (x.shape, x.dtype), plain
    )


@pytest.mark.parametrize(
    "change",
    [
        {"tie_embeddings": False},
        {"positions": "learned"},
        {"norm": "layernorm"},
        {"layers": 1},
        {"kv_heads": 2},
        {"heads": 1, "kv_heads": 1},
    ],
    ids=str,
)
def test_decoders_without_room_for_the_circuit_are_refused(change, plain):
    with pytest.raises(ValueError, match="induction heads need tied embeddings"):
        with_induction_heads(jax.random.key(0), plain, dataclasses.replace(CONFIG, **change))
