"""Every setting of rlhfjax, as frozen dataclasses. This file imports no jax, so that `--help` answers at
once.

Each algorithm file imports its own as `Config`. A float field may be an array, also a traced one: a sweep is
a `vmap` over `dataclasses.replace(config, clip_low=...)`. Fields that shape the program (int, bool, None or
not) are static. Log-probabilities, KL divergences and entropies are in nats everywhere.
"""

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


@dataclass(frozen=True)
class Enumerable:
    """A language model of which every sequence can be listed (`rlhfjax.environments.enumerable`)."""

    vocab_size: int = 8
    """Tokens."""
    length: int = 3
    """Positions; without a stop token every sequence has so many."""
    stop_token: int | None = None
    """The token that ends a sequence early; None: there is none."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context a model was pretrained with."""

    kind: str = "none"
    """none; linear (arXiv 2306.15595); llama3 (Llama 3.1); yarn (arXiv 2309.00071); longrope (arXiv 2402.13753)."""
    factor: float = 1.0
    """Times the context is stretched."""
    original_positions: int = 0
    """Positions of the pretraining; llama3, yarn and longrope need it."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_positions / this are stretched whole."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_positions / this are left."""
    beta_fast: float = 32.0
    """yarn: turns over the original context above which a frequency is left."""
    beta_slow: float = 1.0
    """yarn: turns below which a frequency is stretched whole."""
    truncate: bool = True
    """yarn: whether the bounds of the blend are rounded to whole dimensions."""
    attention_factor: float | None = None
    """yarn and longrope: what cosine and sine are multiplied by; None: as the paper computes it from the factor."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency in contexts up to original_positions, one for two rotated dimensions."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same in longer contexts. A decoder whose max_positions exceeds original_positions uses these at
    every length, as its cache must hold one kind of keys; transformers switches with the length of the input."""


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
    norm_offset: bool = False
    """Whether a norm multiplies by 1 + its scale (Gemma), so that weight decay and zeros leave it alone."""
    post_norms: bool = False
    """Whether what attention and MLP give is normed too, before it is added (Gemma 2 and 3)."""
    qk_norm: bool = False
    """Whether queries and keys are normed, head by head, before they are rotated (Qwen 3, Gemma 3)."""
    parallel_blocks: bool = False
    """Whether attention and MLP of a block read the same input and are added together (GPT-NeoX)."""
    positions: str = "rotary"
    """rotary (arXiv 2104.09864) or learned."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_fraction: float = 1.0
    """Share of a head's dimensions that is rotated, the first ones (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary positions."""
    windows: tuple[int, ...] = ()
    """Of each layer the last tokens that a token sees, itself included; 0: all. Empty: every layer sees all."""
    window_rope_theta: float | None = None
    """Base of the wavelengths in layers with a window, which are not stretched then (Gemma 3); None: as the others."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: head_size ** -0.5."""
    attention_softcap: float | None = None
    """Scores x become cap * tanh(x / cap), before the mask (Gemma 2); None: they stay."""
    logit_softcap: float | None = None
    """The same of the logits over the vocabulary (Gemma 2)."""
    embedding_scale: float | None = None
    """What embedded tokens are multiplied by (Gemma: width ** 0.5, rounded to the compute type); None: 1."""
    gated_mlp: bool = True
    """Whether the MLP has a gate (SwiGLU, arXiv 2002.05202)."""
    activation: str = "silu"
    """silu, gelu (the tanh approximation), gelu_exact or relu."""
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
    """Compute type: float32 or bfloat16. Parameters are float32 unless they were loaded otherwise."""
    packing: float | None = None
    """Where prompts and completions are evaluated: pack them into so many times the tokens of full rows, for
    completions of ragged length; a batch that does not fit takes full rows. None: always full rows, which the samples
    of a prompt share."""
    attention: str = "auto"
    """xla; cudnn (fused; bfloat16 on an NVIDIA GPU); splash (fused; a TPU, untried there); or auto: cudnn where it
    serves, else xla."""
    remat: str = "none"
    """What the backward pass computes again to save memory: none; attention (its weights alone); dots (all but products
    with parameters); block (all but what enters a block, about a third more time). XLA's CPU backend undoes it."""


