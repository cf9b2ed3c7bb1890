"""Direct preference optimisation (arXiv 2305.18290) and its relatives: a policy from pairs, without a reward
model and without sampling.

    log_ratio = sum over a completion's tokens of logp - logp_ref            (or their mean, or logp alone)
    loss      = mean over pairs of f(log_ratio_first, log_ratio_second; beta, label)
                + nll_coefficient * negative log-likelihood of the preferred completion

With soft labels that follow a reward, label = sigmoid(reward_first - reward_second), on enough pairs, the
optimum of "sigmoid" is pi(y|x) = pi_ref(y|x) exp(reward(x, y) / beta) / Z(x): that of PPO with the KL penalty
beta. f is one of the losses of `rlhfjax.ops.direct_preference`, by its name in `Config.loss`:

    DPO, cDPO, robust   DPO(), DPO(label_smoothing=0.1), DPO(flip_rate=0.1)
    IPO                 DPO(loss="ipo"), per token DPO(loss="ipo", length_normalised=True)
    SimPO               DPO(reference_free=True, length_normalised=True, beta=2.0, margin=1.0)
    CPO                 DPO(reference_free=True, nll_coefficient=1.0, nll_per_token=False)
    ORPO                DPO(loss="orpo", reference_free=True, length_normalised=True, nll_coefficient=1.0)
    EXO                 DPO(loss="exo", label_smoothing=1e-3)
    LD-DPO, WPO         DPO(ld_alpha=0.5), DPO(weighting="aligned")

Every prompt has G completions and K pairs among them, so that a completion is computed once however many
pairs it is in; reference log-probabilities come with the batch. Plain pairs are G = 2, K = 1, first = [0],
second = [1], label = 1. The preferred completion of a pair is the first with probability `label`, and
"chosen" below is a mean under it. A pair of two equal texts says nothing: it is left out of everything, and
counted. Pairs with NaN or infinite log-probabilities are not left out; `check_pairs` finds those of the
reference before training.

Metrics (means over the pairs that count):
    loss/total                  with the likelihood term
    loss/preference             nats (ipo, sppo: squared nats; hinge, apo: none)
    loss/nll                    nats, of the preferred completion, per token or summed as configured
    reward/chosen, reward/rejected    beta * log_ratio: the implicit reward
    pair/margin                 reward/chosen - reward/rejected
    pair/accuracy               of the implicit reward against the label, a tie counts half
    logp/chosen, logp/rejected  nats per completion, under the policy
    length/chosen, length/rejected    tokens
    pair/weight                 of WPO; only with weighting
    pair/equal                  how many pairs were left out because their texts are equal
    batch/count                 pairs
    optimizer/gradient_norm, optimizer/refused

Shapes: B prompts, G completions of each, K pairs of each, C completion length.

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import DPO
>>> def evaluate(logits, token):  # log-probability of each token of the completions, [B, G, C]
...     return jax.nn.log_softmax(logits)[token]
>>> algorithm = make(evaluate, optax.sgd(1.0), DPO(beta=0.5))
>>> state, update = algorithm.init(jnp.zeros(4)), jax.jit(algorithm.update)
>>> token = jnp.array([[[2], [1]]])  # one prompt, two completions of one token; the first is preferred
>>> pairs = Pairs(token, jnp.ones(token.shape, bool), jnp.array([0]), jnp.array([1]), jnp.ones((1, 1)),
...     jnp.ones((1, 1), bool), logp_ref_BGC=evaluate(jnp.zeros(4), token))
>>> for key in jax.random.split(jax.random.key(0), 20):
...     state, metrics = update(state, pairs, key)
>>> int(jnp.argmax(state.params)), int(jnp.argmin(state.params)), float(metrics["pair/accuracy"])
(2, 1, 1.0)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, State, Sums, gradient_step, initial_state
from rlhfjax.config import DPO as Config
from rlhfjax.ops import (
    apo_down_loss,
    apo_zero_loss,
    debiased_label,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    masked_sum,
    nca_loss,
    odds_ratio_loss,
    smoothed_label,
    sppo_loss,
)

LOSSES: dict[str, Callable[..., jax.Array]] = {
    "sigmoid": dpo_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo": exo_loss,
    "nca": nca_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sppo": sppo_loss,
    "orpo": odds_ratio_loss,
}
WEIGHTINGS = ("none", "probability", "aligned")


class Pairs(NamedTuple):
    """Prompts with the pairs of their completions. What is masked may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    completion_mask_BGC: jax.Array  # bool, True at the tokens of a completion
    first: jax.Array  # int [B, K], or [K] for all prompts alike: index into the G completions
    second: jax.Array  # the same for the other of the pair
    label_BK: jax.Array  # float, probability that the first is preferred: 1, 0 or between
    mask_BK: jax.Array  # bool, True where the pair counts
    logp_ref_BGC: jax.Array | None = (
        None  # float, of each token under the reference, nats; None: no reference
    )
    equal_BK: jax.Array | None = None  # bool, True where both texts are the same; None: where indices are


