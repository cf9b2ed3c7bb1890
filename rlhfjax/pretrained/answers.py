"""Answers of a chat model, one conversation at a time."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.data import Message, pad_prompts
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.networks import decoder
from rlhfjax.pretrained.model import Pretrained

_BUCKET = 32  # prompts are padded to a multiple of it, so that few lengths are compiled


class Answerer:
    """`answer(messages) -> text`: what the assistant says next.

    Args:
      max_new_tokens: most tokens of an answer; a longer one is cut.
      temperature: 0 takes the most likely token at every step.
      seed: of the draws; each answer takes a key of its own.

    Raises ValueError for a model without a chat template, a temperature or top_p out of range, and a conversation that
    leaves no room in its context.
    """

    def __init__(
        self,
        model: Pretrained,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        if model.template is None:
            raise ValueError(
                f"{model.source} has no chat template: it is no chat model. Put one into its folder as "
                "chat_template.jinja, if you know in what form it was trained"
            )
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature} must be at least 0 (greedy), top_p={top_p} above 0 and at most 1"
            )
        self._model, self._template, self._new = model, model.template, max_new_tokens
        sampling = Sampling(
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            banned_tokens=jnp.asarray(model.unused_tokens, jnp.int32) if model.unused_tokens else None,
        )
        self._generate = jax.jit(
            partial(
                generate,
                decoder(model.config),
                max_new_tokens=max_new_tokens,
                stop_tokens=model.stop_tokens,
                sampling=sampling,
            )
        )
        self._key, self._answers = jax.random.key(seed), 0

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation that ends with a message of the user."""
        model = self._model
        ids = self._template.encode(model.tokenizer, messages, add_generation_prompt=True).ids
        room = model.config.max_positions - self._new
        if len(ids) > room:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and {self._new} new ones leave room for {max(room, 0)} in "
                f"the model's {model.config.max_positions}; shorten it, or lower max_new_tokens"
            )
        token, mask = pad_prompts([ids], min(room, -(-len(ids) // _BUCKET) * _BUCKET), model.tokenizer.pad_id)
        keys = sample_keys(self._key, jnp.asarray([self._answers], jnp.int32), 1)
        self._answers += 1
        drawn = self._generate(model.params, jnp.asarray(token), jnp.asarray(mask), keys)
        said = np.asarray(drawn.token_BGC)[np.asarray(drawn.mask_BGC)]
        return model.tokenizer.decode(said.tolist()).strip()
