"""A small case of every algorithm that knows of a mapped axis: linear models, batches with ragged masks, settings."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import dpo, dqn, grpo, ilql, kto, ppo, pqn, reward_model, sft, soft_q
from rlhfjax.config import DPO, DQN, GRPO, ILQL, KTO, PPO, PQN, SFT, RewardModel, SoftQ

DEVICES = 4
ROWS, SAMPLES, LENGTH, WIDTH, ACTIONS = 8, 2, 5, 3, 4
EMPTY = slice(ROWS - ROWS // DEVICES, None)  # the rows of the last device

# ---------------------------------------------------------------------------------------------- linear models


def log_softmax(params, inputs):
    """log pi over all actions, [..., V], of a linear policy."""
    return jax.nn.log_softmax(inputs["feature"] @ params["policy"])


def of_action(x, inputs):
    return jnp.take_along_axis(x, inputs["action"][..., None], axis=-1)[..., 0]


def token_logp(params, inputs):
    return of_action(log_softmax(params, inputs), inputs)


def actor_critic(params, inputs):
    logp_V = log_softmax(params, inputs)
    entropy = -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1)
    return of_action(logp_V, inputs), entropy, inputs["feature"] @ params["value"]


def actor(params, inputs):
    return actor_critic(params, inputs)[:2]


def step_scores(params, inputs):
    return inputs["feature"] @ params["value"]


def scores(params, inputs):
    return jnp.mean(jnp.tanh(step_scores(params, inputs)), axis=-1)


def logp_and_collision(params, inputs):
    logp_V = log_softmax(params, inputs)
    return dpo.TokenLogps(of_action(logp_V, inputs), jax.nn.logsumexp(2 * logp_V, axis=-1))


def values_and_policy(params, inputs):
    q = jnp.stack([inputs["feature"] @ params["policy"], 2 * inputs["feature"] @ params["policy"]])
    both = {"action": jnp.broadcast_to(inputs["action"], q.shape[:-1])}
    return ilql.Evaluation(
        of_action(q, both),
        value=inputs["feature"] @ params["value"],
        log_softmax=of_action(jax.nn.log_softmax(q), both),
        logp=token_logp(params, inputs),
        final=inputs["feature"][..., -1, :] @ params["value"],
    )


def policy_and_partition(params, inputs):
    logits = inputs["feature"] @ params["policy"]
    return soft_q.Evaluation(token_logp(params, inputs), jax.nn.logsumexp(logits, axis=-1))


def action_values(params, feature):
    return feature @ params["policy"]


def initial_params():
    generator = np.random.default_rng(1)
    return {
        "policy": jnp.asarray(generator.normal(size=(WIDTH, ACTIONS)) / 2, jnp.float32),
        "value": jnp.asarray(generator.normal(size=WIDTH) / 2, jnp.float32),
    }


# ---------------------------------------------------------------------------------------------- batches


class Draw:
    """Random arrays of a batch with ragged masks, so per-device means differ; with `empty`, one device has none."""

    def __init__(self, seed: int, empty: bool):
        self.generator, self.empty = np.random.default_rng(seed), empty
        shape = (ROWS, SAMPLES, LENGTH)
        self.inputs = {
            "feature": self.normal(0.0, (*shape, WIDTH)),
            "action": jnp.asarray(self.generator.integers(ACTIONS, size=shape), jnp.int32),
        }
        length = self.generator.integers(1, LENGTH + 1, size=shape[:2])
        self.mask = self.counted(np.arange(LENGTH)[None, None] < length[..., None])

    def normal(self, mean: float, shape=(ROWS, SAMPLES, LENGTH)):
        return jnp.asarray(self.generator.normal(mean, size=shape) * 0.5, jnp.float32)

    def uniform(self, *shape: int):
        return jnp.asarray(self.generator.uniform(size=shape), jnp.float32)

    def flags(self, *shape: int, rate: float = 0.6):
        return self.counted(self.generator.uniform(size=shape) < rate)

    def counted(self, mask):
        mask = np.array(mask)
        if self.empty:
            mask[EMPTY] = False
        return jnp.asarray(mask)


def ppo_rollout(draw: Draw):
    reward = draw.normal(0.0).at[1, 0].set(jnp.nan)
    noise = (draw.normal(-1.0), draw.normal(-1.0), draw.normal(0.0))
    return ppo.Rollout(draw.inputs, *noise, reward, draw.mask)


def ppo_rollout_with_text(draw: Draw):
    text = sft.Batch(draw.inputs, draw.uniform(ROWS, SAMPLES, LENGTH) * draw.flags(ROWS, SAMPLES, LENGTH))
    return ppo_rollout(draw)._replace(ptx=text)


def grpo_rollout(draw: Draw, rewards: int = 1):
    reward = jnp.round(draw.normal(0.0, (ROWS, SAMPLES, rewards)))  # with ties
    reward = reward.at[1, 0].set(jnp.inf)
    logp, logp_ref = draw.normal(-1.0), draw.normal(-1.0)
    return grpo.Rollout(draw.inputs, logp, logp_ref, reward if rewards > 1 else reward[..., 0], draw.mask)


def compared(draw: Draw):
    """first, second, label, mask of three pairs a prompt, one of them a completion with itself."""
    first, second = (jnp.broadcast_to(jnp.array(index), (ROWS, 3)) for index in ([0, 1, 0], [1, 0, 0]))
    return first, second, draw.uniform(ROWS, 3), draw.flags(ROWS, 3)


def pairs(draw: Draw):
    first, second, label, mask = compared(draw)
    label = label.at[0, 0].set(2.0)  # invalid
    return reward_model.Preference(draw.inputs, first, second, label, mask, draw.uniform(ROWS, 3))


def ranking(draw: Draw):
    order = jnp.asarray(np.argsort(draw.generator.uniform(size=(ROWS, SAMPLES))), jnp.int32)
    return reward_model.Ranking(draw.inputs, order.at[0].set(7), None, jnp.any(draw.mask, axis=-1))


def steps(draw: Draw):
    return reward_model.Steps(draw.inputs, draw.uniform(ROWS, SAMPLES, LENGTH), draw.mask)


def completion_pairs(draw: Draw):
    completion = jnp.ones((ROWS, SAMPLES, LENGTH), bool).at[:, 0, 3:].set(False)
    return dpo.Pairs(draw.inputs, completion, *compared(draw), logp_ref_BGC=-draw.uniform(*completion.shape))


def judged(draw: Draw):
    def logp_ref():
        return -2.0 - draw.uniform(ROWS, SAMPLES, LENGTH)

    label = draw.flags(ROWS, SAMPLES).astype(jnp.float32)
    other = jax.tree.map(lambda x: x[::-1], draw.inputs)
    whole = jnp.ones((ROWS, SAMPLES, LENGTH), bool)
    return kto.Judged(
        draw.inputs,
        draw.mask,
        logp_ref(),
        label,
        draw.flags(ROWS, SAMPLES, rate=0.8),
        draw.uniform(ROWS, SAMPLES),
        kto.Mismatched(other, whole, logp_ref(), draw.flags(ROWS, SAMPLES)),
    )


def episodes(draw: Draw):
    truncated = draw.flags(ROWS, SAMPLES)
    turns = draw.mask & draw.flags(ROWS, SAMPLES, LENGTH)
    return ilql.Episodes(draw.inputs, draw.normal(0.0).at[1, 0].set(jnp.nan), turns, truncated)


def paths(draw: Draw):
    return soft_q.Batch(draw.inputs, -draw.uniform(ROWS, SAMPLES, LENGTH), draw.normal(0.0), draw.mask)


def transitions(draw: Draw):
    feature, following = draw.normal(0.0, (ROWS, WIDTH)), draw.normal(0.0, (ROWS, WIDTH))
    action = draw.inputs["action"][:, 0, 0].at[0].set(-1)  # invalid
    reward, weight = draw.normal(1.0, (ROWS,)), draw.uniform(ROWS)
    mask = draw.counted(np.arange(ROWS) != 3)
    return dqn.Batch(
        feature, action, reward, following, draw.flags(ROWS, rate=0.3), weight_B=weight, mask_B=mask
    )


def steps_of_environments(draw: Draw):
    feature, following = (draw.normal(0.0, (ROWS, LENGTH, WIDTH)) for _ in range(2))
    action = draw.inputs["action"][:, 0].at[0, 0].set(ACTIONS)  # invalid
    ends = draw.flags(ROWS, LENGTH, rate=0.2), draw.flags(ROWS, LENGTH, rate=0.2)
    return pqn.Rollout(
        feature,
        action,
        draw.normal(0.5, (ROWS, LENGTH)),
        *ends,
        next_inputs=following,
        mask=draw.flags(ROWS, LENGTH),
    )


# ---------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    algorithm: Any  # its module
    make: Any  # (config, optimizer, axis_name) -> Algorithm
    config: Any  # without microbatches
    batch: Any  # Draw -> the algorithm's batch


def case(algorithm, evaluate, config, batch, **more) -> Case:
    return Case(
        algorithm,
        lambda config, optimizer, axis_name: algorithm.make(evaluate, optimizer, config, axis_name, **more),
        config,
        batch,
    )


HELD = {
    "is_policy": lambda params: {"policy": True, "value": False},
    "evaluate_ptx": token_logp,
}
BATCH_STATISTICS = GRPO(
    baseline="batch_mean",
    scale="batch_std",
    whiten="actions",
    aggregation="token",
    kl_placement="reward",
    kl_estimator="k1",
)
MOVING = GRPO(
    baseline="moving",
    scale="none",
    clip="none",
    aggregation="constant",
    length_constant=5.0,
    kl_placement="score",
    kl_estimator="k1",
    epochs=2,
)
TWO_REWARDS = GRPO(separate_rewards=True, reward_weights=(1.0, 0.5), whiten="samples", drop_equal_groups=True)

CASES = {
    "sft": case(sft, token_logp, SFT(), lambda draw: sft.Batch(draw.inputs, draw.mask * draw.normal(1.0))),
    "reward_model": case(reward_model, scores, RewardModel(centring=0.1), pairs),
    "reward_model_ranking": case(reward_model, scores, RewardModel(), ranking),
    "reward_model_steps": case(reward_model, step_scores, RewardModel(), steps),
    "ppo": case(
        ppo, actor_critic, PPO(epochs=2, whiten_rewards=True, kl_target=0.1, kl_horizon=20), ppo_rollout
    ),
    "ppo_warm_up_and_text": case(
        ppo,
        actor_critic,
        PPO(epochs=1, critic_warmup=1, ptx_coefficient=0.5, reward_clip=0.4, advantage_clip=1.0),
        ppo_rollout_with_text,
        **HELD,
    ),
    "grpo": case(grpo, actor, GRPO(), grpo_rollout),
    "grpo_batch_statistics": case(grpo, actor, BATCH_STATISTICS, grpo_rollout),
    "grpo_moving_baseline": case(grpo, actor, MOVING, grpo_rollout),
    "grpo_two_rewards": case(grpo, actor, TWO_REWARDS, partial(grpo_rollout, rewards=2)),
    "dpo": case(dpo, token_logp, DPO(beta=0.5, nll_coefficient=0.1), completion_pairs),
    "dpo_weighted": case(dpo, logp_and_collision, DPO(weighting="aligned"), completion_pairs),
    "kto": case(kto, token_logp, KTO(beta=1.0, undesirable_weight=1.5), judged),
    "bco": case(kto, token_logp, KTO(loss="bco", beta=0.5), judged),
    "ilql": case(ilql, values_and_policy, ILQL(advantage_beta=0.5, polyak=0.3), episodes),
    "soft_q": case(soft_q, policy_and_partition, SoftQ(beta=1.0, steps=(1, 0), polyak=0.3), paths),
    "dqn": case(dqn, action_values, DQN(cql=0.1, target="polyak", polyak=0.3), transitions),
    "pqn": case(pqn, action_values, PQN(epochs=2, minibatches=1), steps_of_environments),
}

# A ragged batch, then one of which a device has nothing that counts.
DRAWS = ((0, False), (1, True))


@cache
def batches(name: str):
    return tuple(CASES[name].batch(Draw(*draw)) for draw in DRAWS)
