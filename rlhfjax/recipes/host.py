"""RLHF with a reward on the host: two compiled halves, and scores that are made while the device works."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.generation import Generation
from rlhfjax.recipes.rlhf import RLHF, Experience, Frozen, Prompts, as_branches

Score = Callable[[Prompts, Generation], Callable[[], np.ndarray]]


class HostIteration(NamedTuple):
    """What one iteration leaves."""

    state: Any  # donated to the next iteration: copy it to keep it
    metrics: dict[str, jax.Array]
    experience: Experience
    ahead: Generation | None  # the next iteration's completions, where they are drawn ahead


def host_iterations(
    rlhf: RLHF,
    score: Score,
    state: Any,
    frozen: Frozen,
    batches: Iterable[tuple[Prompts, jax.Array]],
    *,
    ahead: bool = False,
    generation: Generation | None = None,
) -> Iterator[HostIteration]:
    """Iterations with a reward on the host, one after the other: rollout, scores, `learn`.

    Args:
      score: `score(prompts, generation) -> wait`: hands the completions to whoever scores them (`RewardPool.submit`)
        and returns at once; `wait()` then gives the scores, float [B, G].
      state: donated to the first iteration.
      batches: prompts and key of each iteration. As in `rlhf.iterate`, the key is split for rollout and update.
      ahead: the next rollout begins before the update that waits for the scores, so that the device is not idle
        meanwhile. Its completions come from parameters one update old. PPO, GRPO and all that take the ratio to the
        policy that sampled correct for it; the first update of an iteration then has ratios other than 1.
      generation: completions of the first batch, from `HostIteration.ahead`, of a run that goes on.

    Without `ahead` an iteration is `rlhf.iterate`. What `score` raises comes out of the iterator, and no state is lost
    by it: the last that was yielded is still there.

    Raises ValueError where `generation` or the scores are not of the batch's prompts and samples.
    """
    rollout, learn = jax.jit(rlhf.rollout), jax.jit(rlhf.learn, donate_argnums=0)
    remaining = iter(batches)
    batch = next(remaining, None)
    while batch is not None:
        prompts, key = batch
        key_rollout, key_learn = jax.random.split(key)
        drawn = rollout(state, prompts, key_rollout) if generation is None else generation
        if drawn.token_BGC.shape[0] != prompts.index_B.shape[0]:
            raise ValueError(
                f"generation holds completions of {drawn.token_BGC.shape[0]} prompts, the first batch has "
                f"{prompts.index_B.shape[0]}: give it with the batch that it was drawn for"
            )
        wait = score(prompts, drawn)
        batch, generation = next(remaining, None), None
        if ahead and batch is not None:
            generation = rollout(state, batch[0], jax.random.split(batch[1])[0])
        score_BG = jnp.asarray(wait(), jnp.float32)
        if score_BG.shape[:2] != drawn.token_BGC.shape[:2]:
            raise ValueError(
                f"score gave scores of shape {score_BG.shape} for completions [B, G] = {drawn.token_BGC.shape[:2]}"
            )
        experience = Experience(as_branches(prompts, drawn), drawn, score_BG)
        state, metrics = learn(state, frozen, prompts, drawn, score_BG, key_learn)
        yield HostIteration(state, metrics, experience, generation)
