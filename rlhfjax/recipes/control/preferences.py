"""Control from preferences (Christiano et al. 2017, arXiv 1706.03741): PPO on a reward learnt from compared segments.

    training = control_preferences(cart_pole(), ControlPreferences(labels=400))
    run, metrics = jax.jit(lambda key: train(training, key, rounds_of(config)))(jax.random.key(0))

An iteration of this training is a round. Of what the policy did last, pairs of segments are cut; those that the
members of the ensemble disagree on most are compared by the labeller, who sees true returns; the reward is fitted to
all labels so far; and PPO makes some updates on it, acting after each. The policy sees the learnt reward only; true
returns are for the labeller, and for metrics. Everything is in the state: policy, ensemble, labels, worlds and what was
done last.

Metrics of a round, beside those of PPO and of the episodes (`rlhfjax.recipes.control`), whose returns are true ones:
    labels/count           labels so far
    labels/equal           share of this round's answers that are "equal", 0 where none was asked
    query/disagreement     mean over the candidates of the variance of the members' predictions
    query/chosen           that of the pairs that were asked about
    reward/loss, reward/heldout_loss, reward/l2
                           see `segment_rewards`
    reward/agreement       share of candidates with unequal true returns that the ensemble, before it is fitted, puts in
                           the right order; a tie counts half, and 0.5 where all are equal

Shapes: T steps, B worlds, C candidates, Q queries, M members.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rlhfjax.algorithms import ppo
from rlhfjax.config import ControlPreferences as Config
from rlhfjax.environments import Environment, Trajectory
from rlhfjax.ops import masked_mean
from rlhfjax.recipes.control.ppo import ppo_parts
from rlhfjax.recipes.control.segment_rewards import (
    Ensemble,
    Labels,
    add_labels,
    bootstrap_weights,
    disagreement,
    empty_labels,
    reward_learner,
)
from rlhfjax.recipes.control.segments import Segments, answers, check_labeller, cut_segments
from rlhfjax.recipes.control.training import Metrics, Run, Training, iterations_of


class Learner(NamedTuple):
    """What learns, and what it learns from."""

    policy: ppo.State
    ensemble: Ensemble
    labels: Labels
    trajectory: Trajectory  # [T, B], what the policy did last: to be asked about, then to be learnt from


def control_preferences(env: Environment, config: Config) -> Training:
    """PPO on a learnt reward as a `Training`, whose iterations are rounds: there are `rounds_of(config)`.

    `run.learner` is a `Learner`. `init` already takes T steps in all worlds, beside those of the metrics.

    Float fields of the config may be traced, and `labels` where `capacity` is given: one program then runs all numbers
    of labels. Raises ValueError where a setting does not fit.
    """
    _check(config)
    parts = ppo_parts(env, config.ppo)
    learner = reward_learner(config.reward, env)
    rounds, steps = rounds_of(config), config.ppo.worlds * config.ppo.steps
    capacity = _capacity(config)

    def policy_run(run: Run) -> Run:
        return Run(run.learner.policy, run.worlds, None, run.steps)

    def init(key: jax.Array) -> Run:
        key_policy, key_reward, key_act = jax.random.split(key, 3)
        run = parts.init(key_policy)
        worlds, trajectory = parts.act(run, key_act)
        members = config.reward.members
        labels = empty_labels(capacity, config.segment, members, trajectory.observation[0, 0])
        together = Learner(run.learner, learner.init(key_reward), labels, trajectory)
        return Run(together, worlds, None, jnp.int32(0))

    def query(run: Run, key: jax.Array) -> tuple[Labels, Metrics]:
        """The labels with those of this round."""
        key_cut, key_choose, key_answer, key_bootstrap = jax.random.split(key, 4)
        _, ensemble, labels, trajectory = run.learner
        pairs = config.candidates + config.queries  # the last ones are for random queries
        segments, return_2N = cut_segments(key_cut, trajectory, count=2 * pairs, length=config.segment)
        first, second = (jax.tree.map(lambda x, i=i: x[i * pairs :][:pairs], segments) for i in (0, 1))
        first_return, second_return = return_2N[:pairs], return_2N[pairs:]
        score_first, score_second = learner.scores(ensemble, first), learner.scores(ensemble, second)
        doubt = disagreement(score_first, score_second)
        index_Q = choose_queries(key_choose, doubt, config.queries, config.random_queries)

        round_ = run.steps // (steps * config.iterations)
        due = labels_due(round_, config.labels, rounds, config.initial_share)
        asked = jnp.clip(due - labels.count, 0, config.queries) * jnp.any(segments.mask)
        label_Q = answers(key_answer, first_return[index_Q], second_return[index_Q], config.labeller)
        new = Labels(
            jax.tree.map(lambda x: x[index_Q], first),
            jax.tree.map(lambda x: x[index_Q], second),
            label_Q,
            bootstrap_weights(key_bootstrap, (config.queries, config.reward.members)),
            asked,
        )
        asked_Q = jnp.arange(config.queries) < asked
        labels = add_labels(labels, new)
        right = 0.5 + 0.5 * jnp.sign(jnp.mean(score_first - score_second, axis=0)) * jnp.sign(
            first_return - second_return
        )
        unequal = first_return != second_return
        return labels, {
            "labels/count": labels.count.astype(jnp.float32),
            "labels/equal": masked_mean((label_Q == 0.5).astype(jnp.float32), asked_Q),
            "query/disagreement": jnp.mean(doubt),
            "query/chosen": masked_mean(doubt[index_Q], asked_Q),
            "reward/agreement": jnp.where(jnp.any(unequal), masked_mean(right, unequal), 0.5),
        }

    def iterate(run: Run, key: jax.Array) -> tuple[Run, Metrics]:
        key_query, key_fit, key_updates = jax.random.split(key, 3)
        labels, metrics = query(run, key_query)
        ensemble, fitted = learner.fit(run.learner.ensemble, labels, key_fit)
        last = run.learner.trajectory
        ensemble = learner.normalise(ensemble, last.observation, last.action)

        def update(carry: tuple[Run, Trajectory], key: jax.Array):
            run, trajectory = carry
            key_learn, key_act = jax.random.split(key)
            reward = learner.reward(ensemble, trajectory.observation, trajectory.action)
            run, metrics = parts.learn(run, trajectory._replace(reward=reward), key_learn)
            worlds, trajectory = parts.act(run, key_act)
            return (run._replace(worlds=worlds), trajectory), metrics

        start = (policy_run(run), last)
        (after, trajectory), learnt = jax.lax.scan(
            update, start, jax.random.split(key_updates, config.iterations)
        )
        after = after._replace(learner=Learner(after.learner, ensemble, labels, trajectory))
        return after, _over_updates(learnt) | metrics | fitted

    def policy(run: Run):
        return parts.policy(policy_run(run))

    return Training(init, iterate, policy, None)


def choose_queries(
    key: jax.Array, disagreement: jax.Array, queries: int, random_share: float | jax.Array
) -> jax.Array:
    """Which pairs to ask about, int32 [Q]: the candidates that are disagreed on most, in falling order.

    Each place goes to a random pair instead with the probability `random_share`. Pairs being in random order, these are
    simply the last ones.

    Args:
      disagreement: float [C + Q], of the candidates and of Q more pairs.
      queries: Q.
      random_share: in [0, 1].
    """
    candidates = disagreement.shape[0] - queries
    _, most_Q = jax.lax.top_k(disagreement[:candidates], queries)
    at_random_Q = jax.random.uniform(key, (queries,)) < random_share
    return jnp.where(at_random_Q, candidates + jnp.arange(queries), most_Q).astype(jnp.int32)


def labels_due(
    round_: jax.Array | np.ndarray | int,
    labels: jax.Array | int,
    rounds: int,
    initial_share: float | jax.Array,
) -> jax.Array:
    """Labels that there should be after the queries of round 0, 1, ... rounds - 1; int32, never falling.

    `initial_share` of them in the first round. The rate of the others falls as rounds / (rounds + round), the
    paper's T / (T + t).
    """
    progress = jnp.minimum(round_ / max(rounds - 1, 1), 1.0) if rounds > 1 else jnp.float32(1)
    share = initial_share + (1.0 - initial_share) * jnp.log1p(progress) / jnp.log(2.0)
    return jnp.floor(labels * share + 0.5).astype(jnp.int32)


def rounds_of(config: Config) -> int:
    """Rounds of a whole run: iterations of `train`. ValueError where there would be none."""
    if config.iterations < 1:
        raise ValueError(f"iterations={config.iterations} of PPO in a round must be at least 1")
    iterations = iterations_of(config.ppo.environment_steps, config.ppo.worlds, config.ppo.steps)
    return max(1, iterations // config.iterations)


def learned_reward(env: Environment, config: Config):
    """A function (run, observation [..., *shape], action int32 [...]) -> float32 [...]: the normalised reward that the
    policy of `run` was trained on last."""
    learner = reward_learner(config.reward, env)

    def reward(run: Run, observation: jax.Array, action: jax.Array) -> jax.Array:
        return learner.reward(run.learner.ensemble, observation, action)

    return reward


def learned_scores(env: Environment, config: Config):
    """A function (run, segments) -> float32 [...]: the sums of the members' rewards, their mean."""
    learner = reward_learner(config.reward, env)

    def scores(run: Run, segments: Segments) -> jax.Array:
        return jnp.mean(learner.scores(run.learner.ensemble, segments), axis=0)

    return scores


