"""Settings of TD and Q-learning, from a table to a language model."""

from dataclasses import dataclass


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
