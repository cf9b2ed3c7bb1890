"""Every setting of rlhfjax, as frozen dataclasses. This file imports no jax, so that `--help` answers at
once.

Each algorithm file imports its own as `Config`. A float field may be an array, also a traced one: a sweep is
a `vmap` over `dataclasses.replace(config, clip_low=...)`. Fields that shape the program (int, bool, None or
not) are static. Log-probabilities, KL divergences and entropies are in nats everywhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """AdamW with clipped gradient norm, linear warm-up and decay; on request Muon for the hidden matrices."""

    learning_rate: float = 1e-3
    """Peak step size of Adam."""
    warmup_steps: int = 0
    """Optimiser steps in which the step size rises linearly to its peak, starting above 0."""
    final_fraction: float = 0.0
    """Step size after the last step, as a fraction of the peak; linear decay in between (1.0: no decay)."""
    b1: float = 0.9
    """Adam's decay of the mean gradient, per step (arXiv 1412.6980)."""
    b2: float = 0.999
    """Adam's decay of the mean squared gradient, per step (arXiv 1412.6980)."""
    eps: float = 1e-5
    """Adam's term in the denominator; 1e-5 as in RLHF with PPO (Ziegler et al. 2019; arXiv 2403.17031)."""
    weight_decay: float = 0.0
    """Decoupled decay (arXiv 1711.05101), per unit of step size; for matrices, not for norms and biases."""
    max_grad_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; None: never."""
    muon: bool = False
    """Orthogonalised momentum (Jordan 2024) for hidden matrices; embeddings, heads, vectors keep Adam."""
    muon_learning_rate: float = 0.02
    """Peak step size of Muon, whose updates have singular values near 1. Same warm-up and decay."""


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: weighted negative log-likelihood."""

    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class RewardModel:
    """A scalar reward learnt from pairwise preferences (Bradley-Terry)."""

    centring: float = 0.0
    """Weight of (score_first + score_second)^2, which holds scores near 0 (arXiv 2312.09244 uses 0.01)."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation (arXiv 1707.06347), KL penalty in the reward (Ziegler et al. 2019)."""

    kl_coefficient: float = 0.05
    """Reward lost per nat of log(policy / reference), at every action (arXiv 2403.17031 uses 0.05)."""
    kl_target: float | None = None
    """KL per sequence, in nats, that the adaptive controller steers to; None: kl_coefficient stays fixed."""
    kl_horizon: float = 10_000.0
    """Sequences over which the adaptive controller reacts; larger is slower (Ziegler et al. 2019, 2.2)."""
    discount: float = 1.0
    """Worth of a reward one action later; 1 for text."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation: 0 one-step, 1 Monte Carlo (arXiv 1506.02438)."""
    clip_low: float = 0.2
    """The probability ratio gains nothing below 1 - clip_low (arXiv 1707.06347, eq. 7)."""
    clip_high: float = 0.2
    """The probability ratio gains nothing above 1 + clip_high (arXiv 2503.14476 uses 0.28)."""
    value_clip: float = 0.2
    """The value may move this far from its value at the rollout, in units of reward; inf: no clip."""
    value_coefficient: float = 0.1
    """Weight of the value loss (Ziegler et al. 2019: 0.1)."""
    entropy_coefficient: float | None = None
    """Reward per nat of entropy at every action; None: no bonus, and no gradient of the entropy."""
    epochs: int = 4
    """Passes over one rollout (Ziegler et al. 2019: 4)."""
    minibatches: int = 1
    """Optimiser steps in one pass. The batch must be divisible by minibatches x microbatches x devices."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are added before one optimiser step: less memory, same step."""
    whiten_rewards: bool = False
    """Divides rewards by their standard deviation over the global batch, keeping their mean."""
    whiten_advantages: bool = True
    """Gives advantages mean 0 and standard deviation 1 over the global batch."""


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model. The defaults are a small Llama."""

    vocab_size: int = 2048
    """Tokens, special ones included."""
    width: int = 128
    """Size of the residual stream."""
    layers: int = 4
    """Blocks of attention and MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key-value heads: equal to heads is multi-head, 1 is multi-query (arXiv 2305.13245)."""
    head_size: int = 32
    """Size of one head."""
    mlp_width: int = 384
    """Hidden size of the MLP."""
    max_positions: int = 512
    """Longest sequence, prompt and completion together."""
    norm: str = "rmsnorm"
    """rmsnorm (arXiv 1910.07467) or layernorm."""
    norm_epsilon: float = 1e-5
    """Added to the variance in the norms."""
    positions: str = "rotary"
    """rotary (arXiv 2104.09864) or learned."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    gated_mlp: bool = True
    """Whether the MLP has a gate (SwiGLU, arXiv 2002.05202)."""
    activation: str = "silu"
    """silu or gelu (the tanh approximation)."""
    tie_embeddings: bool = True
    """Whether input and output share one embedding."""
    attention_bias: bool = False
    """Biases on query, key and value."""
    output_bias: bool = False
    """A bias on attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    embedding_stddev: float = 0.02
    """Deviation of the embeddings' initialisation."""
    dtype: str = "float32"
    """Compute type: float32 or bfloat16. Parameters are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""
