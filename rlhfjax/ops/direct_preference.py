"""Losses that learn a policy from preferences directly, without a reward model: DPO and its relatives.

All are elementwise: one entry is one pair (or, at the end of the file, one completion with a thumb up or
down). They see a completion as its log-ratio

    log_ratio = log pi(y|x) - log pi_ref(y|x)      nats

where a method without a reference takes log pi(y|x) in its place, and a length-normalised one divides it by
the number of tokens. `beta * log_ratio` is the implicit reward of the completion (arXiv:2305.18290).

Labels are probabilities that the first completion is preferred. A loss f(preferred, other) of the papers is
here

    label * f(first, second) + (1 - label) * f(second, first)

its mean over labels drawn with that probability. So swapping a pair and its label changes nothing, and label
smoothing and its inverse are functions of the label alone: `smoothed_label`, `debiased_label`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_number

# Mean log-probabilities nearer to 0 than this count as this: at probability 1 the odds are infinite.
LARGEST_LOGP = -1e-6


def smoothed_label(label: ArrayLike, smoothing: ArrayLike) -> Array:
    """`(1 - smoothing) * label + smoothing * (1 - label)`: the label's mean after flips with that probability.

    As the label of `dpo_loss` it makes conservative DPO (E. Mitchell 2023, "A note on DPO with noisy
    preferences").

    Args:
      label: real, any shape: probability that the first completion is preferred.
      smoothing: scalar or the same shape, in [0, 0.5]: assumed probability that a label is wrong.
    """
    label = as_number("label", label, jnp.shape(label))
    smoothing = as_number("smoothing", smoothing, label.shape)
    return (1 - smoothing) * label + smoothing * (1 - label)


def debiased_label(label: ArrayLike, flip_rate: ArrayLike) -> Array:
    """`(label - flip_rate) / (1 - 2 * flip_rate)`: the inverse of `smoothed_label`, outside [0, 1] for hard
    labels.

    A loss that is linear in its label has, on labels that were flipped with probability `flip_rate` and then
    debiased, the mean it has on the clean labels. With `dpo_loss` that is robust DPO (arXiv:2403.00409):

        ((1 - e) * loss(label) - e * loss(1 - label)) / (1 - 2 e)

    Args:
      label: real, any shape: the label as observed.
      flip_rate: scalar or the same shape, in [0, 0.5): probability that an observed label is wrong.
    """
    label = as_number("label", label, jnp.shape(label))
    flip_rate = as_number("flip_rate", flip_rate, label.shape)
    return (label - flip_rate) / (1 - 2 * flip_rate)


def dpo_loss(
    log_ratio_chosen: ArrayLike,
    log_ratio_rejected: ArrayLike,
    *,
    beta: ArrayLike,
    label: ArrayLike = 1.0,
    margin: ArrayLike = 0.0,
) -> Array:
    """Direct preference optimisation (arXiv:2305.18290 eq. 7), elementwise, in nats; with
    `d = beta * (log_ratio_chosen - log_ratio_rejected)`

        -label * log sigmoid(d - margin) - (1 - label) * log sigmoid(-d - margin)

    Without margin it is least where `sigmoid(d) = label`. With length-normalised log-probabilities in place
    of the log-ratios and a margin it is SimPO (arXiv:2405.14734 eq. 6), with plain log-probabilities the
    preference part of CPO (arXiv:2401.08417).

    Args:
      log_ratio_chosen: float, any shape: of the first completion, by convention the preferred one; nats.
      log_ratio_rejected: the same shape: of the second.
      beta: scalar or the same shape, > 0: reward per nat, the KL weight of the problem DPO solves.
      label: scalar or the same shape, in [0, 1]: probability that the first is preferred.
      margin: scalar or the same shape, >= 0: lead in reward asked of the preferred completion.

    Returns:
      float32, shape of log_ratio_chosen.

    >>> round(float(dpo_loss(0.0, 0.0, beta=0.1)), 3), round(float(dpo_loss(10.0, -10.0, beta=0.1)), 3)
    (0.693, 0.127)
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    margin = as_number("margin", margin, chosen.shape)
    difference = beta * (chosen - rejected)
    return label * jax.nn.softplus(margin - difference) + (1 - label) * jax.nn.softplus(margin + difference)


def hinge_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike = 1.0
) -> Array:
    """`max(0, 1 - d)` with `d = beta * (log_ratio_chosen - log_ratio_rejected)`, elementwise: the hinge of
    RSO (arXiv:2309.06657).

    With log-probabilities in place of the log-ratios it is the calibration loss of SLiC-HF
    (arXiv:2305.10425), `max(0, delta - logp_chosen + logp_rejected)`, divided by its `delta = 1 / beta`.

    Arguments and result as in `dpo_loss`. At the kink the gradient is half of that to its left.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    difference = beta * (chosen - rejected)
    return label * jnp.maximum(1 - difference, 0) + (1 - label) * jnp.maximum(1 + difference, 0)


def ipo_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike = 1.0
) -> Array:
    """Identity preference optimisation (arXiv:2310.12036 eq. 17), elementwise; with
    `h = log_ratio_chosen - log_ratio_rejected`

        label * (h - 1 / (2 beta))^2 + (1 - label) * (h + 1 / (2 beta))^2

    It is least at `h = (2 label - 1) / (2 beta)`, which is finite however sure the label. `beta` is the
    paper's tau. The paper's log-ratios are sums over tokens; per-token means are what TRL takes, and then
    beta speaks of nats per token.

    Arguments and result as in `dpo_loss`; the result is in squared nats.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    difference, target = chosen - rejected, 0.5 / beta
    return label * jnp.square(difference - target) + (1 - label) * jnp.square(difference + target)