@dataclass(frozen=True)
class TabularQ:
    """Learning of action values in a table, one transition after the other."""

    method: str = "q_learning"
    """q_learning (Watkins 1989), sarsa, expected_sarsa (of the epsilon-greedy policy), double_q (van Hasselt
    2010: two tables) or q_lambda (eligibility traces)."""
    discount: float = 0.99
    """Worth of a reward one step later, in [0, 1]."""
    step_size: float = 0.5
    """What a value moves at its first visit, as a fraction of the error."""
    decay_power: float | None = None
    """Step size at visit n: step_size * (k / (k + n - 1)) ** decay_power, k = decay_visits. Every value converges
    with a power in (0.5, 1] (Robbins and Monro 1951). None: step_size for ever."""
    decay_visits: float = 1.0
    """k of that rule: visits until the decay sets in; horizon + 1, power 1 is that of arXiv 1807.03765."""
    epsilon: float = 0.1
    """expected_sarsa: share of uniformly random actions in the policy that is valued."""
    lam: float = 0.9
    """q_lambda: what is left of a trace after a step, apart from the discount; 0 is Q-learning."""
    cut_traces: bool = True
    """q_lambda: whether an exploring action ends all traces (Watkins 1989); else they run on (naive)."""
    replacing_traces: bool = True
    """q_lambda: whether a visit sets its trace to 1 or adds 1 to it."""


@dataclass(frozen=True)
class DQN:
    """Q-learning with a network, a target network and replay (Mnih et al. 2015) and its relatives."""

    discount: float = 0.99
    """Worth of a reward one step later, in [0, 1]."""
    bootstrap: str = "double"
    """Value of the next state: max, double (arXiv 1509.06461), sarsa (of the next action in the batch), expected
    (of the epsilon-greedy policy) or soft (temperature times log-sum-exp over it)."""
    epsilon: float = 0.05
    """expected: share of uniformly random actions in the policy that is valued."""
    temperature: float = 0.03
    """soft: reward per nat of the policy's entropy (arXiv 2007.14430 uses 0.03)."""
    munchausen: float | None = None
    """soft: share of temperature * log pi(action) added to the reward (arXiv 2007.14430: 0.9); None: none."""
    munchausen_clip: float = -1.0
    """Lower bound of temperature * log pi(action), in units of reward (arXiv 2007.14430: -1)."""
    quantiles: bool = False
    """Whether Q is a distribution, as equally likely values [B, A, N] (QR-DQN, arXiv 1710.10044)."""
    huber: float | None = 1.0
    """Errors above it count linearly, in units of reward; None: all are squared."""
    cql: float | None = None
    """Weight of log-sum-exp Q - Q(action), nats (CQL(H), arXiv 2006.04779); None: no such term."""
    target: str = "periodic"
    """How the target network follows: periodic (a copy, Mnih et al. 2015) or polyak (an average)."""
    period: int = 500
    """periodic: updates from one copy to the next."""
    polyak: float = 0.005
    """polyak: the fraction of the way that the target network goes at each update (arXiv 1509.02971)."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class PQN:
    """Q-learning on fresh rollouts of many environments, no target network, no replay (arXiv 2407.04811)."""

    discount: float = 0.99
    """Worth of a reward one step later, in [0, 1]."""
    lam: float = 0.65
    """Lambda of Peng's Q(lambda) returns: 0 one-step, 1 the rollout's rewards to its end."""
    huber: float | None = None
    """Errors above it count linearly, in units of reward; None: all are squared."""
    epochs: int = 4
    """Passes over one rollout."""
    minibatches: int = 4
    """Optimiser steps in one pass. Rows x time must be divisible by minibatches x microbatches x devices."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class MLP:
    """A small network for observations that are vectors (`rlhfjax.networks.mlp`)."""

    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    activation: str = "relu"
    """relu, tanh, silu or gelu."""
    layer_norm: bool = False
    """Normalise each hidden layer before its activation (arXiv 1607.06450); PQN depends on it."""
    dueling: bool = False
    """Q = V + advantage - mean advantage, from two heads (arXiv 1511.06581)."""
    output_scale: float = 1.0
    """Initial size of the last layer, relative to that of the others; small: values start near 0."""


