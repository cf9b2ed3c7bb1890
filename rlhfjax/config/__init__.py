"""Every setting of rlhfjax, as frozen dataclasses. Nothing here imports jax, so that `--help` answers at
once.

Each algorithm file imports its own as `Config`. A float field may be an array, also a traced one: a sweep is
a `vmap` over `dataclasses.replace(config, clip_low=...)`. Fields that shape the program (int, bool, None or
not) are static. Log-probabilities, KL divergences and entropies are in nats everywhere.
"""

from rlhfjax.config.control import ControlDQN, ControlPPO, ControlPQN, ControlTabular
from rlhfjax.config.mesh import Mesh
from rlhfjax.config.networks import MLP, Decoder, Enumerable, RopeScaling
from rlhfjax.config.policies import DPO, GRPO, KTO, PPO
from rlhfjax.config.preferences import ControlPreferences, Labeller, SegmentReward
from rlhfjax.config.training import SFT, LoRA, Optimizer, RewardModel
from rlhfjax.config.values import DQN, ILQL, PQN, SoftQ, TabularQ

__all__ = [
    "ControlDQN",
    "ControlPPO",
    "ControlPQN",
    "ControlPreferences",
    "ControlTabular",
    "DPO",
    "DQN",
    "Decoder",
    "Enumerable",
    "GRPO",
    "ILQL",
    "KTO",
    "Labeller",
    "LoRA",
    "MLP",
    "Mesh",
    "Optimizer",
    "PPO",
    "PQN",
    "RewardModel",
    "RopeScaling",
    "SFT",
    "SegmentReward",
    "SoftQ",
    "TabularQ",
]
