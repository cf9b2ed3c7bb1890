"""Reward functions: on the host (texts in, numbers out) and on the device (arrays in, array out)."""

from rlhfjax.rewards.device import WordTable, length_reward, word_count, word_table
from rlhfjax.rewards.host import HostReward, score_on_host
from rlhfjax.rewards.rouge import rouge_l, rouge_l_reward, rouge_n

__all__ = [
    "HostReward",
    "WordTable",
    "length_reward",
    "rouge_l",
    "rouge_l_reward",
    "rouge_n",
    "score_on_host",
    "word_count",
    "word_table",
]
