"""A reward that looks up what belongs to a prompt by the prompt's own number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algorithms import Algorithm
from rlhfjax.config import Decoder
from rlhfjax.networks import decoder
from rlhfjax.recipes import Frozen, Prompts, completion_reward, make_rlhf

LM = decoder(
    Decoder(vocab_size=12, width=8, layers=1, heads=1, kv_heads=1, head_size=8, mlp_width=8, max_positions=8)
)
SPY = Algorithm(init=lambda params: params, update=lambda state, batch, key: (state, {}))
PROMPTS = Prompts(
    jnp.asarray([[3, 4], [5, 6], [7, 8]], jnp.int32),
    jnp.ones((3, 2), bool),
    jnp.asarray([4, 0, 2], jnp.int32),
)
WANTED = jnp.asarray([1, 2, 3, 4, 5], jnp.int32)  # a token for each row of the data


def wanted_tokens(wanted_R, token_BT, mask_BT, index_B):
    """How often a completion holds the token of its prompt, and a hundredth of its tokens."""
    held_BT = (token_BT == wanted_R[index_B][:, None]) & mask_BT
    return jnp.sum(held_BT, axis=1) + 0.01 * jnp.sum(mask_BT, axis=1)


def compose(reward, numbered):
    return make_rlhf(
        LM,
        SPY,
        lambda state, frozen, branches, generation, score: score,
        reward=reward,
        numbered=numbered,
        samples=5,
        max_new_tokens=6,
        stop_tokens=(0,),
        policy=lambda params: params,
    )


class State(NamedTuple):
    params: dict


STATE = State(jax.jit(LM.init)(jax.random.key(0)))


def test_a_numbered_reward_is_given_the_number_of_each_samples_prompt():
    rlhf = compose(completion_reward(wanted_tokens), numbered=True)
    _, _, seen = jax.jit(lambda key: rlhf.iterate(STATE, Frozen(None, WANTED), PROMPTS, key))(
        jax.random.key(1)
    )
    token, mask, score = (
        np.asarray(x) for x in (*seen.generation[:1], seen.generation.mask_BGC, seen.score_BG)
    )
    assert score.shape == (3, 5)
    expected = np.zeros(score.shape)
    for b, number in enumerate([4, 0, 2]):
        for g in range(5):
            ids = token[b, g][mask[b, g]].tolist()
            expected[b, g] = ids.count(number + 1) + 0.01 * len(ids)
    np.testing.assert_allclose(score, expected, atol=1e-6)
    assert len(np.unique(expected.astype(int))) > 1


def test_without_numbers_a_reward_is_called_as_ever():
    rlhf = compose(
        completion_reward(lambda params, token_BT, mask_BT: params * jnp.sum(mask_BT, axis=1)), False
    )
    shapes = jax.eval_shape(
        lambda key: rlhf.iterate(STATE, Frozen(None, jnp.float32(2)), PROMPTS, key), jax.random.key(1)
    )
    assert shapes[2].score_BG.shape == (3, 5)


def test_numbers_without_a_reward_on_the_device_are_refused():
    with pytest.raises(ValueError, match="numbered=True is for a reward on the device"):
        compose(None, numbered=True)
