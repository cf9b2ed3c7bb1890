"""Training in a world of control: many iterations of acting and learning in one program.

`control_ppo` has PureJaxRL's defaults: 4 worlds, 128 steps, 4 epochs of 4 minibatches, two layers of 64 with tanh for
the policy and for the critic, Adam at 2.5e-4. The others have the defaults of `rlhfjax.config`. The episodes are those
of a policy that learns, as in a run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks.case import Case
from experiments.benchmarks.sizes import Sizes
from rlhfjax.config import ControlDQN, ControlPPO, ControlPQN, Optimizer
from rlhfjax.environments import Environment, cart_pole
from rlhfjax.recipes.control import Training, control_dqn, control_ppo, control_pqn, train

RUN = 1_000_000_000  # environment steps of the schedules: constant for all purposes


def control_ppo_run(sizes: Sizes) -> Case:
    """PPO on CartPole, whole iterations; counts environment steps."""
    config = ControlPPO(optimizer=Optimizer(learning_rate=2.5e-4, max_grad_norm=0.5))
    algorithm = config.algorithm

    def flops(params: dict) -> float:
        policy, critic = forward_flops(params["policy"]), forward_flops(params["critic"])
        return policy + 2 * critic + algorithm.epochs * 3 * (policy + critic)

    return training_case(sizes, control_ppo, config, flops)


def control_pqn_run(sizes: Sizes) -> Case:
    """PQN on CartPole, whole iterations; counts environment steps."""
    config = ControlPQN()

    def flops(params: dict) -> float:
        return (2 + config.algorithm.epochs * 3) * forward_flops(params)

    return training_case(sizes, control_pqn, config, flops)


def control_dqn_run(sizes: Sizes) -> Case:
    """DQN on CartPole, whole iterations, learning from the first on; counts environment steps."""
    config = dataclasses.replace(ControlDQN(), learning_starts=1)
    learnt = (
        config.updates * config.batch / (config.worlds * config.steps)
    )  # transitions for each that is seen

    def flops(params: dict) -> float:
        # Of a transition that is learnt from: forwards and backwards, and two networks on what follows it.
        return (1 + learnt * (3 + 2)) * forward_flops(params)

    return training_case(sizes, control_dqn, config, flops)


def training_case(
    sizes: Sizes,
    make: Callable[[Environment, Any], Training],
    config: Any,
    flops: Callable[[dict], float],
) -> Case:
    """A run of `sizes.control_iterations` iterations, of `sizes.seeds` seeds at once.

    `flops(params)` are those of one environment step.
    """
    training = make(cart_pole(), dataclasses.replace(config, environment_steps=RUN))
    seeds, iterations = sizes.seeds, sizes.control_iterations
    if seeds < 1 or iterations < 1:
        raise ValueError(f"--seeds {seeds} and --control-iterations {iterations} must be at least 1")
    steps = seeds * iterations * config.worlds * config.steps

    def advance(run: Any, key: jax.Array):
        return train(training, key, iterations, run=run)

    def step(runs: Any, inputs: tuple, key: jax.Array):
        del inputs
        return jax.vmap(advance)(runs, jax.random.split(key, seeds)) if seeds > 1 else advance(runs, key)

    key = jax.random.key(0)
    init = jax.jit(jax.vmap(training.init) if seeds > 1 else training.init)
    one = jax.eval_shape(training.init, key).learner.params
    return Case(
        step,
        state=init(jax.random.split(key, seeds) if seeds > 1 else key),
        inputs=(),
        tokens=0,
        count=lambda metrics: metrics["environment_steps"].sum(),
        flops=steps * flops(one),
        sizes={
            "seeds": seeds,
            "iterations": iterations,
            "parameters": sum(x.size for x in jax.tree.leaves(one)),
        }
        | dataclasses.asdict(config),
        environment_steps=steps,
    )


def forward_flops(params: dict) -> float:
    """Of one forward pass of one observation: the matrix products."""
    kernels = [x for x in jax.tree.leaves(params) if len(x.shape) == 2]
    return 2.0 * sum(x.size for x in kernels)
