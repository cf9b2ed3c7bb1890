"""Pure maths on arrays: no parameters, no devices, no state. Imports nothing else of rlhfjax.

Conventions of every op: data comes in as floating point of any width and goes out in float32; integers where
a fraction could have been lost, wrong ranks and unequal shapes are refused while tracing, with an error that
names the argument; `mask` is True where an entry counts. Array suffixes in the bodies: T time, V vocabulary,
D width, N rows, C rows of a chunk.
"""

from rlhfjax.ops.advantages import (
    all_equal,
    batch_mean,
    batch_std,
    divide_by_std,
    first_chosen,
    group_mean_baseline,
    group_std,
    leave_one_out_baseline,
    soft_overlong_penalty,
)
from rlhfjax.ops.best_of_n import (
    best_of_n,
    best_of_n_distribution,
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_mean,
    best_of_n_weights,
)
from rlhfjax.ops.direct_preference import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    debiased_label,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    odds_ratio_loss,
    smoothed_label,
    sppo_loss,
)
from rlhfjax.ops.kl import adaptive_kl_coefficient, categorical_kl, k1, k2, k3
from rlhfjax.ops.masked import explained_variance, masked_mean, masked_sum, masked_variance, whiten
from rlhfjax.ops.policy_gradient import clipped_surrogate, clipped_value_loss
from rlhfjax.ops.preference import (
    bayes_accuracy,
    bradley_terry_loss,
    bradley_terry_probability,
    fit_temperature,
    plackett_luce_loss,
)
from rlhfjax.ops.returns import discounted_returns, end_of_sequence_reward, gae
from rlhfjax.ops.token_logprobs import TokenLogprobs, token_kl, token_logprobs

__all__ = [
    "TokenLogprobs",
    "adaptive_kl_coefficient",
    "all_equal",
    "apo_down_loss",
    "apo_zero_loss",
    "batch_mean",
    "batch_std",
    "bayes_accuracy",
    "bco_loss",
    "best_of_n",
    "best_of_n_distribution",
    "best_of_n_kl",
    "best_of_n_kl_bound",
    "best_of_n_mean",
    "best_of_n_weights",
    "bradley_terry_loss",
    "bradley_terry_probability",
    "categorical_kl",
    "clipped_surrogate",
    "clipped_value_loss",
    "debiased_label",
    "discounted_returns",
    "divide_by_std",
    "dpo_loss",
    "end_of_sequence_reward",
    "exo_loss",
    "explained_variance",
    "first_chosen",
    "fit_temperature",
    "gae",
    "group_mean_baseline",
    "group_std",
    "hinge_loss",
    "ipo_loss",
    "k1",
    "k2",
    "k3",
    "kto_loss",
    "leave_one_out_baseline",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "nca_loss",
    "odds_ratio_loss",
    "plackett_luce_loss",
    "smoothed_label",
    "soft_overlong_penalty",
    "sppo_loss",
    "token_kl",
    "token_logprobs",
    "whiten",
]
