"""Settings of what trains: the optimiser, adapters, and learning from data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """A first-order optimiser: clipped gradient norm, a step size that warms up and falls, decoupled weight decay."""

    kind: str = "adamw"
    """adamw (arXiv 1711.05101); muon (hidden matrices by orthogonalised momentum, Jordan 2024; embeddings, heads and
    vectors by adamw); adafactor (arXiv 1804.04235: second moments by row and column, no momentum); schedule_free
    (AdamW with averaging in place of decay, arXiv 2405.15682; needs schedule "constant", and `evaluation_params` to
    evaluate); sgd (with momentum b1)."""
    learning_rate: float = 1e-3
    """Peak step size of all but Muon."""
    schedule: str = "linear"
    """After the warm-up: linear (to final_fraction), cosine (to final_fraction), constant, inverse_sqrt (of the step;
    arXiv 1706.03762) or wsd (constant, then linear to final_fraction over decay_fraction; arXiv 2404.06395)."""
    warmup_steps: int = 0
    """Optimiser steps in which the step size rises linearly to its peak, starting above 0."""
    final_fraction: float = 0.0
    """Step size after the last step, as a fraction of the peak (1.0: no decay). For linear, cosine and wsd."""
    decay_fraction: float = 0.1
    """wsd: share of the steps after the warm-up, the last ones, in which the step size falls; in (0, 1]."""
    b1: float = 0.9
    """Adam's decay of the mean gradient, per step (arXiv 1412.6980); sgd's momentum; schedule_free's share of the
    average in the parameters that gradients are taken at, above 0. adafactor does not read it."""
    b2: float = 0.999
    """Adam's decay of the mean squared gradient, per step (arXiv 1412.6980)."""
    eps: float = 1e-5
    """Adam's term in the denominator; 1e-5 as in RLHF with PPO (Ziegler et al. 2019; arXiv 2403.17031)."""
    weight_decay: float = 0.0
    """Decoupled decay (arXiv 1711.05101), per unit of step size; for matrices, not for norms and biases. LoRA's are
    matrices too: their decay draws the policy back to its base."""
    max_grad_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; None: never."""
    muon_learning_rate: float = 0.02
    """Peak step size of Muon, whose updates have singular values near 1. Same warm-up and decay."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on a frozen base (arXiv 2106.09685). No dropout: it would make the policy that samples another
    than the policy that is trained, and every probability ratio noise."""

    rank: int = 16
    """Columns of a, rows of b: an adapter adds (inputs + outputs) x rank parameters to a projection."""
    alpha: float = 32.0
    """The product is multiplied by alpha / rank."""
    projections: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")
    """Which of them are adapted, in every layer; a name that a decoder does not have (up, of a plain MLP) adds none."""
    rank_stabilised: bool = False
    """Multiplied by alpha / sqrt(rank) instead, so that high ranks still learn (rsLoRA, arXiv 2312.03732)."""


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: weighted negative log-likelihood."""

    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class RewardModel:
    """A reward learnt from pairs (Bradley-Terry), rankings (Plackett-Luce) or the labels of steps."""

    centring: float = 0.0
    """Weight of (score_first + score_second)^2, which holds scores near 0 (arXiv 2312.09244 uses 0.01). Of a
    choice among several: of the square of twice their mean; of a step: of the square of its score."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong: a pair or a step the other way round, a choice any of the others."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""
