"""Trains the small base models that the other experiments start from, on documents alone or on translated pairs.

A Llama of about a million parameters, its tokenizer included. Of documents it never sees a summary: rows are documents
as they are, each followed by a separator and a span copied from it (a stand-in for a summary that needs no label). Of
pairs rows are sources, each followed by a separator and its translation, whatever the language (which is left to
fine-tuning). Both with rows of random tokens with repeated spans, which keep its copying general.

The result is a folder in the Hugging Face layout, RUN/model. Shipped in experiments/assets are base, of documents,
and base_translation, of pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhfjax.config import Decoder, Optimizer

DESCRIPTION = "trains the shipped base models: on documents without labels, or on translated pairs"

# A random generator of NumPy -> a sequence's ids, and the loss weight of each.
Draw = Callable[[Any], tuple[list[int], Any]]


@dataclass(frozen=True)
class Config:
    data: str = "experiments/assets/debian_summaries.jsonl.gz"
    """JSONL of documents, relative to the checkout or absolute."""
    pairs: tuple[str, ...] = ()
    """JSONL files of pairs (source_text, target_text), in place of documents; all are mixed."""
    longest: int = 48
    """Most tokens of a pair, separator and end included; longer ones are left out."""
    source_weight: float = 0.3
    """Loss weight of a pair's source; its target weighs 1."""
    vocab_size: int = 2048
    """Tokens of the byte-level BPE, specials included."""
    steps: int = 3000
    """Optimiser steps."""
    rows: int = 16
    """Packed rows in a step."""
    length: int = 128
    """Tokens in a row."""
    repeated: float = 0.15
    """Share of rows that are random tokens with repeated spans."""
    decoder: Decoder = field(default_factory=Decoder)
    """The model; its vocab_size is replaced by the tokenizer's."""
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=3e-3,
            warmup_steps=50,
            b2=0.95,
            kind="muon",
            muon_learning_rate=0.015,
        )
    )
    """AdamW for embeddings and norms, Muon for the rest."""


def plan(config: Config, mesh) -> list:
    """The program of an update, as shapes; for a tokenizer of `vocab_size` tokens."""
    import jax
    import jax.numpy as jnp

    from experiments.programs import Program, key_shape, row_shapes, state_shapes
    from rlhfjax.algorithms import sft
    from rlhfjax.mesh import check_rows
    from rlhfjax.recipes import PackedInputs

    check_rows(mesh, config.rows, what="batch (--rows)")
    _, lm, algorithm, update = _learner(config, config.vocab_size, mesh)
    state = state_shapes(mesh, lambda key: algorithm.init(lm.init(key)), jax.random.key(0))

    def at(rows: int) -> Program:
        number: Any = jax.ShapeDtypeStruct((rows, config.length), jnp.int32)
        weight: Any = jax.ShapeDtypeStruct((rows, config.length), jnp.float32)
        batch = row_shapes(mesh, sft.Batch(PackedInputs(*(number,) * 4), weight))
        return Program(
            stage="pretrain",
            name="update",
            function=update,
            arguments=(state, batch, key_shape(mesh)),
            runs=config.steps,
            parts={"parameters": state.params, "optimiser": state.opt_state, "batch": batch},
            rows=rows,
            at=at,
            uncounted="training the tokenizer",
        )

    return [at(config.rows)]


