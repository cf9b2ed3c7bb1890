"""Settings of policy optimisation, from rewards and from preferences."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation (arXiv 1707.06347), KL penalty in the reward (Ziegler et al. 2019)."""

    kl_coefficient: float = 0.05
    """Reward lost per nat of log(policy / reference), at every action (arXiv 2403.17031 uses 0.05)."""
    kl_target: float | None = None
    """KL per sequence, in nats, that the adaptive controller steers to; None: kl_coefficient stays fixed."""
    kl_horizon: float = 10_000.0
    """Sequences over which the adaptive controller reacts; larger is slower (Ziegler et al. 2019, 2.2)."""
    kl_placement: str = "reward"
    """reward: taken off it, before whitening; loss: added to it, per unit of the (whitened) advantage."""
    kl_estimator: str = "k1"
    """k1, k2, k3 or exact (over the whole vocabulary); k1 not in the loss, where its gradient has mean zero."""
    discount: float = 1.0
    """Worth of a reward one action later; 1 for text."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation: 0 one-step, 1 Monte Carlo (arXiv 1506.02438)."""
    critic_lam: float | None = None
    """Lambda of the critic's target alone (arXiv 2503.01491 uses 1.0); None: lam."""
    clip_low: float = 0.2
    """The probability ratio gains nothing below 1 - clip_low (arXiv 1707.06347, eq. 7)."""
    clip_high: float = 0.2
    """The probability ratio gains nothing above 1 + clip_high (arXiv 2503.14476 uses 0.28)."""
    dual_clip: float | None = None
    """With a negative advantage, no gradient above this ratio (arXiv 1912.09729 uses 3); None: no bound."""
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
    reward_clip: float | None = None
    """Rewards are clipped to [-reward_clip, reward_clip], before the KL penalty; None: never."""
    advantage_clip: float | None = None
    """Advantages are clipped to [-advantage_clip, advantage_clip], after whitening; None: never."""
    critic_warmup: int = 0
    """Updates, at the start, in which only the critic learns and the policy is held (arXiv 2503.01491)."""
    ptx_coefficient: float | None = None
    """Weight of the nats per token of pretraining text (arXiv 2203.02155 eq. 2); None: no such text."""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation on pairs (arXiv 2305.18290) and its relatives."""

    loss: str = "sigmoid"
    """sigmoid (DPO; with other fields SimPO, CPO), hinge (arXiv 2305.10425), ipo (2310.12036), exo
    (2402.00856), nca (2402.05369), apo_zero, apo_down (2408.06266), sppo (2405.00675), orpo (2403.07691)."""
    beta: float = 0.1
    """Reward per nat of log(policy / reference); ipo: the paper's tau, orpo: weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong, in [0, 0.5): conservative DPO; exo needs more than 0."""
    flip_rate: float | None = None
    """Probability in [0, 0.5) that a label is wrong, corrected without bias (robust DPO, 2403.00409)."""
    reference_free: bool = False
    """Whether log-probabilities stand in for log-ratios (SimPO, CPO, ORPO): no reference is needed."""
    length_normalised: bool = False
    """Whether log-ratios are means over tokens (SimPO, ORPO) and not sums."""
    margin: float | None = None
    """Lead in reward asked of the preferred completion, loss sigmoid only (SimPO's gamma, 2405.14734)."""
    nll_coefficient: float | None = None
    """Weight of the preferred completion's negative log-likelihood; None: no such term (CPO, ORPO: 1)."""
    nll_per_token: bool = True
    """Whether that likelihood is the mean over tokens (ORPO) or their sum (CPO, 2401.08417)."""
    ld_alpha: float | None = None
    """Weight in [0, 1] of tokens past the shorter completion's length (LD-DPO, 2409.06411); None: 1."""
    weighting: str = "none"
    """Weight of a pair from its completions' length-normalised probability under the policy (WPO,
    2406.11827): none, probability, or aligned, which divides it by that of the policy's own samples."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class KTO:
    """Preferences without pairs: completions judged good or bad one by one (KTO, BCO)."""

    loss: str = "kto"
    """kto (arXiv 2402.01306) or bco (2404.04656)."""
    beta: float = 0.1
    """Reward per nat of log(policy / reference)."""
    reference_point: str = "mismatched"
    """kto: mismatched (KL from completions of other prompts) or zero (unpaired APO-zero, 2408.06266)."""
    desirable_weight: float = 1.0
    """kto: weight of good completions (lambda_D of the paper)."""
    undesirable_weight: float = 1.0
    """kto: weight of bad completions (lambda_U of the paper)."""
    shift_decay: float = 0.9
    """bco: what remains of the reward shift's moving average at an update, in [0, 1)."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class GRPO:
    """Critic-free policy optimisation on groups of samples. The defaults are GRPO's (arXiv 2402.03300).

    Each published method is a choice of advantage (`baseline`, `scale`, `whiten`), `ratio`, `clip`,
    `aggregation` and place of the KL; `rlhfjax.algorithms.grpo` lists them.
    """

    baseline: str = "group_mean"
    """Taken off the reward: group_mean, leave_one_out, batch_mean, moving, none or given (by the batch)."""
    baseline_decay: float = 0.9
    """Weight of the past in the moving baseline, per update."""
    scale: str = "group_std"
    """Divides what the baseline left: group_std, batch_std (of the rewards) or none (arXiv 2503.20783)."""
    epsilon: float = 1e-4
    """Added to the standard deviation of `scale`, in units of reward."""
    whiten: str = "none"
    """Gives advantages mean 0 and deviation 1 over the global batch: none, samples (each counts once; arXiv
    2601.05242) or actions (each counts once, after the KL was taken off; arXiv 2501.03262)."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward where there are several; empty: 1 each."""
    separate_rewards: bool = False
    """Several rewards get baseline and scale each on its own, before they are added (arXiv 2601.05242)."""
    drop_equal_groups: bool = False
    """Leaves out groups whose rewards are all equal, as dynamic sampling does (arXiv 2503.14476, 3.2)."""
    ratio: str = "token"
    """Level of the probability ratio: token, sequence (length-normalised: GSPO, arXiv 2507.18071) or
    sequence_token (its value is the sequence's, its gradient each token's own: GSPO-token)."""
    clip: str = "surrogate"
    """surrogate (PPO's), cispo (detached clipped ratio times logp, arXiv 2506.13585) or none (ratio)."""
    clip_low: float = 0.2
    """The ratio is bounded below by 1 - clip_low (arXiv 2402.03300); 1 and more: not bounded below."""
    clip_high: float = 0.2
    """The ratio is bounded above by 1 + clip_high (arXiv 2503.14476 uses 0.28)."""
    dual_clip: float | None = None
    """Where the advantage is negative, the loss is at most this many times its size (arXiv 1912.09729: 3);
    None: no such bound. Above 1; for the surrogate only."""
    aggregation: str = "sequence"
    """How actions are averaged: token (every action alike, arXiv 2503.14476), sequence (every sequence
    alike) or constant (sums over actions divided by length_constant, arXiv 2503.20783)."""
    length_constant: float | None = None
    """Divisor of aggregation "constant": best the most actions that a sequence may have."""
    kl_coefficient: float | None = 0.04
    """Reward lost per nat of KL(policy || reference); None: no KL, and no reference is needed."""
    kl_placement: str = "loss"
    """loss (a term of it), reward (each action's, with all that follow it) or score (the sum over the
    sequence is taken off its reward, before the baseline: arXiv 2402.14740)."""
    kl_estimator: str = "k3"
    """k1, k2, k3 or exact (over the whole vocabulary). k1 in the loss is refused: its gradient is 0."""
    entropy_coefficient: float | None = None
    """Reward per nat of entropy at every action; None: no bonus, and no gradient of the entropy."""
    epochs: int = 1
    """Passes over one rollout."""
    minibatches: int = 1
    """Optimiser steps in one pass. The prompts must be divisible by minibatches x microbatches x devices."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are added before one optimiser step: less memory, same step."""
