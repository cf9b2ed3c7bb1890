"""RLHF with a reward on the host: two compiled halves, and scores that are made while the device works."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.generation import Generation
from rlhfjax.recipes.rlhf import RLHF, Experience, Frozen, Prompts, as_branches

Score = Callable[[Prompts, Generation], Callable[[], np.ndarray | jax.Array]]


class HostIteration(NamedTuple):
    """What one iteration leaves."""

    state: Any  # donated to the next iteration: copy it to keep it
    metrics: dict[str, jax.Array]
    experience: Experience
    ahead: Generation | None  # the next iteration's completions, where they are drawn ahead


class Iteration:
    """One iteration with a reward on the host, from `rollout` and `learn` of an `RLHF`, compiled by the caller.

    `learn` may donate its state. `rollout(state, prompts, key)` of this draws the completions of a batch, by the key of
    its iteration, as the call does.
    """

    def __init__(self, rollout: Callable[..., Generation], learn: Callable[..., Any], score: Score) -> None:
        self._rollout, self._learn, self._score = rollout, learn, score

    def rollout(self, state: Any, prompts: Prompts, key: jax.Array) -> Generation:
        """Completions of a batch, [B, G, C]."""
        return self._rollout(state, prompts, jax.random.split(key)[0])

    def __call__(
        self,
        state: Any,
        frozen: Frozen,
        batch: tuple[Prompts, jax.Array],
        following: tuple[Prompts, jax.Array] | None = None,
        generation: Generation | None = None,
    ) -> HostIteration:
        """Draws, scores and learns from one batch, prompts and key.

        Args:
          state: donated.
          following: the next batch, whose completions are drawn ahead, before the update; None: not.
          generation: completions of this batch that were drawn ahead.

        Raises ValueError where `generation` or the scores are not of the batch's prompts and samples.
        """
        prompts, key = batch
        drawn = self.rollout(state, prompts, key) if generation is None else generation
        if drawn.token_BGC.shape[0] != prompts.index_B.shape[0]:
            raise ValueError(
                f"generation holds completions of {drawn.token_BGC.shape[0]} prompts, the first batch has "
                f"{prompts.index_B.shape[0]}: give it with the batch that it was drawn for"
            )
        wait = self._score(prompts, drawn)
        ahead = None if following is None else self.rollout(state, *following)
        score_BG = jnp.asarray(wait(), jnp.float32)
        if score_BG.shape[:2] != drawn.token_BGC.shape[:2]:
            raise ValueError(
                f"score gave scores of shape {score_BG.shape} for completions [B, G] = {drawn.token_BGC.shape[:2]}"
            )
        experience = Experience(as_branches(prompts, drawn), drawn, score_BG)
        state, metrics = self._learn(state, frozen, prompts, drawn, score_BG, jax.random.split(key)[1])
        return HostIteration(state, metrics, experience, ahead)


def host_iteration(rlhf: RLHF, score: Score) -> Iteration:
    """One iteration, for a loop of the caller's own, its two halves compiled; `host_iterations` is the loop, and says
    what `score` is."""
    return Iteration(jax.jit(rlhf.rollout), jax.jit(rlhf.learn, donate_argnums=0), score)


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
    iteration = host_iteration(rlhf, score)
    remaining = iter(batches)
    batch = next(remaining, None)
    while batch is not None:
        following = next(remaining, None)
        made = iteration(state, frozen, batch, following if ahead else None, generation)
        batch, state, generation = following, made.state, made.ahead
        yield made
