"""Updates, and whole iterations of rollout and update."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.case import Case
from experiments.benchmarks.models import (
    OPTIMIZER,
    OPTIMIZER_STEPS,
    actor_critic_params,
    branches_flops,
    case_sizes,
    generation_flops,
    init,
    language_model,
    random_branches,
    random_prompts,
    random_tokens,
    trained_on_base,
)
from experiments.benchmarks.ragged import completion_lengths
from experiments.benchmarks.sizes import Sizes
from rlhfjax.algorithms import Algorithm, dpo, grpo, make_optimizer, ppo, reward_model, sft
from rlhfjax.config import DPO, GRPO, PPO, SFT, RewardModel
from rlhfjax.networks import LanguageModel
from rlhfjax.networks.flops import branch_pairs, causal_pairs, forward_flops
from rlhfjax.recipes import (
    RLHF,
    Frozen,
    PackedInputs,
    completion_logp,
    grpo_batch,
    init_reward_model,
    make_reward_model,
    make_rlhf,
    packed_logp,
    pair_batch,
    pair_evaluate,
    ppo_batch,
    text_actor_critic,
    text_policy,
)


def finetuning(sizes: Sizes) -> Case:
    """One update of supervised fine-tuning, loss on every position; counts positions."""
    lm = language_model(sizes, sizes.training_vocab_size)
    batch, length = sizes.batch, sizes.prompt_length + sizes.new_tokens
    params, base, on, backward = trained_on_base(lm, sizes)
    optimizer = make_optimizer(OPTIMIZER, OPTIMIZER_STEPS)

    def algorithm(lm: LanguageModel) -> Algorithm:
        return sft.make(packed_logp(lm), optimizer, SFT())

    def step(state, inputs, key):
        base, batch = inputs
        return algorithm(on(base)).update(state, batch, key)

    token = random_tokens(lm, 1, (batch, length + 1))
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    inputs = PackedInputs(token[:, :-1], token[:, 1:], position, jnp.ones((batch, length), jnp.int32))
    positions = batch * length
    return Case(
        step,
        state=jax.jit(algorithm(lm).init)(params),
        inputs=(base, sft.Batch(inputs, jnp.ones((batch, length)))),
        tokens=positions,
        count=lambda metrics: metrics["batch/count"],
        flops=(1 + backward)
        * forward_flops(lm.config, positions=positions, pairs=batch * causal_pairs(length), logits=positions),
        sizes=case_sizes(lm, sizes, rows=batch),
    )


def reward_learning(sizes: Sizes) -> Case:
    """One update of the reward model on pairs; counts the tokens of both sequences, prompts included.

    The two completions of a pair share their prompt, which is computed once.
    """
    lm = language_model(sizes, sizes.training_vocab_size)
    batch, prompt, completion = sizes.batch, sizes.prompt_length, sizes.new_tokens
    algorithm = reward_model.make(
        make_reward_model(lm), make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), RewardModel()
    )
    preference = reward_model.Preference(
        random_branches(lm, batch, 2, prompt, completion),
        first=jnp.zeros(1, jnp.int32),
        second=jnp.ones(1, jnp.int32),
        label_BK=jnp.ones((batch, 1)),
        mask_BK=jnp.ones((batch, 1), bool),
    )
    return Case(
        algorithm.update,
        state=jax.jit(algorithm.init)(init_reward_model(jax.random.key(1), init(lm, 0), sizes.width)),
        inputs=preference,
        tokens=2 * batch * (prompt + completion),
        count=lambda metrics: metrics["batch/count"] * 2 * (prompt + completion),
        flops=3 * branches_flops(lm.config, batch, 2, prompt, completion, logits=False),
        sizes=case_sizes(lm, sizes, pairs=batch) | {"positions_computed": batch * (prompt + 2 * completion)},
    )


def ppo_single(sizes: Sizes) -> Case:
    """A whole iteration of PPO, one sample of each prompt; counts generated tokens."""
    return ppo_iteration(sizes, samples=1)


def ppo_grouped(sizes: Sizes) -> Case:
    """A whole iteration of PPO, several samples of each prompt; counts generated tokens."""
    return ppo_iteration(sizes, samples=sizes.samples)


def ppo_seeds(sizes: Sizes) -> Case:
    """An iteration of PPO of several runs in one program, one sample of each prompt; counts the tokens of all."""
    one, runs = ppo_iteration(sizes, samples=1), sizes.seeds
    if runs < 1:
        raise ValueError(f"--seeds {runs} must be at least 1")

    def step(states, inputs, key):
        return jax.vmap(one.step, in_axes=(0, None, 0))(states, inputs, jax.random.split(key, runs))

    return one._replace(
        step=step,
        state=jax.tree.map(lambda x: jnp.repeat(x[None], runs, axis=0), one.state),
        tokens=runs * one.tokens,
        count=lambda outputs: one.count(outputs).sum(),
        flops=runs * one.flops,
        sizes=one.sizes | {"seeds": runs},
    )


def ppo_iteration(sizes: Sizes, samples: int) -> Case:
    """One program: rollout, reward model, reference, critic, then one epoch of one minibatch.

    Policy, critic, reward model and reference are four networks of the same size.
    """
    lm = language_model(sizes, sizes.training_vocab_size)
    prompts, prompt, completion = _prompts(sizes, samples), sizes.prompt_length, sizes.new_tokens
    evaluate = text_actor_critic(lm)
    algorithm = ppo.make(evaluate, make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), PPO(epochs=1, minibatches=1))
    rlhf = make_rlhf(
        lm,
        algorithm,
        ppo_batch(lm, evaluate),
        reward=make_reward_model(lm),
        samples=samples,
        max_new_tokens=completion,
        stop_tokens=(),
    )

    def step(state, inputs, key):
        state, metrics, experience = rlhf.iterate(state, *inputs, key)
        return state, (metrics, experience)

    forward = partial(branches_flops, lm.config, prompts, samples, prompt, completion)
    rollout = generation_flops(lm.config, prompts, samples, prompt, completion)
    scoring = 2 * forward(logits=False) + forward(logits=True)  # reward model and critic; reference
    update = 3 * (forward(logits=True) + forward(logits=False))  # policy; critic
    return Case(
        step,
        state=jax.jit(algorithm.init)(actor_critic_params(lm)),
        inputs=(
            Frozen(init(lm, 2), init_reward_model(jax.random.key(4), init(lm, 3), sizes.width)),
            random_prompts(lm, prompts, prompt),
        ),
        tokens=sizes.batch * completion,
        count=lambda outputs: outputs[0]["batch/actions"],
        flops=rollout + scoring + update,
        sizes=case_sizes(lm, sizes, prompts=prompts, samples=samples) | {"epochs": 1, "minibatches": 1},
    )


def ragged_update(sizes: Sizes) -> Case:
    """A PPO update, policy and critic, on completions of ragged length; counts real tokens of completions.

    With --packing, sequences of real tokens only, in so many times the tokens of full rows.
    """
    lm = language_model(sizes, sizes.training_vocab_size)
    length_N = completion_lengths(sizes)
    count, prompt, completion = len(length_N), sizes.prompt_length, sizes.new_tokens
    algorithm = ppo.make(
        text_actor_critic(lm), make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), PPO(epochs=1, minibatches=1)
    )
    mask = jnp.asarray(np.arange(completion) < length_N[:, None, None])
    inputs = random_branches(lm, count, 1, prompt, completion)._replace(completion_mask_BGC=mask)
    number = jnp.zeros(mask.shape)
    tokens, pairs = int(length_N.sum()), sum(branch_pairs(prompt, 1, int(x)) for x in length_N)
    forward = (
        forward_flops(lm.config, positions=count * prompt + tokens, pairs=pairs, logits=logits)
        for logits in (tokens, 0)
    )
    return Case(
        algorithm.update,
        state=jax.jit(algorithm.init)(actor_critic_params(lm)),
        inputs=ppo.Rollout(inputs, number, number, number, number, mask=mask),
        tokens=tokens,
        count=lambda metrics: metrics["batch/actions"],
        flops=3 * sum(forward),
        sizes=case_sizes(lm, sizes, prompts=count, samples=1) | {"mean_tokens": float(length_N.mean())},
    )


def dpo_update(sizes: Sizes) -> Case:
    """One update of DPO, the reference's log-probabilities computed in it; counts the tokens of both sequences."""
    lm = language_model(sizes, sizes.training_vocab_size)
    batch, prompt, completion = sizes.batch, sizes.prompt_length, sizes.new_tokens
    algorithm = dpo.make(pair_evaluate(lm), make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), DPO())
    branches = random_branches(lm, batch, 2, prompt, completion)

    def step(state, inputs, key):
        reference, branches = inputs
        pairs = pair_batch(
            branches,
            completion_logp(lm, reference, branches),
            first=jnp.zeros(1, jnp.int32),
            second=jnp.ones(1, jnp.int32),
            label_BK=jnp.ones((batch, 1)),
        )
        return algorithm.update(state, pairs, key)

    forward = branches_flops(lm.config, batch, 2, prompt, completion, logits=True)
    return Case(
        step,
        state=jax.jit(algorithm.init)(init(lm, 0)),
        inputs=(init(lm, 1), branches),
        tokens=2 * batch * (prompt + completion),
        count=lambda metrics: metrics["batch/count"] * 2 * (prompt + completion),
        flops=(1 + 3) * forward,
        sizes=case_sizes(lm, sizes, pairs=batch) | {"positions_computed": batch * (prompt + 2 * completion)},
    )


