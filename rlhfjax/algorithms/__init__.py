"""Learning algorithms, one file each: a batch type, a State, `loss`, and `make(...) -> Algorithm(init,
update)`.

They see numbers, not networks: a function `evaluate(params, inputs)` stands for the model.
"""

from rlhfjax.algorithms import dpo, dqn, grpo, ilql, kto, ppo, pqn, reward_model, sft, soft_q, tabular_q
from rlhfjax.algorithms.algorithm import Algorithm
from rlhfjax.algorithms.exploration import epsilon_greedy, epsilon_greedy_probabilities
from rlhfjax.algorithms.optimizers import evaluation_params, make_optimizer

__all__ = [
    "Algorithm",
    "dpo",
    "dqn",
    "epsilon_greedy",
    "epsilon_greedy_probabilities",
    "evaluation_params",
    "grpo",
    "ilql",
    "kto",
    "make_optimizer",
    "ppo",
    "pqn",
    "reward_model",
    "sft",
    "soft_q",
    "tabular_q",
]
