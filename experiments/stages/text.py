"""Text in: the tokenizer, the base model, and pairs or conversations, split between fine-tuning and reinforcement
learning."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.assets import asset
from experiments.stages.chats import Examples, load_chats
from experiments.stages.configs import Text as Config
from rlhfjax.algorithms import Algorithm
from rlhfjax.config import LoRA, Mesh
from rlhfjax.data import (
    BPETokenizer,
    ChatTemplate,
    Packed,
    PretrainedTokenizer,
    encode_pairs,
    load_pairs,
    pack,
    pad_prompts,
)
from rlhfjax.mesh import (
    Devices,
    activations,
    gathered_to_decode,
    init_on,
    kept,
    make_mesh,
    place_params,
    put,
    put_rows,
)
from rlhfjax.networks import LanguageModel, adapted, decoder, init_lora, quantise
from rlhfjax.pretrained import find_model, load_pretrained, open_model, pretrained_config
from rlhfjax.recipes import Prompts


@dataclass(frozen=True)
class Text:
    """What every stage needs to know of the text."""

    config: Config
    tokenizer: BPETokenizer | PretrainedTokenizer
    lm: LanguageModel  # of whole parameters, as the base's are
    base: dict  # parameters of the base model
    stop_tokens: tuple[int, ...]
    unused_tokens: tuple[int, ...] = ()  # ids of the model that the tokenizer does not have
    template: ChatTemplate | None = None  # None: prompts are plain text
    lora: LoRA | None = None  # trained are adapters on the base; None: the whole model
    source: Path | None = None  # where the base lies
    mesh: Devices = field(default_factory=make_mesh)

    def jit(
        self, build: Callable[[LanguageModel], Callable[..., Any]], *, donate_argnums: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """`build(lm)` compiled, lm being the language model whose params are those that are trained: the whole model's,
        or adapters. Of these the base is an argument of the program, one copy for all that stand on it.

        A program that has its first argument donated returns, first, a state that lies as that did.
        """

        def program(lm: LanguageModel) -> Callable[..., Any]:
            return kept(self.mesh, build(lm)) if donate_argnums else build(lm)

        if self.lora is None:
            return jax.jit(program(self.lm), donate_argnums=donate_argnums)
        lora = self.lora

        def on_base(base: dict, *arguments: Any) -> Any:
            return program(adapted(self.lm, base, lora))(*arguments)

        return partial(jax.jit(on_base, donate_argnums=tuple(i + 1 for i in donate_argnums)), self.base)

    def start(self, key: jax.Array) -> dict:
        """The params that training starts from: the base, or adapters that change nothing. The key is consumed."""
        if self.lora is None:
            return self.base
        return init_on(self.mesh, jax.jit(partial(init_lora, config=self.lora)), key, self.base)

    def compiled(self, make: Callable[[LanguageModel], Algorithm]) -> Algorithm:
        """The algorithm `make(lm)`: its `init(params)` puts the state where it belongs, its `update` is one program
        that donates it."""
        return Algorithm(
            partial(self.init, make(self.lm).init), self.jit(lambda lm: make(lm).update, donate_argnums=(0,))
        )

    def init(self, init: Callable[[dict], Any], params: dict) -> Any:
        """`init(params)`, the state that training starts from, where it belongs. Its arrays are its own: the state is
        donated, and what it starts from must outlive it."""
        return init_on(self.mesh, init, jax.tree.map(jnp.array, put(self.mesh, params)))

    def rows(self, batch: Any) -> Any:
        """A batch whose arrays all have a row for each prompt, or packed row, where it belongs."""
        return put_rows(self.mesh, batch)

    def load(self, split: str) -> Examples:
        """The pairs or conversations of one split that fit the configured lengths."""
        config = self.config
        if self.template is not None:
            assert isinstance(self.tokenizer, PretrainedTokenizer)
            return load_chats(config, self.tokenizer, self.template, split)
        pairs = load_pairs(
            asset(config.data),
            split=split,
            prompt_field=config.prompt_field,
            completion_field=config.completion_field,
        )
        encoded = encode_pairs(
            self.tokenizer,
            pairs,
            prompt_length=config.prompt_length,
            completion_length=config.completion_length,
            drop=True,
        )
        kept = [pairs[i] for i in encoded.row]
        return Examples(
            [pair.prompt for pair in kept],
            [pair.completion for pair in kept],
            encoded.prompts,
            encoded.dropped,
            completions=encoded.completions,
        )

    def pack(self, examples: Examples, rows: np.ndarray, length: int) -> Packed:
        """The examples numbered `rows` in rows of `length` tokens, for fine-tuning.

        Raises ValueError where they hold nothing to learn.
        """
        if examples.completions is None:
            raise ValueError(
                f"{self.config.data} has prompts alone and nothing to fine-tune on: give rows a completion or "
                "messages, or ask for no step of it (--sft.steps 0)"
            )
        chosen = [examples.completions[i] for i in rows]
        if examples.learnt is None:
            prompts, masks = [examples.ids[i] for i in rows], None
        else:
            prompts, masks = [[] for _ in rows], [examples.learnt[i] for i in rows]
        return pack(prompts, chosen, length=length, pad_id=self.tokenizer.pad_id, masks=masks)

    def batch(self, examples: Examples, index: np.ndarray) -> Prompts:
        """The prompts at `index`, padded."""
        ids = [examples.ids[i] for i in index]
        token, mask = pad_prompts(ids, self.config.prompt_length, self.tokenizer.pad_id)
        return self.rows(Prompts(jnp.asarray(token), jnp.asarray(mask), jnp.asarray(index, jnp.int32)))

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id of the tokenizer stands for: what rewards on the device make their tables of."""
        return [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]

    def decode(self, token_BGC: np.ndarray, mask_BGC: np.ndarray) -> list[list[str]]:
        """Texts of completions, [B][G]; the stop token is left out."""
        batch, samples, _ = token_BGC.shape
        rows = [
            token[mask].tolist()
            for token, mask in zip(
                token_BGC.reshape(batch * samples, -1), mask_BGC.reshape(batch * samples, -1), strict=True
            )
        ]
        texts = [text.strip() for text in self.tokenizer.decode_batch(rows)]
        return [texts[i * samples : (i + 1) * samples] for i in range(batch)]


