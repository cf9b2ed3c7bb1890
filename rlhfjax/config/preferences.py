"""Settings of control from preferences (`rlhfjax.recipes.control.preferences`)."""

from dataclasses import dataclass

from rlhfjax.config.control import ControlPPO
from rlhfjax.config.networks import MLP
from rlhfjax.config.training import Optimizer


@dataclass(frozen=True)
class Labeller:
    """Who compares two segments, made of their true returns R: "the first", "the second", or "they are equal"."""

    temperature: float = 0.0
    """Units of return: "the first" with probability sigmoid((R_first - R_second) / temperature); 0: the larger one."""
    tie: float = 0.0
    """Returns that differ by no more than this are called equal; below 0: never."""
    random: float = 0.0
    """Share of the answers, in [0, 1], that are "the first" or "the second" by the toss of a coin."""


@dataclass(frozen=True)
class SegmentReward:
    """An ensemble of rewards r(s, a) learnt from compared segments (arXiv 1706.03741, section 2.2)."""

    members: int = 3
    """Networks, each with a bootstrap sample of the labels of its own."""
    network: MLP = MLP(hidden=(32, 32), activation="tanh")
    """Of each member: the rewards of all actions in a state."""
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, schedule="constant")
    """Takes `updates` steps a round, for each member its own."""
    updates: int = 20
    """Gradient steps a round."""
    batch: int = 32
    """Labelled pairs of one gradient step."""
    error: float = 0.1
    """Share of the labels, in [0, 1), that the model of the labeller takes to be drawn at random; 0.1 in the paper."""
    l2: float = 1e-4
    """Coefficient of the squares of the kernels in the loss, at the start; 0: none, and then it stays so."""
    l2_factor: float = 1.2
    """What that coefficient is multiplied by (divided by) after a round that overfits too much (too little), >= 1."""
    overfit_low: float = 1.1
    """Held-out loss over training loss below which a round overfits too little; 1.1 in the paper."""
    overfit_high: float = 1.5
    """That ratio above which it overfits too much; 1.5 in the paper."""
    centred: bool = False
    """True: rewards are brought to mean 0 and deviation 1, as in the paper, for worlds without ends. False: to mean
    square 1, which keeps their zero: where episodes end, it says whether to live on is worth anything."""


@dataclass(frozen=True)
class ControlPreferences:
    """PPO on a reward learnt from compared segments (arXiv 1706.03741). One round: queries, labels, the reward is
    fitted, and PPO makes `iterations` updates on it."""

    ppo: ControlPPO = ControlPPO(
        environment_steps=60_000,
        worlds=8,
        steps=64,
        network=MLP(hidden=(32, 32), activation="tanh", output_scale=0.01),
    )
    """Acts and learns; its `steps` are those that segments are cut from."""
    iterations: int = 4
    """Updates of PPO, each after a rollout, from one fit of the reward to the next."""
    segment: int = 25
    """Steps of a segment, at most `ppo.steps`; one that terminates before is shorter."""
    labels: int = 400
    """Pairs that are labelled in the whole run. May be traced where `capacity` is given."""
    capacity: int | None = None
    """Labels that there is room for; None: `labels`."""
    initial_share: float = 0.25
    """Share of the labels that is due in the first round; the rate falls from then on to the half at the end."""
    queries: int = 64
    """Pairs that are labelled in one round at most; what is due beyond that waits for the next."""
    candidates: int = 256
    """Pairs of segments that the ensemble's disagreement chooses the queries from."""
    random_queries: float = 0.0
    """Probability, in [0, 1], that a query is a random pair and not the one that is disagreed on most."""
    reward: SegmentReward = SegmentReward()
    labeller: Labeller = Labeller()