class TokenLogps(NamedTuple):
    """What `evaluate` may give in place of logp alone, where pairs are weighted by "aligned"."""

    logp: jax.Array  # float [B, G, C], log-probability of each completion token, nats
    log_collision: jax.Array | None = None  # [B, G, C], log of the sum over the vocabulary of pi squared


# (params, inputs) -> logp [B, G, C], or TokenLogps
Evaluate = Callable[[PyTree, PyTree], jax.Array | TokenLogps | tuple[jax.Array, ...]]


class _Side(NamedTuple):
    """One completion of every pair, all float32 [B, K], zero where the pair does not count."""

    log_ratio: jax.Array  # as the loss takes it
    logp: jax.Array  # summed
    length: jax.Array
    log_weight: jax.Array  # of WPO, detached


def loss(params: PyTree, batch: Pairs, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed loss over pairs, and sums for the metrics.

    Raises ValueError or TypeError that names the field of config or batch which does not fit.
    """
    _check_config(config)
    batch = _with_reference(_with_pairs_per_prompt(batch), config)
    tokens = _token_logps(evaluate(params, batch.inputs), batch, config)
    mask_BK, equal_BK = _counting_pairs(batch)
    first, second = _sides(tokens, batch, mask_BK, config)
    # 1/2: the one label at which every loss and its gradient are finite.
    label_BK = jnp.where(mask_BK, batch.label_BK.astype(jnp.float32), 0.5)

    preference_BK = _preference_loss(first.log_ratio, second.log_ratio, label_BK, config)
    weight_BK = jnp.exp(first.log_weight + second.log_weight)
    if config.weighting != "none":
        preference_BK = weight_BK * preference_BK
    nll_BK = _nll(first, second, label_BK, config)
    total_BK = preference_BK
    if config.nll_coefficient is not None:
        total_BK = total_BK + config.nll_coefficient * nll_BK

    per_pair = {"loss/total": total_BK, "loss/preference": preference_BK, "loss/nll": nll_BK}
    per_pair |= _pair_metrics(first, second, label_BK, config)
    if config.weighting != "none":
        per_pair["pair/weight"] = weight_BK
    sums = {name: masked_sum(x, mask_BK) for name, x in per_pair.items()}
    sums["pair/equal"] = jnp.sum(equal_BK, dtype=jnp.float32)
    return sums["loss/total"], sums | {"count": jnp.sum(mask_BK, dtype=jnp.float32)}


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """Direct preference optimisation as `Algorithm(init, update)` on `Pairs`; see the module for the metrics.

    Raises ValueError on a config whose fields do not go together.
    """
    _check_config(config)

    def update(state: State, batch: Pairs, key: jax.Array):
        del key
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config),
            optimizer,
            state.params,
            state.opt_state,
            _with_pairs_per_prompt(batch),
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        # A number of pairs, but the step divides every sum by the count.
        metrics["pair/equal"] = metrics["pair/equal"] * jnp.maximum(metrics["batch/count"], 1.0)
        return State(params, opt_state, state.step + 1), metrics

    return Algorithm(partial(initial_state, optimizer=optimizer), update)


def check_pairs(batch: Pairs) -> None:
    """Looks at the values of a batch, once, on the host: raises ValueError naming the first that is wrong.

    Labels must lie in [0, 1] and indices in the G completions wherever the pair counts, the reference's
    log-probabilities must be finite and at most 0 at the tokens of these completions, and every completion of
    a pair that counts must have a token. (Shapes and dtypes are checked in `loss` itself.)
    """
    batch = jax.tree.map(np.asarray, _with_pairs_per_prompt(batch._replace(inputs=None)))
    samples = batch.completion_mask_BGC.shape[1]
    mask_BK = batch.mask_BK.astype(bool)
    inside_BK = (batch.label_BK >= 0) & (batch.label_BK <= 1)
    _refuse(mask_BK & ~inside_BK, "label_BK", batch.label_BK, "a probability in [0, 1]")
    rows_B1 = np.arange(len(mask_BK))[:, None]
    for name, index_BK in (("first", batch.first), ("second", batch.second)):
        valid_BK = (index_BK >= 0) & (index_BK < samples)
        _refuse(mask_BK & ~valid_BK, name, index_BK, f"an index below the {samples} completions")
        index_BK = np.where(mask_BK, index_BK, 0)
        token_BKC = batch.completion_mask_BGC[rows_B1, index_BK].astype(bool)
        length_BK = token_BKC.sum(axis=2)
        _refuse(mask_BK & (length_BK == 0), f"the length of {name}", length_BK, "at least one token")
        if batch.logp_ref_BGC is not None:
            logp_ref_BKC = batch.logp_ref_BGC[rows_B1, index_BK]
            counts_BKC = token_BKC & mask_BK[:, :, None]
            usable_BKC = np.isfinite(logp_ref_BKC) & (logp_ref_BKC <= 0)
            _refuse(
                counts_BKC & ~usable_BKC, f"logp_ref_BGC of {name}", logp_ref_BKC, "finite and at most 0 nats"
            )


def _refuse(wrong: ArrayLike, name: str, values: ArrayLike, wanted: str) -> None:
    if np.any(wrong):
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name} is {np.asarray(values)[place]} at prompt {place[0]}, pair {place[1]}; it must be {wanted}. "
            "Mend it, or mask the pair out"
        )


def _sides(tokens: TokenLogps, batch: Pairs, mask_BK: jax.Array, config: Config) -> tuple[_Side, _Side]:
    """Both completions of every pair, from log-probabilities of tokens."""
    indices = (batch.first, batch.second)
    masks = [_of_pairs(batch.completion_mask_BGC, index_BK) & mask_BK[:, :, None] for index_BK in indices]
    lengths = [jnp.sum(mask_BKC, axis=2, dtype=jnp.int32) for mask_BKC in masks]
    shared_BK = jnp.minimum(*lengths)

    def side(index_BK: jax.Array, mask_BKC: jax.Array, length_BK: jax.Array) -> _Side:
        # Replaced before any arithmetic: a NaN times the zero gradient of a masked token would be NaN.
        logp_BKC = jnp.where(mask_BKC, _of_pairs(tokens.logp, index_BK), 0.0)
        ratio_BKC = logp_BKC
        if batch.logp_ref_BGC is not None:
            # Token by token: the difference of two long sums would lose digits.
            ratio_BKC = logp_BKC - jnp.where(mask_BKC, _of_pairs(batch.logp_ref_BGC, index_BK), 0.0)
        if config.ld_alpha is not None:
            rank_BKC = jnp.cumsum(mask_BKC, axis=2, dtype=jnp.int32)
            ratio_BKC = jnp.where(rank_BKC > shared_BK[:, :, None], config.ld_alpha, 1.0) * ratio_BKC
        tokens_BK = jnp.maximum(length_BK, 1).astype(jnp.float32)
        log_ratio_BK = jnp.sum(ratio_BKC, axis=2)
        if config.length_normalised:
            log_ratio_BK = log_ratio_BK / tokens_BK
        log_weight_BKC = logp_BKC
        if tokens.log_collision is not None:
            log_weight_BKC -= jnp.where(mask_BKC, _of_pairs(tokens.log_collision, index_BK), 0.0)
        return _Side(
            log_ratio=log_ratio_BK,
            logp=jnp.sum(logp_BKC, axis=2),
            length=length_BK.astype(jnp.float32),
            log_weight=jax.lax.stop_gradient(jnp.sum(log_weight_BKC, axis=2) / tokens_BK),
        )

    first, second = (side(*of_side) for of_side in zip(indices, masks, lengths, strict=True))
    return first, second


def _of_pairs(x_BGC: jax.Array, index_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BGC, index_BK[:, :, None], axis=1)


def _preference_loss(
    log_ratio_first: jax.Array, log_ratio_second: jax.Array, label: jax.Array, config: Config
) -> jax.Array:
    label = smoothed_label(label, config.label_smoothing)
    if config.flip_rate is not None:
        label = debiased_label(label, config.flip_rate)
    margin = {} if config.margin is None else {"margin": config.margin}
    return LOSSES[config.loss](log_ratio_first, log_ratio_second, beta=config.beta, label=label, **margin)


def _nll(first: _Side, second: _Side, label_BK: jax.Array, config: Config) -> jax.Array:
    """Negative log-likelihood of the preferred completion, by the label as given, [B, K]."""
    nll = [
        -side.logp / jnp.maximum(side.length, 1) if config.nll_per_token else -side.logp
        for side in (first, second)
    ]
    return label_BK * nll[0] + (1.0 - label_BK) * nll[1]


def _pair_metrics(first: _Side, second: _Side, label_BK: jax.Array, config: Config) -> Sums:
    """Rewards, log-probabilities and lengths of the preferred completion and of the other, each [B, K]."""
    margin_BK = config.beta * (first.log_ratio - second.log_ratio)
    wins_BK = 0.5 * (1.0 + jnp.sign(margin_BK))

    def chosen(x_first, x_second):
        return label_BK * x_first + (1.0 - label_BK) * x_second

    metrics = {
        "pair/margin": (2.0 * label_BK - 1.0) * margin_BK,
        "pair/accuracy": chosen(wins_BK, 1.0 - wins_BK),
    }
    columns = {
        "reward": (config.beta * first.log_ratio, config.beta * second.log_ratio),
        "logp": (first.logp, second.logp),
        "length": (first.length, second.length),
    }
    for name, (x_first, x_second) in columns.items():
        metrics[f"{name}/chosen"] = chosen(x_first, x_second)
        metrics[f"{name}/rejected"] = chosen(x_second, x_first)
    return jax.lax.stop_gradient(metrics)


def _counting_pairs(batch: Pairs) -> tuple[jax.Array, jax.Array]:
    """Which pairs count, and which were left out of them for equal texts, both bool [B, K]."""
    mask_BK = batch.mask_BK.astype(bool)
    equal_BK = batch.first == batch.second
    if batch.equal_BK is not None:
        equal_BK |= batch.equal_BK.astype(bool)
    return mask_BK & ~equal_BK, mask_BK & equal_BK


def _token_logps(given, batch: Pairs, config: Config) -> TokenLogps:
    """What `evaluate` gave, in float32, with its shapes checked."""
    tokens = TokenLogps(*given) if isinstance(given, tuple) else TokenLogps(given)
    shape = batch.completion_mask_BGC.shape
    if tokens.logp.shape != shape:
        raise ValueError(
            f"evaluate gave logp of shape {tokens.logp.shape}; batch.completion_mask_BGC has shape {shape}"
        )
    if config.weighting != "aligned":
        return TokenLogps(tokens.logp.astype(jnp.float32))
    if tokens.log_collision is None or tokens.log_collision.shape != shape:
        raise ValueError(
            'weighting="aligned" needs evaluate to give TokenLogps(logp, log_collision), both of shape '
            f'{shape}; give them, or choose weighting="probability"'
        )
    return TokenLogps(tokens.logp.astype(jnp.float32), tokens.log_collision.astype(jnp.float32))


def _with_reference(batch: Pairs, config: Config) -> Pairs:
    """The batch with the reference's log-probabilities in float32, or without them where not asked for."""
    if config.reference_free:
        return batch._replace(logp_ref_BGC=None)
    logp_ref, shape = batch.logp_ref_BGC, batch.completion_mask_BGC.shape
    if logp_ref is None:
        raise ValueError(
            "batch.logp_ref_BGC is missing: give the reference's log-probabilities, or set reference_free"
        )
    if logp_ref.shape != shape or not jnp.issubdtype(logp_ref.dtype, jnp.floating):
        raise ValueError(
            f"batch.logp_ref_BGC must be float of the shape of completion_mask_BGC, {shape}; "
            f"got {logp_ref.dtype} of shape {logp_ref.shape}"
        )
    return batch._replace(logp_ref_BGC=logp_ref.astype(jnp.float32))


def _check_config(config: Config) -> None:
    """Raises ValueError where fields do not go together, or a number known by now is out of its range."""
    for name, given, choices in (
        ("loss", config.loss, tuple(LOSSES)),
        ("weighting", config.weighting, WEIGHTINGS),
    ):
        if given not in choices:
            raise ValueError(f"{name}={given!r} is unknown; choose among {', '.join(choices)}")
    for name, x in (("label_smoothing", config.label_smoothing), ("flip_rate", config.flip_rate)):
        if isinstance(x, int | float) and not 0 <= x < 0.5:
            raise ValueError(f"{name} must be in [0, 0.5), got {x}: beyond that labels say the opposite")
    if config.margin is not None and config.loss != "sigmoid":
        raise ValueError(f'margin belongs to loss="sigmoid" and not to {config.loss!r}; leave it None')
    if config.ld_alpha is not None and config.length_normalised:
        raise ValueError("ld_alpha and length_normalised are two cures of one bias; choose one")
    if config.loss == "orpo" and not (config.reference_free and config.length_normalised):
        raise ValueError(
            'loss="orpo" takes odds of mean log-probabilities: set reference_free and length_normalised'
        )
    if config.loss == "exo":
        if config.flip_rate is not None:
            raise ValueError(
                'loss="exo" is not linear in its label, so flip_rate cannot correct it; use None'
            )
        if isinstance(config.label_smoothing, int | float) and config.label_smoothing == 0:
            raise ValueError('loss="exo" is infinite on hard labels; set label_smoothing, to 1e-3 say')


def _with_pairs_per_prompt(batch: Pairs) -> Pairs:
    """Gives the indices the shape [B, K] of the labels, so that all arrays can be cut along the batch."""
    shape = batch.label_BK.shape
    if not jnp.issubdtype(batch.label_BK.dtype, jnp.floating):
        raise TypeError(
            f"batch.label_BK must be a float probability, got {batch.label_BK.dtype}: cast it to float32"
        )
    if len(shape) != 2 or batch.mask_BK.shape != shape:
        raise ValueError(f"label_BK {shape} and mask_BK {batch.mask_BK.shape} must have one shape [B, K]")
    if batch.equal_BK is not None and batch.equal_BK.shape != shape:
        raise ValueError(
            f"batch.equal_BK must have the shape of label_BK, {shape}, got {batch.equal_BK.shape}"
        )
    for name, index in (("first", batch.first), ("second", batch.second)):
        if index.shape not in (shape, shape[1:]):
            raise ValueError(f"batch.{name} must be [K] = {shape[1:]} or [B, K] = {shape}, got {index.shape}")
    tokens = batch.completion_mask_BGC.shape
    if len(tokens) != 3 or tokens[0] != shape[0]:
        raise ValueError(f"batch.completion_mask_BGC must be [B, G, C], B = {shape[0]}, got {tokens}")
    for name, dtype in (
        ("completion_mask_BGC", batch.completion_mask_BGC.dtype),
        ("mask_BK", batch.mask_BK.dtype),
    ):
        if jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"batch.{name} must be bool, got {dtype}: pass batch.{name} > 0")
    first, second = jnp.broadcast_to(batch.first, shape), jnp.broadcast_to(batch.second, shape)
    return batch._replace(
        first=first, second=second, completion_mask_BGC=batch.completion_mask_BGC.astype(bool)
    )