def exo_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike
) -> Array:
    """Efficient exact optimisation on pairs (EXO, arXiv:2402.00856), elementwise, in nats: the reverse KL

        KL(q || (label, 1 - label)),    q = (sigmoid(d), sigmoid(-d)),
        d = beta * (log_ratio_chosen - log_ratio_rejected)

    where DPO has the forward one. Both are least where `sigmoid(d) = label`.

    Args:
      log_ratio_chosen, log_ratio_rejected, beta: as in `dpo_loss`.
      label: strictly between 0 and 1; a hard label has no finite loss, so smooth it first (`smoothed_label`,
        by 1e-3 say). Not linear in the label: `debiased_label` does not fit it.

    Returns:
      float32, shape of log_ratio_chosen; not finite at a label of 0 or 1.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    difference = beta * (chosen - rejected)
    logp_first, logp_second = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    first = jnp.exp(logp_first) * (logp_first - jnp.log(label))
    return first + jnp.exp(logp_second) * (logp_second - jnp.log1p(-label))


def nca_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike = 1.0
) -> Array:
    """Noise-contrastive alignment on pairs (NCA, arXiv:2402.05369), elementwise, in nats; with implicit
    rewards `r = beta * log_ratio`

        -label * log sigmoid(r_chosen) - (1 - label) * log sigmoid(r_rejected)
            - log sigmoid(-r_chosen) / 2 - log sigmoid(-r_rejected) / 2

    The label plays the softmax of explicit rewards over the two completions. Each reward has an optimum of
    its own, `sigmoid(r_chosen) = label / (label + 1/2)`: likelihoods are held in place, and not only their
    difference.

    Arguments and result as in `dpo_loss`.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    chosen, rejected = beta * chosen, beta * rejected
    drawn = label * jax.nn.softplus(-chosen) + (1 - label) * jax.nn.softplus(-rejected)
    return drawn + 0.5 * (jax.nn.softplus(chosen) + jax.nn.softplus(rejected))


def apo_zero_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike = 1.0
) -> Array:
    """Anchored preference optimisation, zero (arXiv:2408.06266), elementwise, in [0, 2]:

        1 - sigmoid(beta * log_ratio_chosen) + sigmoid(beta * log_ratio_rejected)

    It raises the likelihood of the preferred completion and lowers that of the other: for data better than
    the model. The constant 1 keeps it from being negative.

    Arguments and result as in `dpo_loss`.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    lead = jax.nn.sigmoid(beta * chosen) - jax.nn.sigmoid(beta * rejected)
    return 1 - (2 * label - 1) * lead


def apo_down_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike = 1.0
) -> Array:
    """Anchored preference optimisation, down (arXiv:2408.06266), elementwise, in [0, 2]:

        sigmoid(beta * log_ratio_chosen) + 1 - sigmoid(beta * (log_ratio_chosen - log_ratio_rejected))

    It lowers the likelihood of both, that of the other completion more: for a model better than the data.
    The constant 1 keeps it from being negative.

    Arguments and result as in `dpo_loss`.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    chosen, rejected = beta * chosen, beta * rejected
    preferred = label * jax.nn.sigmoid(chosen) + (1 - label) * jax.nn.sigmoid(rejected)
    wins, loses = jax.nn.sigmoid(chosen - rejected), jax.nn.sigmoid(rejected - chosen)
    return preferred + 1 - label * wins - (1 - label) * loses


