"""What programs need of memory, by the compiler's own analysis: compiled and not run."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from experiments.benchmarks.case import Case
from experiments.benchmarks.models import (
    OPTIMIZER,
    OPTIMIZER_STEPS,
    actor_critic_params,
    branches_flops,
    case_sizes,
    language_model,
    random_branches,
)
from experiments.benchmarks.sizes import Sizes
from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.config import PPO
from rlhfjax.ops import token_logprobs
from rlhfjax.recipes import text_actor_critic


def logprob_memory(sizes: Sizes) -> Case:
    """Value and gradient of token log-probabilities, compiled only: no [B, C, V] array may live in it."""
    batch, length, vocabulary = sizes.batch, sizes.memory_length, sizes.memory_vocab_size
    hidden = jax.ShapeDtypeStruct((batch, length, sizes.width), jnp.dtype(sizes.dtype))
    embedding = jax.ShapeDtypeStruct((vocabulary, sizes.width), jnp.float32)
    token = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def step(state, inputs, key):
        del key
        hidden, embedding, token = inputs

        def loss(hidden, embedding):
            return -jnp.sum(token_logprobs(hidden, embedding, token).logp)

        return state, jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding)

    logits = batch * length
    return Case(
        step,
        state=(),
        inputs=(hidden, embedding, token),
        tokens=logits,
        count=lambda outputs: logits,
        flops=6.0 * logits * sizes.width * vocabulary,
        sizes={"rows": batch, "length": length, "vocab_size": vocabulary, "width": sizes.width}
        | {"logits_bytes": 4 * logits * vocabulary},
    )


def update_memory(sizes: Sizes) -> Case:
    """A whole PPO update, policy and critic, compiled only."""
    batch, prompt, length = sizes.batch, sizes.prompt_length, sizes.memory_length
    sizes = dataclasses.replace(sizes, new_tokens=length)
    lm = language_model(sizes, sizes.memory_vocab_size)
    algorithm = ppo.make(
        text_actor_critic(lm), make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), PPO(epochs=1, minibatches=1)
    )

    def rollout() -> ppo.Rollout:
        number = jnp.zeros((batch, 1, length))
        inputs = random_branches(lm, batch, 1, prompt, length)
        return ppo.Rollout(inputs, number, number, number, number, mask=inputs.completion_mask_BGC)

    forward = partial(branches_flops, lm.config, batch, 1, prompt, length)
    return Case(
        algorithm.update,
        state=jax.eval_shape(lambda: algorithm.init(actor_critic_params(lm))),
        inputs=jax.eval_shape(rollout),
        tokens=batch * length,
        count=lambda metrics: metrics["batch/actions"],
        flops=3 * (forward(logits=True) + forward(logits=False)),
        sizes=case_sizes(lm, sizes, prompts=batch, samples=1)
        | {"logits_bytes": 4 * batch * length * sizes.memory_vocab_size},
    )