class Writer(NamedTuple):
    """A policy to sample: its parameters, and the language model that they are of."""

    params: dict
    # The text's language model -> that of `params`: the same, or the same guided by a value.
    model: Callable[[LanguageModel], LanguageModel] = lambda lm: lm


def open_text(config: Config, layout: Mesh = Mesh()) -> Text:  # noqa: B008  (frozen, so it can be shared)
    """Loads tokenizer and base model, each device its part of it.

    Raises ValueError where the settings contradict each other or the model's size.
    """
    if config.trained == "all" and config.base_bits != 32:
        raise ValueError(
            f'base_bits={config.base_bits} is for a base that is not trained: give trained="lora" too'
        )
    name = asset(config.base)
    source = find_model(name if name.exists() else config.base)
    stored = "float32" if config.base_bits == 32 else "bfloat16"
    length = config.prompt_length + config.completion_length
    mesh = make_mesh(layout, state_bytes=_state_bytes(config, source))
    place = place_params(mesh) if config.base_bits in (32, 16) else None
    if (source / "tokenizer.json").is_file() and not (source / "tokenizer_config.json").exists():
        if config.chat:
            raise ValueError(
                f"{source} is no chat model: it has no tokenizer_config.json, and no chat template"
            )
        shape, params = load_pretrained(source, dtype=stored, compute_dtype=config.compute, place=place)
        tokenizer = BPETokenizer.load(source / "tokenizer.json")
        if tokenizer.vocab_size > shape.vocab_size:
            raise ValueError(
                f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {shape.vocab_size}"
            )
        stops, unused, template = (tokenizer.eos_id,), (), None
    else:
        model = open_model(source, dtype=stored, compute_dtype=config.compute, place=place)
        _, shape, params, tokenizer, template, stops, unused = model
        if config.chat and template is None:
            raise ValueError(
                f"{source} has no chat template: it is no chat model; give another base, or take --no-text.chat"
            )
        template = template if config.chat else None
        stops = stops if config.chat else tokenizer.stop_ids
    if length > shape.max_positions:
        raise ValueError(
            f"prompt_length {config.prompt_length} + completion_length {config.completion_length} exceed the "
            f"{shape.max_positions} positions of {source}"
        )
    if config.base_bits in (8, 4):
        params = quantise(params, config.base_bits)
    lora = config.lora if config.trained == "lora" else None
    shape = dataclasses.replace(shape, remat=config.remat)
    lm = gathered_to_decode(mesh, decoder(shape, place=activations(mesh)))
    params = put(mesh, params)
    return Text(config, tokenizer, lm, params, stops, unused, template, lora, source, mesh)


def _state_bytes(config: Config, source: Path) -> float:
    """About what training holds, for the choice of a mesh: policy and critic with their gradients and two moments in
    float32 beside the reference and the reward model, or the base under adapters. 0 of what is an adapter itself.
    """
    if source.is_dir() and not (source / "config.json").exists():
        return 0.0
    shapes = jax.eval_shape(decoder(pretrained_config(source)).init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    return count * (config.base_bits / 8 if config.trained == "lora" else 2 * 16 + 2 * 4)


def divide(
    examples: Examples, share: float, seed: int, *, finetuned: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for fine-tuning (a `share` of them, drawn without replacement) and for the rest; without fine-tuning
    none and all."""
    if not 0 < share < 1:
        raise ValueError(f"sft_share must lie between 0 and 1, got {share}")
    order = np.random.default_rng([seed, 1]).permutation(len(examples))
    if not finetuned:
        return order[:0], order
    cut = round(share * len(examples))
    if not 0 < cut < len(examples):
        raise ValueError(f"sft_share {share} of {len(examples)} rows leaves nothing on one side")
    return order[:cut], order[cut:]