def run(config: Config, folder) -> dict[str, float]:
    """Trains the base model and writes RUN/model; returns the final numbers."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.loop import Show, run_stage
    from experiments.stages.export import on_first_process
    from rlhfjax import processes
    from rlhfjax.algorithms import evaluation_params, sft
    from rlhfjax.data import BPETokenizer, train_bpe
    from rlhfjax.mesh import init_on, make_mesh, put, put_rows
    from rlhfjax.networks import with_induction_heads
    from rlhfjax.pretrained import save_pretrained
    from rlhfjax.recipes import PackedInputs

    train = _read(config)
    model = folder.path / "model"
    model.mkdir(exist_ok=True)
    if (model / "tokenizer.json").exists():
        tokenizer = BPETokenizer.load(model / "tokenizer.json")
    else:
        # The tokenizer is part of the base and must serve the summaries too: it alone sees their words.
        tokenizer = train_bpe([text for pair in train for text in pair], config.vocab_size)
        tokenizer.save(model / "tokenizer.json")
    draw = _pairs(config, tokenizer, train) if config.pairs else _documents(config, tokenizer, train)
    mesh = make_mesh(folder.mesh)
    shape, lm, algorithm, update = _learner(config, tokenizer.vocab_size, mesh)
    key_init, key_circuit, key_update = jax.random.split(jax.random.key(folder.seed), 3)

    def init():
        params = with_induction_heads(key_circuit, jax.jit(lm.init)(key_init), shape)
        return init_on(mesh, algorithm.init, put(mesh, params))

    def batch(step: int) -> sft.Batch:
        rng = np.random.default_rng([folder.seed, step])
        rows = [
            _repeated_row(rng, config.length + 1, shape.vocab_size, tokenizer.sep_id)
            if rng.random() < config.repeated
            else _filled_row(rng, config.length + 1, draw)
            for _ in range(config.rows)
        ]
        token, segment, position, weight = map(np.stack, zip(*rows, strict=True))
        parts = token[:, :-1], token[:, 1:], position[:, :-1], segment[:, :-1]
        inputs = PackedInputs(*(jnp.asarray(x, jnp.int32) for x in parts))
        # No token is learnt from the sequence before its own.
        weight = np.where(segment[:, 1:] == segment[:, :-1], weight[:, 1:], 0.0)
        return put_rows(mesh, sft.Batch(inputs, jnp.asarray(weight, jnp.float32)))

    state = run_stage(
        "pretrain",
        folder=folder,
        init=init,
        step=lambda state, batch, i: update(state, batch, jax.random.fold_in(key_update, i)),
        batch=batch,
        steps=config.steps,
        checkpoint_every=500,
        show=Show(columns={"loss/nll": "loss"}, every=50),
    )
    params = evaluation_params(state.opt_state, state.params)
    whole, size = on_first_process(params), 0
    if processes.is_first():
        save_pretrained(model, shape, whole, dtype="float16")
        size = sum((model / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    last = folder.metrics("pretrain")[-50:]
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "megabytes": size / 1e6,
        "loss": float(np.mean([row["loss/nll"] for row in last])),
    }


def _learner(config: Config, vocab_size: int, mesh):
    """(shape of the model, model, algorithm, its update compiled for the mesh)."""
    import dataclasses

    import jax

    from rlhfjax.algorithms import make_optimizer, sft
    from rlhfjax.config import SFT
    from rlhfjax.mesh import activations, kept
    from rlhfjax.networks import decoder
    from rlhfjax.recipes import packed_logp

    shape = dataclasses.replace(config.decoder, vocab_size=vocab_size)
    lm = decoder(shape, place=activations(mesh))
    algorithm = sft.make(packed_logp(lm), make_optimizer(config.optimizer, config.steps), SFT())
    return shape, lm, algorithm, jax.jit(kept(mesh, algorithm.update), donate_argnums=0)


def _read(config: Config) -> list[tuple[str, str]]:
    """The training split: documents with their summaries, or sources with their targets."""
    from experiments.assets import asset
    from rlhfjax.data import read_jsonl

    fields = ("source_text", "target_text") if config.pairs else ("document", "summary")
    rows = [row for path in config.pairs or [config.data] for row in read_jsonl(asset(path), required=fields)]
    return [(row[fields[0]], row[fields[1]]) for row in rows if row["split"] == "train"]


def _documents(config: Config, tokenizer, train: list[tuple[str, str]]) -> Draw:
    """Draws a document with a span of it after a separator."""
    import numpy as np

    documents = [ids for ids in tokenizer.encode_batch([text for text, _ in train]) if len(ids) >= 8]
    if not documents or config.length < 50:
        raise ValueError(
            f"{config.data}: {len(documents)} training documents of 8 tokens or more, length {config.length}; "
            "at least one is needed, and a length of at least 50"
        )

    def draw(rng):
        document = documents[rng.integers(len(documents))]
        span = int(rng.integers(3, 17))
        start = int(rng.integers(0, max(1, len(document) - span)))
        ids = [*document, tokenizer.sep_id, *document[start : start + span], tokenizer.eos_id]
        return ids, np.ones(len(ids))

    return draw


def _pairs(config: Config, tokenizer, train: list[tuple[str, str]]) -> Draw:
    """Draws a source with its target after a separator."""
    import numpy as np

    encoded = (tokenizer.encode_batch(texts) for texts in zip(*train, strict=True))
    pairs = [pair for pair in zip(*encoded, strict=True) if sum(map(len, pair)) + 2 <= config.longest]
    if not pairs or config.length < 50:
        raise ValueError(
            f"{len(pairs)} pairs of at most {config.longest} tokens in {' '.join(config.pairs)}, length "
            f"{config.length}; at least one is needed, and a length of at least 50"
        )

    def draw(rng):
        source, target = pairs[rng.integers(len(pairs))]
        ids = [*source, tokenizer.sep_id, *target, tokenizer.eos_id]
        weight = np.full(len(ids), config.source_weight)
        weight[len(source) + 1 :] = 1.0
        return ids, weight

    return draw


def _filled_row(rng, length: int, draw: Draw):
    """Drawn sequences until the row is full. (token, segment, position, loss weight)"""
    import numpy as np

    parts, filled = [], 0
    while filled < length:
        ids, weight = draw(rng)
        parts.append((ids, np.full(len(ids), len(parts) + 1), np.arange(len(ids)), weight))
        filled += len(ids)
    return tuple(np.concatenate(column)[:length] for column in zip(*parts, strict=True))


def _repeated_row(rng, length, vocab_size, sep):
    """Random tokens, then spans of them again and again, each after a separator.

    (token, segment, position, loss weight)
    """
    import numpy as np

    base = rng.integers(0, vocab_size, size=int(rng.integers(16, length // 3)))
    parts, filled = [base], len(base)
    while filled < length:
        span = int(rng.integers(4, 21))
        start = int(rng.integers(0, len(base) - 4))
        parts.append(np.concatenate([[sep], base[start : start + span]]))
        filled += len(parts[-1])
    token = np.concatenate(parts)[:length]
    return token, np.ones(length, np.int32), np.arange(length), np.ones(length)
