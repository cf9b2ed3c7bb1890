"""Settings of the experiment on over-optimisation. No jax here, so that `--help` answers at once."""

from dataclasses import dataclass, field

from rlhfjax.config import Enumerable

POWERS = tuple(2**k for k in range(13))


@dataclass(frozen=True)
class Toy:
    """A language model that can be enumerated, with proxies that are wrong on purpose."""

    model: Enumerable = field(default_factory=lambda: Enumerable(vocab_size=8, length=5))
    """The language model; its sequences are listed."""
    evenness: float = 0.3
    """Standard deviation of the reference's logits."""
    kinds: tuple[str, ...] = ("noise", "outliers", "spurious", "length")
    """What is wrong with the proxy: a curve and a figure for each."""
    error: float = 1.5
    """Size of the proxy's error, in standard deviations of quality."""
    cost: float = 0.5
    """What a habit costs in gold one standard deviation above its mean, in those of quality; its square further up."""
    best_of: tuple[int, ...] = POWERS
    """Numbers of samples of best-of-n."""
    betas: tuple[float, ...] = (8.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.8, 0.65, 0.5, 0.4, 0.32, 0.25)
    """Reward per nat of KL, in standard deviations of the proxy: points of the RL optimum."""
    trained: tuple[str, ...] = ("ppo", "rloo")
    """Methods that are trained, to be held against the optimum: ppo, rloo."""
    trained_betas: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25)
    """Reward per nat of the runs that are trained."""
    steps: int = 1000
    """Updates of a run."""
    prompts: int = 64
    """Groups of samples of an update."""
    samples: int = 8
    """Samples of a group."""
    learning_rate: float = 0.1
    """Peak step size of the table, falling to 0."""


@dataclass(frozen=True)
class Curves:
    """Over-optimisation on text: what is measured of best-of-n and of RL."""

    prompts: int = 256
    """Prompts of the validation split, the same for every point."""
    samples: int = 64
    """Completions of each, from which best-of-n is estimated for every n at once."""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of samples of best-of-n, at most `samples`."""
    betas: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2)
    """Reward per nat of KL: RL is run from the same start with each."""
    ensemble: int = 1
    """Reward models, from the same labels in other orders and with other heads; their mean is the reward."""
    penalty: float = 0.0
    """Standard deviations over the ensemble that are taken off its mean (arXiv 2310.02743 takes the variance)."""
