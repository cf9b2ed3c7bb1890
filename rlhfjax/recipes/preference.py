"""Preference optimisation on text: what `dpo` and `kto` need to know of a language model, and their batches.

A prompt and its completions lie in one row (`Branches`), so the prompt is computed once for all of them, and
once for the reference.

Shapes: B prompts, G completions of each, K pairs of each, C completion length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.dpo import Pairs, TokenLogps
from rlhfjax.algorithms.kto import Judged, Mismatched
from rlhfjax.networks import Branches, LanguageModel, branch_hidden
from rlhfjax.ops import token_logprobs
from rlhfjax.recipes.text import completion_logp


def pair_evaluate(
    lm: LanguageModel, *, temperature: float = 1.0, collision: bool = False
) -> Callable[[dict, Branches], TokenLogps]:
    """`evaluate` of `dpo` on text: float32 [B, G, C] of every completion token, meaningless where masked.

    Args:
      temperature: of the policy; that of the reference must be the same.
      collision: also gives log sum over the vocabulary of pi squared, for `DPO(weighting="aligned")`. It
        costs a second product with the embedding, and gets no gradient.
    """

    def evaluate(params: dict, branches: Branches) -> TokenLogps:
        before_BGCD, _ = branch_hidden(lm, params, branches)

        def logp_at(hidden_BGCD: jax.Array, embedding: jax.Array, temperature: float) -> jax.Array:
            token_BGC = branches.completion_BGC
            return token_logprobs(
                hidden_BGCD, embedding, token_BGC, temperature=temperature, softcap=lm.config.logit_softcap
            ).logp

        logp_BGC = logp_at(before_BGCD, lm.embedding(params), temperature)
        if not collision:
            return TokenLogps(logp_BGC)
        # With logits l: log sum pi^2 = logsumexp(2 l) - 2 logsumexp(l), and at half the temperature a token has
        # log-probability 2 l - logsumexp(2 l).
        detached = jax.lax.stop_gradient((before_BGCD, lm.embedding(params)))
        colder_BGC = logp_at(*detached, 0.5 * temperature)
        return TokenLogps(logp_BGC, 2.0 * jax.lax.stop_gradient(logp_BGC) - colder_BGC)

    return evaluate


def judged_evaluate(lm: LanguageModel, *, temperature: float = 1.0) -> Callable[[dict, Branches], jax.Array]:
    """`evaluate` of `kto` on text: log-probability of every completion token, float32 [B, G, C]."""

    def evaluate(params: dict, branches: Branches) -> jax.Array:
        return completion_logp(lm, params, branches, temperature)

    return evaluate


def reference_logp(
    lm: LanguageModel,
    params: dict,
    branches: Branches,
    *,
    temperature: jax.Array | float = 1.0,
    rows: int | None = None,
) -> jax.Array:
    """Log-probability of every completion token under the reference, float32 [B, G, C], for a whole dataset.

    The reference never changes, so this is computed once, before training, and kept beside the tokens.

    Args:
      params: of the reference.
      rows: prompts computed at a time, which bounds the memory; None: all. On several devices pass None and a
        batch at a time: prompts taken in turns would all lie on one device.

    Meaningless where the completion's mask is False. Pure; jit it.
    """
    if rows is None:
        return completion_logp(lm, params, branches, temperature)
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")

    def of_row(row: Branches) -> jax.Array:
        return completion_logp(lm, params, jax.tree.map(lambda x: x[None], row), temperature)[0]

    return jax.lax.map(of_row, branches, batch_size=rows)


def pair_batch(
    branches: Branches,
    logp_ref_BGC: jax.Array | None,
    *,
    first: jax.Array,
    second: jax.Array,
    label_BK: jax.Array,
    mask_BK: jax.Array | None = None,
) -> Pairs:
    """The batch of `dpo`, with pairs of equal texts marked. For its arguments see `Pairs`; mask_BK None: all
    pairs count."""
    return Pairs(
        inputs=branches,
        completion_mask_BGC=branches.completion_mask_BGC,
        first=first,
        second=second,
        label_BK=label_BK,
        mask_BK=jnp.ones(label_BK.shape, bool) if mask_BK is None else mask_BK,
        logp_ref_BGC=logp_ref_BGC,
        equal_BK=equal_completions(branches, first, second),
    )


def equal_completions(branches: Branches, first: jax.Array, second: jax.Array) -> jax.Array:
    """Which pairs hold the same tokens twice, bool [B, K]. `first`, `second`: int [K] or [B, K].

    What lies under the completions' masks is not compared.
    """
    mask_BGC = branches.completion_mask_BGC.astype(bool)
    shape = (mask_BGC.shape[0], first.shape[-1])

    def of(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        index_BK1 = jnp.broadcast_to(index, shape)[:, :, None]
        token_BKC = jnp.take_along_axis(branches.completion_BGC, index_BK1, axis=1)
        return token_BKC, jnp.take_along_axis(mask_BGC, index_BK1, axis=1)

    (token_a, mask_a), (token_b, mask_b) = of(first), of(second)
    return jnp.all((mask_a == mask_b) & (~mask_a | (token_a == token_b)), axis=2)


def mismatched_branches(branches: Branches) -> Branches:
    """Every prompt with the completions of the prompt before it, the first with those of the last: KTO's
    mismatched pairs (arXiv 2402.01306). Needs two prompts at least, that differ.

    Made once for a dataset, before it is cut into batches, so that `reference_logp` can be precomputed.
    """
    if branches.prompt_BP.shape[0] < 2:
        raise ValueError("mismatched completions need at least 2 prompts; give a larger batch")
    return branches._replace(
        completion_BGC=jnp.roll(branches.completion_BGC, 1, axis=0),
        completion_mask_BGC=jnp.roll(branches.completion_mask_BGC, 1, axis=0),
    )


def judged_batch(
    branches: Branches,
    logp_ref_BGC: jax.Array,
    *,
    label_BG: jax.Array,
    mask_BG: jax.Array | None = None,
    mismatched: tuple[Branches, jax.Array] | None = None,
) -> Judged:
    """The batch of `kto`: completions with their labels; mask_BG None: all count.

    mismatched: `(mismatched_branches(branches), their reference_logp)`, for the reference point; a completion
    without a token does not count in it. None: for losses that need no reference point.
    """
    against = None
    if mismatched is not None:
        others, logp_ref = mismatched
        some_BG = jnp.any(others.completion_mask_BGC, axis=2)
        against = Mismatched(others, others.completion_mask_BGC, logp_ref, some_BG)
    return Judged(
        inputs=branches,
        completion_mask_BGC=branches.completion_mask_BGC,
        logp_ref_BGC=logp_ref_BGC,
        label_BG=label_BG,
        mask_BG=jnp.ones(label_BG.shape, bool) if mask_BG is None else mask_BG,
        mismatched=against,
    )
