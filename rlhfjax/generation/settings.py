"""The settings of sampling. Every one is an array, one for all rows or one per row, so that changing it compiles
nothing anew.

Shapes: R rows, k token ids, C steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
    """What turns logits into a distribution, in the order in which transformers applies it.

    The order is: repetition penalty, banned tokens, minimum length, forced tokens; temperature, top-k, top-p (of what
    top-k kept), min-p. Numbers are scalars or [R]; lists of token ids [k] or [R, k], those of -1 void. None is off and
    leaves no trace in the program. At least one token of every row must remain; its log-probabilities are NaN if not.
    """

    temperature: jax.Array | float = 1.0  # logits are divided by it; 0 means greedy
    top_k: jax.Array | int = 0  # keep the k most likely; 0 keeps all. Ties with the k-th are kept.
    # Keep the fewest tokens whose mass reaches top_p; 1 keeps all (arXiv 1904.09751).
    top_p: jax.Array | float = 1.0
    # Keep tokens of at least min_p times the largest probability (arXiv 2407.01082).
    min_p: jax.Array | float = 0.0
    # Logits of tokens in the prompt or drawn before are divided by it where positive, else multiplied (arXiv
    # 1909.05858); 1 changes nothing. Padding of the prompt does not count.
    repetition_penalty: jax.Array | float | None = None
    banned_tokens: jax.Array | None = None  # int32 ids that are never drawn
    min_new_tokens: jax.Array | int | None = None  # no stop token is drawn before as many others
    # int32 [C] or [R, C]: the token of each step, -1 where it is free; steps past its end are free. It is drawn
    # whatever the others say, with processed log-probability 0.
    forced_tokens: jax.Array | None = None


# Rank of a setting that holds for all rows; one more where each row has its own.
_RANK = {
    "temperature": 0,
    "top_k": 0,
    "top_p": 0,
    "min_p": 0,
    "repetition_penalty": 0,
    "banned_tokens": 1,
    "min_new_tokens": 0,
    "forced_tokens": 1,
}
_INTEGERS = ("top_k", "banned_tokens", "min_new_tokens", "forced_tokens")


def check_sampling(sampling: Sampling, rows: int) -> None:
    """Raises TypeError on a wrong dtype and ValueError on a wrong shape, naming the setting."""
    for name, rank in _RANK.items():
        setting = getattr(sampling, name)
        if setting is not None:
            _check(f"sampling.{name}", setting, rank, rows, integer=name in _INTEGERS)


def as_stop_tokens(stop_tokens: jax.Array | tuple[int, ...], vocabulary: int, rows: int) -> jax.Array:
    """Stop tokens as an int32 array [k] or [R, k], -1 void; a tuple may be empty.

    Raises TypeError where they are no integers, ValueError on a wrong shape and, where the ids are known while
    tracing, on one outside the vocabulary.
    """
    if not isinstance(stop_tokens, jax.Array):
        known = np.asarray(stop_tokens)
        known = known.astype(np.int32) if known.size == 0 else known
        wrong = known[(known < -1) | (known >= vocabulary)]
        if wrong.size:
            raise ValueError(
                f"stop_tokens: {wrong[0]} is no token id; the vocabulary has {vocabulary} (0 to {vocabulary - 1}, "
                "and -1 for none)"
            )
        stop_tokens = jnp.asarray(known)
    _check("stop_tokens", stop_tokens, 1, rows, integer=True)
    return stop_tokens.astype(jnp.int32)


def take_rows(sampling: Sampling, stop_tokens: jax.Array, row_S: jax.Array) -> tuple[Sampling, jax.Array]:
    """The settings of the given rows; those that hold for all stay as they are."""

    def take(setting, rank: int) -> jax.Array:
        setting = jnp.asarray(setting)
        return setting if setting.ndim == rank else setting[row_S]

    given = {name: setting for name, setting in sampling._asdict().items() if setting is not None}
    taken = {name: take(setting, _RANK[name]) for name, setting in given.items()}
    return sampling._replace(**taken), take(stop_tokens, 1)


def _check(name: str, setting: jax.Array | float, rank: int, rows: int, *, integer: bool) -> None:
    setting = jnp.asarray(setting)
    kind, wanted = (jnp.integer, "integers") if integer else (jnp.number, "numbers")
    if not jnp.issubdtype(setting.dtype, kind):
        raise TypeError(f"{name} must be {wanted}, got {setting.dtype}")
    every, each = ("a scalar", "[R]") if rank == 0 else ("[k]", "[R, k]")
    if setting.ndim not in (rank, rank + 1) or (setting.ndim > rank and setting.shape[0] != rows):
        raise ValueError(f"{name} must be {every} or {each} with R = {rows} rows, got shape {setting.shape}")