def sppo_loss(
    log_ratio_chosen: ArrayLike, log_ratio_rejected: ArrayLike, *, beta: ArrayLike, label: ArrayLike = 1.0
) -> Array:
    """Self-play preference optimisation (SPPO, arXiv:2405.00675), elementwise, in squared nats:

        (log_ratio_chosen - (label - 1/2) / beta)^2 + (log_ratio_rejected + (label - 1/2) / beta)^2

    With hard labels "SPPO-hard"; the paper's label is the win rate against the policy that sampled the
    completions, which is its reference, and 1 / beta its eta.

    Arguments and result as in `dpo_loss`.
    """
    chosen, rejected, beta, label = _pair(log_ratio_chosen, log_ratio_rejected, beta, label)
    target = (label - 0.5) / beta
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def odds_ratio_loss(
    logp_chosen: ArrayLike, logp_rejected: ArrayLike, *, beta: ArrayLike = 1.0, label: ArrayLike = 1.0
) -> Array:
    """The odds-ratio term of ORPO (arXiv:2403.07691), elementwise, in nats; with
    `log_odds = logp - log(1 - exp(logp))` and `d = log_odds_chosen - log_odds_rejected`

        -beta * (label * log sigmoid(d) + (1 - label) * log sigmoid(-d))

    Args:
      logp_chosen, logp_rejected: float, equal shapes, <= 0: mean log-probability per token, nats. Above -1e-6
        they count as -1e-6 and get no gradient.
      beta: scalar or the same shape: weight of the term, the paper's lambda.
      label: scalar or the same shape, in [0, 1]: probability that the first is preferred.

    Returns:
      float32, shape of logp_chosen.
    """
    chosen, rejected, beta, label = _pair(
        logp_chosen, logp_rejected, beta, label, names=("logp_chosen", "logp_rejected")
    )
    difference = _log_odds(chosen) - _log_odds(rejected)
    return beta * (label * jax.nn.softplus(-difference) + (1 - label) * jax.nn.softplus(difference))


def kto_loss(
    log_ratio: ArrayLike,
    *,
    beta: ArrayLike,
    label: ArrayLike,
    reference_point: ArrayLike,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> Array:
    """Kahneman-Tversky optimisation (KTO, arXiv:2402.01306) of single completions, elementwise; with
    `d = beta * (log_ratio - reference_point)`

        label * desirable_weight * sigmoid(-d) + (1 - label) * undesirable_weight * sigmoid(d)

    Args:
      log_ratio: float, any shape: of the completion, nats.
      beta: scalar or the same shape, > 0: reward per nat.
      label: scalar or the same shape, in [0, 1]: probability that the completion is desirable.
      reference_point: scalar or the same shape, nats: an estimate of KL(pi || pi_ref), >= 0. Gets no
        gradient.
      desirable_weight, undesirable_weight: scalar or the same shape; the paper wants desirable_weight times
        the number of desirable examples within 1 to 4/3 of the other product.

    Returns:
      float32, shape of log_ratio.
    """
    log_ratio, beta, label = _single(log_ratio, beta, label)
    shape = log_ratio.shape
    anchor = jax.lax.stop_gradient(as_number("reference_point", reference_point, shape))
    gain = label * as_number("desirable_weight", desirable_weight, shape)
    cost = (1 - label) * as_number("undesirable_weight", undesirable_weight, shape)
    difference = beta * (log_ratio - anchor)
    return gain * jax.nn.sigmoid(-difference) + cost * jax.nn.sigmoid(difference)


def bco_loss(
    log_ratio: ArrayLike, *, beta: ArrayLike, label: ArrayLike, reward_shift: ArrayLike = 0.0
) -> Array:
    """Binary classifier optimisation (BCO, arXiv:2404.04656) of single completions, elementwise, in nats;
    with `d = beta * log_ratio - reward_shift`

        -label * log sigmoid(d) - (1 - label) * log sigmoid(-d)

    Args:
      log_ratio: float, any shape: of the completion, nats.
      beta: scalar or the same shape, > 0: reward per nat.
      label: scalar or the same shape, in [0, 1]: probability that the completion is desirable.
      reward_shift: scalar or the same shape, in units of reward; in the paper the midpoint of the mean
        rewards of desirable and undesirable completions. Gets no gradient.

    Returns:
      float32, shape of log_ratio.
    """
    log_ratio, beta, label = _single(log_ratio, beta, label)
    shift = jax.lax.stop_gradient(as_number("reward_shift", reward_shift, log_ratio.shape))
    difference = beta * log_ratio - shift
    return label * jax.nn.softplus(-difference) + (1 - label) * jax.nn.softplus(difference)


def _pair(
    chosen: ArrayLike,
    rejected: ArrayLike,
    beta: ArrayLike,
    label: ArrayLike,
    names: tuple[str, str] = ("log_ratio_chosen", "log_ratio_rejected"),
) -> tuple[Array, Array, Array, Array]:
    """The arguments of a pairwise loss in float32, checked."""
    chosen = as_float(names[0], chosen)
    rejected = as_float(names[1], rejected, chosen.shape)
    return chosen, rejected, as_number("beta", beta, chosen.shape), as_number("label", label, chosen.shape)


def _single(log_ratio: ArrayLike, beta: ArrayLike, label: ArrayLike) -> tuple[Array, Array, Array]:
    log_ratio = as_float("log_ratio", log_ratio)
    return log_ratio, as_number("beta", beta, log_ratio.shape), as_number("label", label, log_ratio.shape)


def _log_odds(logp: Array) -> Array:
    """`log(p / (1 - p))` from log p; `log(1 - p)` in whichever form keeps its digits."""
    logp = jnp.minimum(logp, LARGEST_LOGP)
    near_one = logp > -0.6931472  # p > 1/2
    rest = jnp.where(
        near_one,
        jnp.log(-jnp.expm1(jnp.where(near_one, logp, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logp))),
    )
    return logp - rest
