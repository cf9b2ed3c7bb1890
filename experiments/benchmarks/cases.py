"""What is measured, by name: each case is one compiled step on random tokens, exactly as a run takes it."""

from collections.abc import Callable

import jax

from experiments.benchmarks.case import Case
from experiments.benchmarks.control import control_dqn_run, control_ppo_run, control_pqn_run
from experiments.benchmarks.generation import (
    generate_greedy,
    generate_ragged,
    generate_ragged_batches,
    generate_t1,
    generate_top_p,
)
from experiments.benchmarks.memory import logprob_memory, update_memory
from experiments.benchmarks.sizes import Sizes
from experiments.benchmarks.training import (
    dpo_update,
    finetuning,
    grpo_iteration,
    ppo_grouped,
    ppo_seeds,
    ppo_single,
    ragged_update,
    reward_learning,
)


def ceiling(sizes: Sizes) -> Case:
    """A square float32 matrix product, at JAX's default precision: the most FLOP/s this machine gives."""
    size = sizes.matmul_size
    factors = tuple(jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))

    def step(state, factors, key):
        del key
        return state, factors[0] @ factors[1]

    return Case(step, (), factors, 0, lambda product: 0, 2.0 * size**3, {"matmul_size": size})


# Name on the command line -> the case at given sizes, in the order they are run.
CASES: dict[str, Callable[[Sizes], Case]] = {
    "ceiling": ceiling,
    "generate_greedy": generate_greedy,
    "generate_t1": generate_t1,
    "generate_top_p": generate_top_p,
    "generate_ragged": generate_ragged,
    "generate_ragged_batches": generate_ragged_batches,
    "sft": finetuning,
    "reward_model": reward_learning,
    "dpo": dpo_update,
    "ragged_update": ragged_update,
    "ppo": ppo_single,
    "ppo_grouped": ppo_grouped,
    "ppo_seeds": ppo_seeds,
    "grpo": grpo_iteration,
    "control_ppo": control_ppo_run,
    "control_pqn": control_pqn_run,
    "control_dqn": control_dqn_run,
    "logprob_memory": logprob_memory,
    "update_memory": update_memory,
}
