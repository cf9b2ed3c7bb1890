"""Completions of very different lengths: batch after batch, each as long as its longest, against slots that refill.

The lengths are drawn once, geometric and cut off at the most; each completion is held from stopping before its own and
made to stop there, so that both cases generate the same tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.case import Case
from experiments.benchmarks.sizes import Sizes
from rlhfjax.generation import Generation, Sampling, generate, generate_refilled, sample_keys
from rlhfjax.networks import LanguageModel
from rlhfjax.networks.flops import branch_pairs, forward_flops
from rlhfjax.recipes import Prompts

STOP = 0


def completion_lengths(sizes: Sizes) -> np.ndarray:
    """One of every prompt, from 1 to new_tokens; [N]."""
    rng = np.random.default_rng(0)
    drawn = rng.geometric(1 / sizes.mean_tokens, size=sizes.ragged_batches * sizes.batch)
    return np.minimum(drawn, sizes.new_tokens)


def ragged_case(
    sizes: Sizes, lm: LanguageModel, params: dict, prompts: Prompts, described: dict, *, refill: bool
) -> Case:
    """All completions of all prompts, one of each, in one program; `described` becomes the case's sizes."""
    length_N = completion_lengths(sizes)
    last_NC = np.arange(sizes.new_tokens) == length_N[:, None] - 1
    forced_NC = jnp.asarray(np.where(last_NC, STOP, -1), jnp.int32)
    run = _refilled if refill else _batch_after_batch

    def step(state, inputs, key):
        params, prompts, forced_NC = inputs
        return state, run(sizes, lm, params, prompts, sample_keys(key, prompts.index_B, 1), forced_NC)

    prompt, read_N = sizes.prompt_length, length_N - 1
    return Case(
        step,
        state=(),
        inputs=(params, prompts, forced_NC),
        tokens=int(length_N.sum()),
        count=lambda generation: generation.mask_BGC.sum(),
        flops=forward_flops(
            lm.config,
            positions=int((prompt + read_N).sum()),
            pairs=sum(branch_pairs(prompt, 1, int(x)) for x in read_N),
            logits=int(length_N.sum()),
        ),
        sizes=described | {"slots": sizes.batch, "mean_tokens": float(length_N.mean())},
    )


def _generate(function: Callable[..., Generation], sizes: Sizes, forced_NC: jax.Array, *arguments, **options):
    sampling = Sampling(banned_tokens=jnp.asarray([STOP]), forced_tokens=forced_NC)
    return function(
        *arguments, max_new_tokens=sizes.new_tokens, stop_tokens=(STOP,), sampling=sampling, **options
    )


def _refilled(sizes: Sizes, lm, params, prompts: Prompts, keys_NG, forced_NC) -> Generation:
    rows = (prompts.token_BP, prompts.mask_BP, keys_NG)
    return _generate(generate_refilled, sizes, forced_NC, lm, params, *rows, slots=sizes.batch)


def _batch_after_batch(sizes: Sizes, lm, params, prompts: Prompts, keys_NG, forced_NC) -> Generation:
    rows = (prompts.token_BP, prompts.mask_BP, keys_NG, forced_NC)
    batches = jax.tree.map(lambda x: x.reshape(-1, sizes.batch, *x.shape[1:]), rows)

    def one(batch) -> Generation:
        token, mask, keys, forced = batch
        return _generate(generate, sizes, forced, lm, params, token, mask, keys)

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one, batches))
