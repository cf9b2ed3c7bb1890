"""The models and inputs of all cases of text, and the operations of their passes.

No completion can stop early (there is no stop token), so that every step of a case does the same work.

Shapes: B prompts or rows, G samples of a prompt, P prompt length, C completion length.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.sizes import Sizes
from rlhfjax.config import Decoder, LoRA, Optimizer
from rlhfjax.networks import Branches, LanguageModel, adapted, decoder, init_lora, init_scalar_head
from rlhfjax.networks.flops import branch_pairs, forward_flops
from rlhfjax.recipes import Prompts

# AdamW; so slow that a random model stays one however long it runs.
OPTIMIZER = Optimizer(learning_rate=1e-5)
OPTIMIZER_STEPS = 1_000_000  # of the schedule: constant for all purposes


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
            packing=sizes.packing,
        )
    )


def init(lm: LanguageModel, seed: int) -> dict:
    """Fresh parameters."""
    return jax.jit(lm.init)(jax.random.key(seed))


def actor_critic_params(lm: LanguageModel) -> dict:
    """Policy and separate critic, as `text_actor_critic` takes them."""
    head = init_scalar_head(jax.random.key(1), lm.config.width)
    return {"policy": init(lm, 0), "critic": {"trunk": init(lm, 1), "head": head}}


def trained_on_base(
    lm: LanguageModel, sizes: Sizes
) -> tuple[dict, dict, Callable[[dict], LanguageModel], float]:
    """(what is trained, the base, base -> the language model of what is trained, passes that a backward pass costs).

    Without `lora_rank` the base is empty. Gradients of a frozen base's matrices are half of a backward pass.
    """
    if sizes.lora_rank == 0:
        return init(lm, 0), {}, lambda base: lm, 2.0
    lora, base = LoRA(rank=sizes.lora_rank, alpha=2.0 * sizes.lora_rank), init(lm, 0)
    adapters = jax.jit(partial(init_lora, config=lora))(jax.random.key(2), base)
    return adapters, base, lambda base: adapted(lm, base, lora), 1.0


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
    parameters |= {"lora_rank": sizes.lora_rank} if sizes.lora_rank else {}
    return batch | lengths | parameters | dataclasses.asdict(lm.config)