def _over_updates(metrics: Metrics) -> Metrics:
    """Metrics of several updates as one: means, sums of counts, maxima; returns weighted by their episodes."""
    count = metrics["episode/count"]
    found = {}
    for name, x in metrics.items():
        if name in ("episode/count", "environment_steps"):
            found[name] = jnp.sum(x)
        elif name in ("episode/return", "episode/length"):
            found[name] = jnp.sum(x * count) / jnp.maximum(jnp.sum(count), 1.0)
        else:
            found[name] = (jnp.max if name.endswith("_max") else jnp.mean)(x)
    return found


def _capacity(config: Config) -> int:
    if config.capacity is not None:
        return max(config.capacity, 1)
    if isinstance(config.labels, Tracer):
        raise ValueError("labels is traced: give `capacity`, the most labels that there may be")
    return max(config.labels, 1)


def _check(config: Config) -> None:
    """Raises ValueError where a setting does not fit; traced ones cannot be checked."""
    check_labeller(config.labeller)
    for name in ("initial_share", "random_queries"):
        share = getattr(config, name)
        if not isinstance(share, Tracer) and not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is a share: it must lie in [0, 1]")
    if not isinstance(config.reward.error, Tracer) and not 0 <= config.reward.error < 1:
        raise ValueError(f"reward.error={config.reward.error} must lie in [0, 1)")
    if not 1 <= config.segment <= config.ppo.steps:
        raise ValueError(
            f"segment={config.segment} must lie between 1 and ppo.steps={config.ppo.steps}: "
            "segments are cut from what one rollout holds"
        )
    if not 1 <= config.queries <= config.candidates:
        raise ValueError(
            f"queries={config.queries} cannot be chosen among candidates={config.candidates}: "
            "there must be at least as many, and at least 1 query"
        )
    alone = config.reward.members < 2 and not isinstance(config.random_queries, Tracer)
    if alone and config.random_queries < 1:
        raise ValueError("disagreement needs reward.members of at least 2; with one, set random_queries=1")
    capacity, rounds = _capacity(config), rounds_of(config)
    if isinstance(config.labels, Tracer) or isinstance(config.initial_share, Tracer):
        return
    if not 0 <= config.labels <= capacity:
        raise ValueError(f"labels={config.labels} must lie between 0 and the capacity, {capacity}")
    count = 0
    for due in np.asarray(labels_due(np.arange(rounds), config.labels, rounds, config.initial_share)):
        count += min(int(due) - count, config.queries)
    if count < config.labels:
        raise ValueError(
            f"labels={config.labels} cannot be asked for in {rounds} rounds of at most {config.queries} queries: "
            "make queries larger, or the run longer"
        )
