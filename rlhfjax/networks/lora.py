"""LoRA (arXiv 2106.09685): a frozen base, and adapters that alone are trained.

A language model whose params are the adapters is made where the base is an argument, inside a jitted function:

    @partial(jax.jit, donate_argnums=0)
    def iterate(state, base, prompts, key):
        policy = adapted(lm, base, config)  # closes over the base, which no gradient reaches
        ...  # any recipe, given `policy` in place of `lm`; the reference's params are {}

So policy, critic, reward model and reference share one copy of the base, each with adapters of its own, and the State
holds adapters only. The base may be quantised (`networks.quantised`: QLoRA, arXiv 2305.14314).
"""

import jax
import jax.numpy as jnp

from rlhfjax.config import LoRA as Config
from rlhfjax.networks.decoder import LanguageModel
from rlhfjax.networks.layers import (
    LORA_A,
    LORA_B,
    LORA_SCALE,
    PROJECTIONS,
    kernel_shape,
    projections,
    with_entries,
)
from rlhfjax.networks.quantised import dequantise


def adapted(lm: LanguageModel, base: dict, config: Config) -> LanguageModel:
    """`lm` as a function of adapters alone, on a base that it closes over.

    Its `init(key)` gives fresh adapters, which leave the base's outputs as they are to the last bit; params `{}` are
    the base itself and cost nothing. Make it inside the jitted function that has `base` as an argument: made outside,
    the base would be compiled into the program as constants.
    """

    def whole(adapters: dict) -> dict:
        return with_adapters(base, adapters, config)

    def apply(params, token_BT, **arguments):
        return lm.apply(whole(params), token_BT, **arguments)

    return lm._replace(
        init=lambda key: init_lora(key, base, config),
        apply=apply,
        embedding=lambda params: lm.embedding(whole(params)),
        logits=lambda params, hidden: lm.logits(whole(params), hidden),
        # Gives a whole model. `whole` of that is the same: what is laid over the base covers what it was made of.
        for_decoding=lambda params: lm.for_decoding(whole(params)),
    )


def init_lora(key: jax.Array, base: dict, config: Config) -> dict:
    """Fresh adapters, float32: a uniform within +-inputs ** -0.5 (as `peft` draws it), b zero. The key is consumed.

    base: a decoder's params, quantised or not, or their shapes (`jax.eval_shape`).

    Returns the base's nesting, of adapted projections only: {"layer_0": {"attention": {"query": {"lora_a" [inputs,
    rank], "lora_b" [rank, outputs]}, ...}, ...}, ...}. The scale is no part of it: it is not trained.

    Raises ValueError for a rank below 1, for names that no projection has, and where nothing is adapted.
    """
    _check(config)
    there = projections(base)
    shapes = {path: kernel_shape(there[path]) for path in there if path[-1] in config.projections}
    if not shapes:
        names = sorted({path[-1] for path in there})
        raise ValueError(f"the base has none of the projections {config.projections}, only {names}")
    sizes = [inputs * config.rank for inputs, _ in shapes.values()]
    # In one draw, cut up behind a barrier: one draw for each of a model's hundreds takes minutes to compile.
    drawn = jax.random.uniform(key, (sum(sizes),), jnp.float32, minval=-1.0, maxval=1.0)
    drawn = jax.lax.optimization_barrier(drawn)
    adapters, start = {}, 0
    for (path, (inputs, outputs)), size in zip(shapes.items(), sizes, strict=True):
        a = drawn[start : start + size].reshape(inputs, config.rank) * inputs**-0.5
        b = jnp.zeros((config.rank, outputs), jnp.float32)
        adapters = with_entries(adapters, path, {LORA_A: a, LORA_B: b})
        start += size
    return adapters


def with_adapters(base: dict, adapters: dict, config: Config) -> dict:
    """The base's params with the adapters laid over them, and the scale beside each: what a decoder reads.

    No array is copied; `{}` gives the base itself.

    Raises ValueError for adapters that do not belong to this base, by place or by shape.
    """
    _check(config)
    return _over(base, adapters, config, ())


def merge_lora(base: dict, adapters: dict, config: Config) -> dict:
    """The base with kernel + a @ b * scale as its kernels, float32: a plain model, to export or to go on from.

    A quantised base is dequantised first; projections without an adapter keep their kernels as they are.
    """

    merged = dequantise(base)
    for path, entries in projections(with_adapters(merged, adapters, config)).items():
        if LORA_A in entries:
            change = jnp.matmul(entries[LORA_A], entries[LORA_B], precision="highest") * entries[LORA_SCALE]
            rest = {name: x for name, x in entries.items() if name not in (LORA_A, LORA_B, LORA_SCALE)}
            kernel = entries["kernel"].astype(jnp.float32) + change
            merged = with_entries(merged, path, rest | {"kernel": kernel})
    return merged


def _check(config: Config) -> None:
    if config.rank < 1:
        raise ValueError(f"rank={config.rank} must be at least 1")
    unknown = sorted(set(config.projections) - set(PROJECTIONS))
    if unknown:
        raise ValueError(f"projections={unknown} are unknown; choose among {PROJECTIONS}")


def _scale(config: Config) -> jax.Array:
    return jnp.asarray(config.alpha / config.rank ** (0.5 if config.rank_stabilised else 1), jnp.float32)


def _over(base: dict, adapters: dict, config: Config, path: tuple[str, ...]) -> dict:
    if not adapters:
        return base
    out = dict(base)
    for name, value in adapters.items():
        if not isinstance(value, dict):
            out[name] = value
            continue
        if not isinstance(base.get(name), dict):
            raise ValueError(
                f"there are adapters for {'/'.join((*path, name))}, which the base does not have"
            )
        out[name] = _over(base[name], value, config, (*path, name))
    if LORA_A in adapters or LORA_B in adapters:
        _check_shapes(base, adapters, config, "/".join(path))
        out[LORA_SCALE] = _scale(config)
    return out


def _check_shapes(base: dict, adapters: dict, config: Config, name: str) -> None:
    inputs, outputs = kernel_shape(base)
    wanted = {LORA_A: (inputs, config.rank), LORA_B: (config.rank, outputs)}
    for entry, shape in wanted.items():
        found = adapters[entry].shape if entry in adapters else "none"
        if found != shape:
            raise ValueError(
                f"{name}/{entry} has shape {found}, the base and rank {config.rank} ask for {shape}"
            )
