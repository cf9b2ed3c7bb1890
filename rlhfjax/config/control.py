"""Settings of whole training runs in worlds (`rlhfjax.recipes.control` and `.tabular`)."""

from dataclasses import dataclass

from rlhfjax.config.networks import MLP
from rlhfjax.config.policies import PPO
from rlhfjax.config.training import Optimizer
from rlhfjax.config.values import DQN, PQN, TabularQ


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
