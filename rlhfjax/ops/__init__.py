"""Pure maths on arrays: no parameters, no devices, no state. Imports nothing else of rlhfjax.

Conventions of every op: data comes in as floating point of any width and goes out in float32; integers where
a fraction could have been lost, wrong ranks and unequal shapes are refused while tracing, with an error that
names the argument; `mask` is True where an entry counts. Array suffixes in the bodies: T time, V vocabulary,
D width, N rows, C rows of a chunk.
"""

from rlhfjax.ops.kl import adaptive_kl_coefficient, categorical_kl, k1, k2, k3
from rlhfjax.ops.masked import explained_variance, masked_mean, masked_sum, masked_variance, whiten
from rlhfjax.ops.policy_gradient import clipped_surrogate, clipped_value_loss
from rlhfjax.ops.preference import bayes_accuracy, bradley_terry_loss, bradley_terry_probability
from rlhfjax.ops.returns import discounted_returns, end_of_sequence_reward, gae
from rlhfjax.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "TokenLogprobs",
    "adaptive_kl_coefficient",
    "bayes_accuracy",
    "bradley_terry_loss",
    "bradley_terry_probability",
    "categorical_kl",
    "clipped_surrogate",
    "clipped_value_loss",
    "discounted_returns",
    "end_of_sequence_reward",
    "explained_variance",
    "gae",
    "k1",
    "k2",
    "k3",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "token_logprobs",
    "whiten",
]
