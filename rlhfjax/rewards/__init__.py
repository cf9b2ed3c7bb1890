"""Reward functions: on the host (texts in, numbers out), on the device (arrays in, array out), and learned."""

from rlhfjax.rewards.characters import (
    ByteTable,
    Characters,
    References,
    byte_table,
    characters,
    fold,
    references,
)
from rlhfjax.rewards.chrf import chrf, chrf_on_device, chrf_reward
from rlhfjax.rewards.device import WordTable, length_reward, word_count, word_table
from rlhfjax.rewards.host import HostReward, RewardPool, score_on_host
from rlhfjax.rewards.learned import (
    ensemble_disagreement,
    ensemble_mean,
    ensemble_reward,
    ensemble_scores,
    ensemble_worst,
    mean_minus_std,
    mean_minus_variance,
    solution_score,
    step_ends,
    step_reward,
    worst_step_score,
)
from rlhfjax.rewards.lexicon import lexicon_on_device, lexicon_reward, vader_lexicon
from rlhfjax.rewards.regex import RegexAutomaton, regex_automaton, regex_on_device, regex_reward
from rlhfjax.rewards.rouge import rouge_l, rouge_l_reward, rouge_n

__all__ = [
    "ByteTable",
    "Characters",
    "HostReward",
    "References",
    "RegexAutomaton",
    "RewardPool",
    "WordTable",
    "byte_table",
    "characters",
    "chrf",
    "chrf_on_device",
    "chrf_reward",
    "ensemble_disagreement",
    "ensemble_mean",
    "ensemble_reward",
    "ensemble_scores",
    "ensemble_worst",
    "fold",
    "length_reward",
    "lexicon_on_device",
    "lexicon_reward",
    "mean_minus_std",
    "mean_minus_variance",
    "references",
    "regex_automaton",
    "regex_on_device",
    "regex_reward",
    "rouge_l",
    "rouge_l_reward",
    "rouge_n",
    "score_on_host",
    "solution_score",
    "step_ends",
    "step_reward",
    "vader_lexicon",
    "word_count",
    "word_table",
    "worst_step_score",
]
