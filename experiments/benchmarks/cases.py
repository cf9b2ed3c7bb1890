"""What is measured: each case is one compiled step on random tokens, exactly as a run takes it.

No completion can stop early (there is no stop token), so that every step of a case does the same work.

Shapes: B prompts or rows, G samples of a prompt, P prompt length, C completion length, T = P + C, D width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.case import Case
from experiments.benchmarks.control import control_dqn_run, control_ppo_run, control_pqn_run
from experiments.benchmarks.ragged import ragged_case
from experiments.benchmarks.sizes import Sizes
from rlhfjax.algorithms import make_optimizer, ppo, reward_model, sft
from rlhfjax.config import PPO, SFT, Decoder, Optimizer, RewardModel
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.networks import Branches, LanguageModel, decoder, init_scalar_head
from rlhfjax.networks.flops import branch_pairs, causal_pairs, forward_flops
from rlhfjax.ops import token_logprobs
from rlhfjax.recipes import (
    Frozen,
    PackedInputs,
    Prompts,
    init_reward_model,
    make_reward_model,
    make_rlhf,
    packed_logp,
    ppo_batch,
    text_actor_critic,
)

# AdamW; so slow that a random model stays one however long it runs.
OPTIMIZER = Optimizer(learning_rate=1e-5)
OPTIMIZER_STEPS = 1_000_000  # of the schedule: constant for all purposes


def ceiling(sizes: Sizes) -> Case:
    """A square float32 matrix product, at JAX's default precision: the most FLOP/s this machine gives."""
    size = sizes.matmul_size
    factors = tuple(jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))

    def step(state, factors, key):
        del key
        return state, factors[0] @ factors[1]

    return Case(step, (), factors, 0, lambda product: 0, 2.0 * size**3, {"matmul_size": size})


def generate_greedy(sizes: Sizes) -> Case:
    """Prefill and greedy decoding, log-probabilities kept; counts new tokens."""
    return generation(sizes, Sampling(temperature=0.0))


def generate_t1(sizes: Sizes) -> Case:
    """Prefill and decoding at temperature 1, log-probabilities kept; counts new tokens."""
    return generation(sizes, Sampling())


def generate_top_p(sizes: Sizes) -> Case:
    """Prefill and decoding with top-p, log-probabilities kept; counts new tokens."""
    return generation(sizes, Sampling(top_p=sizes.top_p))


def generate_ragged(sizes: Sizes) -> Case:
    """Completions of ragged length at temperature 1 through slots that refill; counts new tokens."""
    return ragged_generation(sizes, refill=True)


def generate_ragged_batches(sizes: Sizes) -> Case:
    """The same completions batch after batch, each as long as its longest; counts new tokens."""
    return ragged_generation(sizes, refill=False)


def ragged_generation(sizes: Sizes, *, refill: bool) -> Case:
    """One completion of every prompt, `ragged_batches` times as many as are decoded at a time."""
    lm = language_model(sizes, sizes.generation_vocab_size)
    count = sizes.ragged_batches * sizes.batch
    prompts = random_prompts(lm, count, sizes.prompt_length)
    described = case_sizes(lm, sizes, prompts=count, samples=1)
    return ragged_case(sizes, lm, init(lm, 0), prompts, described, refill=refill)


def generation(sizes: Sizes, sampling: Sampling) -> Case:
    """Prefill and decoding; `sampling` is a constant of the program, as in the stages of a run."""
    lm = language_model(sizes, sizes.generation_vocab_size)
    batch, new_tokens = sizes.batch, sizes.new_tokens

    def step(state, inputs, key):
        params, prompts = inputs
        keys_BG = sample_keys(key, prompts.index_B, 1)
        return state, generate(
            lm,
            params,
            prompts.token_BP,
            prompts.mask_BP,
            keys_BG,
            max_new_tokens=new_tokens,
            stop_tokens=(),
            sampling=sampling,
        )

    return Case(
        step,
        state=(),
        inputs=(init(lm, 0), random_prompts(lm, batch, sizes.prompt_length)),
        tokens=batch * new_tokens,
        count=lambda generation: generation.mask_BGC.sum(),
        flops=generation_flops(lm.config, batch, 1, sizes.prompt_length, new_tokens),
        sizes=case_sizes(lm, sizes, prompts=batch, samples=1) | {"sampling": sampling._asdict()},
    )


