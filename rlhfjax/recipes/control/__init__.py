"""Control: whole training runs in worlds of `rlhfjax.environments`, as pure functions.

    training = control_ppo(cart_pole(), ControlPPO())
    run, metrics = jax.jit(lambda key: train(training, key, iterations))(jax.random.key(0))
    runs, metrics = jax.jit(jax.vmap(lambda key: train(training, key, iterations)))(jax.random.split(key, 8))
    episodes = play(env, training.policy(run), key, count=64, most_steps=500)

Hyperparameters are swept by building the training inside the `vmap`, of `dataclasses.replace(config, ...)` with traced
floats. All that a run needs lies in its state (`Run`), replay and worlds included: a checkpoint of it, and the same
keys, go on bit for bit. On several devices lay seeds over them, by the first axis of all that `runs` holds; or the
worlds of one run, with `mesh=` of these functions: acting and learning are then split.

Metrics of every algorithm, beside its own (float32 scalars):
    episode/return       mean undiscounted return of the episodes that ended in the iteration, 0 where none did
    episode/length       their mean number of steps, 0 where none did
    episode/count        how many there were
    environment_steps    taken in the iteration, all worlds together
    epsilon              share of random actions (PQN and DQN)
    replay/count         transitions held (DQN)

`control_preferences` does not see the world's reward: it learns one from compared segments; see `preferences`.
"""

from rlhfjax.recipes.control.dqn import control_dqn
from rlhfjax.recipes.control.ppo import control_ppo
from rlhfjax.recipes.control.pqn import control_pqn
from rlhfjax.recipes.control.preferences import (
    control_preferences,
    learned_reward,
    learned_scores,
    rounds_of,
)
from rlhfjax.recipes.control.training import Run, Training, iterations_of, laid, train

__all__ = [
    "Run",
    "Training",
    "control_dqn",
    "control_ppo",
    "control_pqn",
    "control_preferences",
    "iterations_of",
    "laid",
    "learned_reward",
    "learned_scores",
    "rounds_of",
    "train",
]
