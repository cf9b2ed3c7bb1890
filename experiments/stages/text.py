"""Text in: the tokenizer, the base model, and pairs split between fine-tuning and reinforcement learning."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.assets import asset
from experiments.stages.configs import Text as Config
from rlhfjax.config import LoRA
from rlhfjax.data import BPETokenizer, Encoded, encode_pairs, load_pairs, pad_prompts
from rlhfjax.networks import LanguageModel, adapted, decoder, init_lora
from rlhfjax.pretrained import load_pretrained
from rlhfjax.recipes import Prompts


@dataclass(frozen=True)
class Examples:
    """Pairs that fit, as texts and as ids."""

    prompts: list[str]
    references: list[str]
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Text:
    """What every stage needs to know of the text."""

    config: Config
    tokenizer: BPETokenizer
    lm: LanguageModel  # of whole parameters, as the base's are
    base: dict  # parameters of the base model
    lora: LoRA | None = None  # trained are adapters on the base; None: the whole model

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id,)

    def jit(
        self, build: Callable[[LanguageModel], Callable[..., Any]], *, donate_argnums: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """`build(lm)` compiled, lm being the language model whose params are those that are trained: the whole model's,
        or adapters. Of these the base is an argument of the program, one copy for all that stand on it.
        """
        if self.lora is None:
            return jax.jit(build(self.lm), donate_argnums=donate_argnums)
        lora = self.lora

        def on_base(base: dict, *arguments: Any) -> Any:
            return build(adapted(self.lm, base, lora))(*arguments)

        return partial(jax.jit(on_base, donate_argnums=tuple(i + 1 for i in donate_argnums)), self.base)

    def start(self, key: jax.Array) -> dict:
        """The params that training starts from, arrays of their own: a copy of the base, or adapters that change
        nothing. The key is consumed.
        """
        if self.lora is None:
            return jax.tree.map(jnp.array, self.base)
        return jax.jit(partial(init_lora, config=self.lora))(key, self.base)

    def load(self, split: str) -> Examples:
        """The pairs of one split that fit the configured lengths."""
        config = self.config
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
        return Examples([pair.prompt for pair in kept], [pair.completion for pair in kept], encoded)

    def batch(self, examples: Examples, index: np.ndarray) -> Prompts:
        """The prompts at `index`, padded."""
        ids = [examples.encoded.prompts[i] for i in index]
        token, mask = pad_prompts(ids, self.config.prompt_length, self.tokenizer.pad_id)
        return Prompts(jnp.asarray(token), jnp.asarray(mask), jnp.asarray(index, jnp.int32))

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


def open_text(config: Config) -> Text:
    """Loads tokenizer and base model."""
    folder = asset(config.base)
    shape, params = load_pretrained(folder)
    tokenizer = BPETokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {shape.vocab_size}"
        )
    if config.prompt_length + config.completion_length > shape.max_positions:
        raise ValueError(
            f"prompt_length {config.prompt_length} + completion_length {config.completion_length} exceed the "
            f"{shape.max_positions} positions of {folder}"
        )
    return Text(config, tokenizer, decoder(shape), params)


def divide(examples: Examples, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for fine-tuning (a `share` of them, drawn without replacement) and for the rest."""
    if not 0 < share < 1:
        raise ValueError(f"sft_share must lie between 0 and 1, got {share}")
    order = np.random.default_rng([seed, 1]).permutation(len(examples))
    cut = round(share * len(examples))
    if not 0 < cut < len(examples):
        raise ValueError(f"sft_share {share} of {len(examples)} rows leaves nothing on one side")
    return order[:cut], order[cut:]