def finetuning(sizes: Sizes) -> Case:
    """One update of supervised fine-tuning, loss on every position; counts positions."""
    lm = language_model(sizes, sizes.training_vocab_size)
    batch, length = sizes.batch, sizes.prompt_length + sizes.new_tokens
    algorithm = sft.make(packed_logp(lm), make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), SFT())
    token = random_tokens(lm, 1, (batch, length + 1))
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    inputs = PackedInputs(token[:, :-1], token[:, 1:], position, jnp.ones((batch, length), jnp.int32))
    positions = batch * length
    return Case(
        algorithm.update,
        state=jax.jit(algorithm.init)(init(lm, 0)),
        inputs=sft.Batch(inputs, jnp.ones((batch, length))),
        tokens=positions,
        count=lambda metrics: metrics["batch/count"],
        flops=3
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
    if sizes.batch % samples:
        raise ValueError(f"a batch of {sizes.batch} sequences cannot hold {samples} samples of each prompt")
    lm = language_model(sizes, sizes.training_vocab_size)
    prompts, prompt, completion = sizes.batch // samples, sizes.prompt_length, sizes.new_tokens
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


def logprob_memory(sizes: Sizes) -> Case:
    """Value and gradient of token log-probabilities, compiled only: no [B, C, V] array may live in it."""
    batch, length, vocabulary = sizes.batch, sizes.memory_length, sizes.memory_vocab_size
    hidden = jax.ShapeDtypeStruct((batch, length, sizes.width), jnp.dtype(sizes.dtype))
    embedding = jax.ShapeDtypeStruct((vocabulary, sizes.width), jnp.float32)
    token = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def step(state, inputs, key):
        del key
        hidden, embedding, token = inputs

        def loss(hidden, embedding):
            return -jnp.sum(token_logprobs(hidden, embedding, token).logp)

        return state, jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding)

    logits = batch * length
    return Case(
        step,
        state=(),
        inputs=(hidden, embedding, token),
        tokens=logits,
        count=lambda outputs: logits,
        flops=6.0 * logits * sizes.width * vocabulary,
        sizes={"rows": batch, "length": length, "vocab_size": vocabulary, "width": sizes.width}
        | {"logits_bytes": 4 * logits * vocabulary},
    )


def update_memory(sizes: Sizes) -> Case:
    """A whole PPO update, policy and critic, compiled only."""
    batch, prompt, length = sizes.batch, sizes.prompt_length, sizes.memory_length
    sizes = dataclasses.replace(sizes, new_tokens=length)
    lm = language_model(sizes, sizes.memory_vocab_size)
    algorithm = ppo.make(
        text_actor_critic(lm), make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), PPO(epochs=1, minibatches=1)
    )

    def rollout() -> ppo.Rollout:
        number = jnp.zeros((batch, 1, length))
        inputs = random_branches(lm, batch, 1, prompt, length)
        return ppo.Rollout(inputs, number, number, number, number, mask=inputs.completion_mask_BGC)

    forward = partial(branches_flops, lm.config, batch, 1, prompt, length)
    return Case(
        algorithm.update,
        state=jax.eval_shape(lambda: algorithm.init(actor_critic_params(lm))),
        inputs=jax.eval_shape(rollout),
        tokens=batch * length,
        count=lambda metrics: metrics["batch/actions"],
        flops=3 * (forward(logits=True) + forward(logits=False)),
        sizes=case_sizes(lm, sizes, prompts=batch, samples=1)
        | {"logits_bytes": 4 * batch * length * sizes.memory_vocab_size},
    )


