"""Learning algorithms, one file each: a batch type, a State, `loss`, and `make(...) -> Algorithm(init,
update)`.

They see numbers, not networks: a function `evaluate(params, inputs)` stands for the model.
"""

from rlhfjax.algorithms import dpo, grpo, kto, ppo, reward_model, sft
from rlhfjax.algorithms.algorithm import Algorithm
from rlhfjax.algorithms.optimizers import make_optimizer

__all__ = ["Algorithm", "dpo", "grpo", "kto", "make_optimizer", "ppo", "reward_model", "sft"]
