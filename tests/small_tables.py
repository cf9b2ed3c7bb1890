"""Small made-up worlds as tables, and their optimum."""

import numpy as np

from rlhfjax.environments.grid import Table, optimal_values


def table_of(transition_SAS, reward_SA) -> Table:
    """The table of a world given by the probability that the episode goes on in s' and by expected rewards.

    What is missing to 1 terminates the episode.
    """
    going_on_SAS = np.asarray(transition_SAS, np.float64)
    states, actions, _ = going_on_SAS.shape
    ends_SA1 = 1 - going_on_SAS.sum(axis=2, keepdims=True)
    shape = (states, actions, states + 1)
    outcome_K = np.arange(states + 1)
    return Table(
        np.concatenate([going_on_SAS, ends_SA1], axis=2),
        np.broadcast_to(np.where(outcome_K < states, outcome_K, 0).astype(np.int32), shape),
        np.broadcast_to(np.asarray(reward_SA, np.float64)[:, :, None], shape),
        np.broadcast_to(outcome_K == states, shape),
        np.full(states, 1 / states),
    )


def optimal_action_values(transition_SAS, reward_SA, *, discount: float) -> np.ndarray:
    """Q* [S, A], float64."""
    return optimal_values(table_of(transition_SAS, reward_SA), discount=discount)[1]
