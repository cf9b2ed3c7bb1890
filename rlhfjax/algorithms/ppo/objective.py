"""PPO's loss: clipped policy and value losses, and on request entropy, KL and pretraining text."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import sft
from rlhfjax.algorithms.algorithm import Evaluation, PyTree, Sums, estimate_kl
from rlhfjax.algorithms.ppo.batch import Sample
from rlhfjax.config import PPO as Config
from rlhfjax.ops import clipped_surrogate, clipped_value_loss, k3, masked_sum

# (params, inputs) -> Evaluation or (logp, entropy, value), each shaped as the actions
Evaluate = Callable[[PyTree, PyTree], Evaluation | tuple[jax.Array, jax.Array, jax.Array]]


def loss(
    params: PyTree,
    batch: Sample,
    *,
    evaluate: Evaluate,
    config: Config,
    evaluate_ptx: sft.Evaluate | None = None,
) -> tuple[jax.Array, Sums]:
    """Summed losses over the actions that count, and sums for the metrics.

        clipped surrogate + value_coefficient * value loss      (arXiv 1707.06347 eq. 7 and 9)
        - entropy_coefficient * entropy
        + kl_coefficient * KL estimate                          with kl_placement="loss"
        + ptx_coefficient * sum(weight * -logp of the text)     (arXiv 2203.02155 eq. 2) with ptx_coefficient

    Divided by "count", the number of actions, all are means, the last one too if the weights of `batch.ptx` sum
    to that number. `evaluate_ptx(params, inputs)` gives the text's logp, shaped as its weights.
    """
    logp, entropy, value, kl = _evaluated(evaluate(params, batch.inputs), batch, config)
    policy_loss, policy_clipped = clipped_surrogate(
        logp,
        batch.logp,
        batch.advantage,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    value_loss, value_clipped = clipped_value_loss(value, batch.value, batch.returns, clip=config.value_clip)
    total = policy_loss + config.value_coefficient * value_loss
    if config.entropy_coefficient is not None:
        total = total - config.entropy_coefficient * entropy

    per_action = {"loss/policy": policy_loss, "loss/value": value_loss}
    if kl is not None:
        total = total + config.kl_coefficient * kl
        per_action["loss/kl"] = kl
    per_action |= _policy_metrics(logp, entropy, batch, config)
    per_action |= {"policy/clip_fraction": policy_clipped, "value/clip_fraction": value_clipped}
    sums = {name: masked_sum(x, batch.mask) for name, x in ({"loss/total": total} | per_action).items()}
    log_ratio = jax.lax.stop_gradient(logp) - batch.logp
    sums["policy/ratio_max"] = jnp.max(jnp.where(batch.mask, jnp.exp(log_ratio), 0.0))
    sums["policy/logp_gap_max"] = jnp.max(jnp.abs(log_ratio))
    if config.ptx_coefficient is not None:
        sums["loss/ptx"] = _ptx_loss(params, batch, evaluate_ptx)
        sums["loss/total"] = sums["loss/total"] + config.ptx_coefficient * sums["loss/ptx"]
    return sums["loss/total"], sums | {"count": jnp.sum(batch.mask, dtype=jnp.float32)}


def _evaluated(evaluation, batch: Sample, config: Config):
    """logp, entropy, value and, if the loss has one, the KL estimate: float32, zeros where masked."""
    evaluation = Evaluation(*evaluation)
    in_loss = config.kl_placement == "loss"
    exact = in_loss and config.kl_estimator == "exact"

    def at_actions(name: str, why: str) -> jax.Array:
        x = getattr(evaluation, name)
        if x is None:
            raise ValueError(f"evaluate gave no {name}: {why}")
        if x.shape != batch.mask.shape:
            raise ValueError(
                f"evaluate gave {name} of shape {x.shape}; the actions have shape {batch.mask.shape}"
            )
        # Replaced before any arithmetic: a NaN times the zero gradient of a masked action would be NaN.
        return jnp.where(batch.mask, x.astype(jnp.float32), 0.0)

    logp, entropy = at_actions("logp", "PPO needs it"), at_actions("entropy", "PPO needs it")
    value = at_actions("value", "PPO needs a critic; without one, take `grpo`")
    if not in_loss:
        return logp, entropy, value, None
    kl = (
        at_actions("kl", 'kl_estimator="exact" needs KL(policy || reference) at every action')
        if exact
        else None
    )
    return logp, entropy, value, estimate_kl(config.kl_estimator, logp, batch.logp_ref, kl)


def _policy_metrics(logp, entropy, batch: Sample, config: Config) -> dict[str, jax.Array]:
    """Per action, without a gradient."""
    logp, entropy = jax.lax.stop_gradient((logp, entropy))
    ratio = jnp.exp(logp - batch.logp)
    metrics = {
        "policy/entropy": entropy,
        "policy/approximate_kl": k3(batch.logp, logp),
        "policy/ratio_mean": ratio,
    }
    if config.dual_clip is not None:
        metrics["policy/dual_clip_fraction"] = (batch.advantage < 0) & (ratio > config.dual_clip)
    return metrics


def _ptx_loss(params: PyTree, batch: Sample, evaluate_ptx: sft.Evaluate | None) -> jax.Array:
    """Weighted negative log-likelihood of the pretraining text, summed."""
    if evaluate_ptx is None or batch.ptx is None:
        missing = "evaluate_ptx" if evaluate_ptx is None else "rollout.ptx"
        raise ValueError(
            f"ptx_coefficient is set, but {missing} is None; give it, or set ptx_coefficient=None"
        )
    return sft.loss(params, batch.ptx, evaluate=evaluate_ptx, config=sft.Config())[0]