def grpo_iteration(sizes: Sizes) -> Case:
    """A whole iteration of GRPO, several samples of each prompt, a trivial reward; counts generated tokens."""
    lm = language_model(sizes, sizes.training_vocab_size)
    samples, prompt, completion = sizes.samples, sizes.prompt_length, sizes.new_tokens
    prompts = _prompts(sizes, samples)
    params, base, on, backward = trained_on_base(lm, sizes)
    optimizer = make_optimizer(OPTIMIZER, OPTIMIZER_STEPS)

    def algorithm(lm: LanguageModel) -> Algorithm:
        return grpo.make(text_policy(lm), optimizer, GRPO(kl_coefficient=0.04, epochs=1, minibatches=1))

    def rlhf(lm: LanguageModel) -> RLHF:
        return make_rlhf(
            lm,
            algorithm(lm),
            grpo_batch(lm),
            reward=lambda params, branches: jnp.mean(branches.completion_BGC % 2, axis=2, dtype=jnp.float32),
            samples=samples,
            max_new_tokens=completion,
            stop_tokens=(),
            policy=lambda params: params,
        )

    def step(state, inputs, key):
        base, *inputs = inputs
        state, metrics, experience = rlhf(on(base)).iterate(state, *inputs, key)
        return state, (metrics, experience)

    forward = branches_flops(lm.config, prompts, samples, prompt, completion, logits=True)
    return Case(
        step,
        state=jax.jit(algorithm(lm).init)(params),
        inputs=(base, Frozen({} if base else init(lm, 1), None), random_prompts(lm, prompts, prompt)),
        tokens=sizes.batch * completion,
        count=lambda outputs: outputs[0]["batch/actions"],
        flops=generation_flops(lm.config, prompts, samples, prompt, completion) + (2 + backward) * forward,
        sizes=case_sizes(lm, sizes, prompts=prompts, samples=samples) | {"epochs": 1, "minibatches": 1},
    )


def _prompts(sizes: Sizes, samples: int) -> int:
    """Prompts of a batch. Raises ValueError where the samples do not divide it."""
    if sizes.batch % samples:
        raise ValueError(f"a batch of {sizes.batch} sequences cannot hold {samples} samples of each prompt")
    return sizes.batch // samples