@dataclass(frozen=True)
class ILQL:
    """Q-learning of a language model from recorded episodes (arXiv 2206.11871) and its plainer relatives."""

    bootstrap: str = "value"
    """What the Q loss bootstraps from: value (ILQL), sarsa, max (DQN) or returns (Monte Carlo: nothing)."""
    discount: float = 0.99
    """Worth of a reward one action later, in [0, 1]."""
    lam: float = 0.0
    """Lambda of sarsa's targets: 0 one-step, 1 the episode's rewards. The others do not read it."""
    expectile: float | None = 0.7
    """V is this expectile of Q over the data's actions: 0.5 their mean, towards 1 their best; None: no V."""
    cql_coefficient: float | None = 0.01
    """Weight of the cross-entropy of softmax(Q) and the data's actions; None: no such term."""
    polyak: float = 0.005
    """Share of the way to the trained network that the target network goes at every step, in (0, 1]."""
    policy_coefficient: float | None = 1.0
    """Weight of the policy's negative log-likelihood; None: no policy is trained."""
    advantage_beta: float | None = None
    """The policy clones actions weighted by exp(advantage_beta (Q - V)), per unit of reward; None: alike."""
    weight_clip: float | None = None
    """Largest of those weights; None: no bound."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class SoftQ:
    """Soft Q-learning by path consistency (arXiv 1702.08892, 2106.07704), with a KL to a reference."""

    beta: float = 0.1
    """Reward lost per nat of log(policy / reference), above 0."""
    discount: float = 1.0
    """Worth of a reward one action later, in [0, 1]; 1 for text: the optimum in closed form has it."""
    steps: tuple[int, ...] = (1,)
    """Lengths of the paths in actions; the loss is the mean over them. 0: to the end of the episode."""
    gradient: str = "start"
    """start (the value at the path's end is a target, as in Q-learning) or both (path consistency)."""
    polyak: float | None = 0.005
    """Share of the way to the policy that the target network goes at every step, in (0, 1]; None: no target
    network, the policy's own value without a gradient. Not read by gradient "both" and paths to the end."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added before one optimiser step: less memory, same step."""


@dataclass(frozen=True)
class ControlPPO:
    """PPO that acts in many worlds (`rlhfjax.recipes.control`). The defaults solve CartPole."""

    environment_steps: int = 500_000
    """Length of the run in steps of all worlds together; the optimiser's step size decays over it."""
    worlds: int = 4
    """Worlds that are acted in at once."""
    steps: int = 128
    """Steps in each of them from one update to the next."""
    network: MLP = MLP(hidden=(64, 64), activation="tanh", output_scale=0.01)
    """Of the policy; the critic has one of its own of the same size."""
    optimizer: Optimizer = Optimizer(learning_rate=2.5e-3, max_grad_norm=0.5)
    """Takes epochs x minibatches steps at each update."""
    algorithm: PPO = PPO(
        kl_coefficient=0.0,
        discount=0.99,
        lam=0.95,
        value_coefficient=0.5,
        entropy_coefficient=0.01,
        epochs=4,
        minibatches=4,
    )
    """worlds x steps must be divisible by minibatches x microbatches x devices."""


@dataclass(frozen=True)
class ControlPQN:
    """PQN that acts in many worlds (`rlhfjax.recipes.control`). The defaults solve CartPole."""

    environment_steps: int = 100_000
    """Length of the run in steps of all worlds together; the optimiser's step size decays over it."""
    worlds: int = 16
    """Worlds that are acted in at once."""
    steps: int = 32
    """Steps in each of them from one update to the next."""
    epsilon_start: float = 1.0
    """Share of uniformly random actions at the first step, in [0, 1]."""
    epsilon_end: float = 0.2
    """That share after the fall, in [0, 1]."""
    epsilon_fraction: float = 0.2
    """Part of the run, above 0, over which the share falls linearly."""
    network: MLP = MLP(hidden=(64, 64), layer_norm=True)
    """Of the action values."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, max_grad_norm=10.0)
    """Takes epochs x minibatches steps at each update."""
    algorithm: PQN = PQN(discount=0.99, lam=0.95, epochs=4, minibatches=4)
    """worlds x steps must be divisible by minibatches x microbatches x devices."""


@dataclass(frozen=True)
class ControlDQN:
    """DQN that acts in many worlds and learns from replay (`rlhfjax.recipes.control`). The defaults solve CartPole."""

    environment_steps: int = 200_000
    """Length of the run in steps of all worlds together; the optimiser's step size decays over it."""
    worlds: int = 8
    """Worlds that are acted in at once."""
    steps: int = 4
    """Steps in each of them from one round of updates to the next."""
    updates: int = 4
    """Updates in a round."""
    batch: int = 128
    """Transitions of one update."""
    capacity: int = 50_000
    """Transitions that the replay holds, a multiple of worlds; the oldest make room."""
    learning_starts: int = 1_000
    """Transitions that the replay holds before the first update; at least a batch."""
    n_step: int = 1
    """Rewards that a target sums up before it bootstraps, fewer where the episode ends (arXiv 1710.02298)."""
    quantiles: int = 32
    """Numbers of a distribution over returns; read if `algorithm.quantiles` only."""
    prioritised: bool = False
    """Whether transitions with large errors are drawn more often (arXiv 1511.05952)."""
    alpha: float = 0.6
    """prioritised: power of the error in that probability; 0 is uniform."""
    beta: float = 0.4
    """prioritised: power of the importance weights at the first step; it rises linearly to 1 over the run."""
    epsilon_start: float = 1.0
    """Share of uniformly random actions at the first step, in [0, 1]."""
    epsilon_end: float = 0.05
    """That share after the fall, in [0, 1]."""
    epsilon_fraction: float = 0.3
    """Part of the run, above 0, over which the share falls linearly."""
    network: MLP = MLP(hidden=(64, 64), dueling=True)
    """Of the action values."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, max_grad_norm=10.0)
    """Takes one step at each update."""
    algorithm: DQN = DQN(bootstrap="double", period=50, huber=None)
    """Its discount is that of one step, whatever n_step."""


@dataclass(frozen=True)
class ControlTabular:
    """Learning of a table in worlds of numbered states (`rlhfjax.recipes.tabular`). The defaults solve FrozenLake."""

    environment_steps: int = 500_000
    """Length of the run in steps of all worlds together."""
    worlds: int = 16
    """Worlds that are acted in at once; q_lambda takes one, since its traces follow one walk."""
    steps: int = 25
    """Steps in each of them from one update to the next, chosen by the same table; 1 is the textbook's loop."""
    epsilon_start: float = 1.0
    """Share of uniformly random actions at the first step, in [0, 1]."""
    epsilon_end: float = 0.0
    """That share after the fall, in [0, 1]. sarsa and expected_sarsa value the policy that has it: 0 is the optimum."""
    epsilon_fraction: float = 0.4
    """Part of the run, above 0, over which the share falls linearly."""
    exploring_starts: bool = True
    """Whether episodes start in any state with any action, all alike, not as the world has them start."""
    initial_value: float = 0.0
    """Of every action in every state, in units of reward."""
    algorithm: TabularQ = TabularQ(step_size=1.0, decay_power=0.7, decay_visits=10.0)
    """Its epsilon is not read: that of the actions taken is in its place."""