# Name on the command line -> the case at given sizes, in the order they are run.
CASES: dict[str, Callable[[Sizes], Case]] = {
    "ceiling": ceiling,
    "generate_greedy": generate_greedy,
    "generate_t1": generate_t1,
    "generate_top_p": generate_top_p,
    "generate_ragged": generate_ragged,
    "generate_ragged_batches": generate_ragged_batches,
    "sft": finetuning,
    "reward_model": reward_learning,
    "ppo": ppo_single,
    "ppo_grouped": ppo_grouped,
    "ppo_seeds": ppo_seeds,
    "control_ppo": control_ppo_run,
    "control_pqn": control_pqn_run,
    "control_dqn": control_dqn_run,
    "logprob_memory": logprob_memory,
    "update_memory": update_memory,
}


def language_model(sizes: Sizes, vocab_size: int) -> LanguageModel:
    """The decoder that `sizes` describes."""
    if sizes.width % sizes.heads:
        raise ValueError(f"width {sizes.width} must be a multiple of heads {sizes.heads}")
    return decoder(
        Decoder(
            vocab_size=vocab_size,
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads or sizes.heads,
            head_size=sizes.width // sizes.heads,
            mlp_width=sizes.mlp_width,
            max_positions=sizes.prompt_length + sizes.new_tokens,
            tie_embeddings=sizes.tie_embeddings,
            dtype=sizes.dtype,
            attention=sizes.attention,
            remat=sizes.remat,
        )
    )


def init(lm: LanguageModel, seed: int) -> dict:
    """Fresh parameters."""
    return jax.jit(lm.init)(jax.random.key(seed))


def actor_critic_params(lm: LanguageModel) -> dict:
    """Policy and separate critic, as `text_actor_critic` takes them."""
    head = init_scalar_head(jax.random.key(1), lm.config.width)
    return {"policy": init(lm, 0), "critic": {"trunk": init(lm, 1), "head": head}}


def random_tokens(lm: LanguageModel, seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Uniform token ids, int32."""
    return jax.random.randint(jax.random.key(seed), shape, 0, lm.config.vocab_size, jnp.int32)


def random_prompts(lm: LanguageModel, prompts: int, length: int) -> Prompts:
    """Prompts without padding."""
    token_BP = random_tokens(lm, 10, (prompts, length))
    return Prompts(token_BP, jnp.ones(token_BP.shape, bool), jnp.arange(prompts))


def random_branches(lm: LanguageModel, prompts: int, samples: int, prompt: int, completion: int) -> Branches:
    """Prompts and completions without padding."""
    token_BP, mask_BP, _ = random_prompts(lm, prompts, prompt)
    completion_BGC = random_tokens(lm, 11, (prompts, samples, completion))
    return Branches(token_BP, mask_BP, completion_BGC, jnp.ones(completion_BGC.shape, bool))


def generation_flops(config: Decoder, prompts: int, samples: int, prompt: int, completion: int) -> float:
    """The last token of a completion is drawn and never read; the first is drawn from one row per prompt."""
    read = completion - 1
    return prompts * forward_flops(
        config,
        positions=prompt + samples * read,
        pairs=branch_pairs(prompt, samples, read),
        logits=1 + samples * read,
    )


def branches_flops(
    config: Decoder, prompts: int, samples: int, prompt: int, completion: int, *, logits: bool
) -> float:
    """A forward pass over prompts with their completions, with or without the logits of the completions."""
    return prompts * forward_flops(
        config,
        positions=prompt + samples * completion,
        pairs=branch_pairs(prompt, samples, completion),
        logits=samples * completion * logits,
    )


def case_sizes(lm: LanguageModel, sizes: Sizes, **batch: int) -> dict[str, Any]:
    """All sizes of a case, flat: those of the batch, then the model's."""
    lengths = {"prompt_length": sizes.prompt_length, "new_tokens": sizes.new_tokens}
    shapes = jax.tree.leaves(jax.eval_shape(lm.init, jax.random.key(0)))
    parameters = {"parameters": sum(x.size for x in shapes)}  # of one network
    return batch | lengths | parameters | dataclasses.asdict(lm.config)
