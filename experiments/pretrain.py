"""Trains the small base model that the other experiments start from, on the documents alone.

A Llama of 1.1 million parameters, its tokenizer included. It never sees a summary: rows are documents as they are,
each followed by a separator and a span copied from it (a stand-in for a summary that needs no label), and random
tokens with repeated spans, which keep its copying general.

The result is a folder in the Hugging Face layout, RUN/model. The one shipped lies in experiments/assets/base.
"""

from dataclasses import dataclass, field
from typing import Any

from rlhfjax.config import Decoder, Optimizer

DESCRIPTION = "trains the shipped base model on documents, without labels"


@dataclass(frozen=True)
class Config:
    data: str = "experiments/assets/debian_summaries.jsonl.gz"
    """JSONL of documents, relative to the checkout or absolute."""
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

    from experiments.assets import asset
    from experiments.loop import Show, run_stage
    from experiments.stages.export import on_first_process
    from rlhfjax import processes
    from rlhfjax.algorithms import evaluation_params, sft
    from rlhfjax.data import BPETokenizer, read_jsonl, train_bpe
    from rlhfjax.mesh import init_on, make_mesh, put, put_rows
    from rlhfjax.networks import with_induction_heads
    from rlhfjax.pretrained import save_pretrained
    from rlhfjax.recipes import PackedInputs

    rows = read_jsonl(asset(config.data), required=("document", "summary"))
    train = [row for row in rows if row["split"] == "train"]
    model = folder.path / "model"
    model.mkdir(exist_ok=True)
    if (model / "tokenizer.json").exists():
        tokenizer = BPETokenizer.load(model / "tokenizer.json")
    else:
        # The tokenizer is part of the base and must serve the summaries too: it alone sees their words.
        tokenizer = train_bpe(
            [text for row in train for text in (row["document"], row["summary"])], config.vocab_size
        )
        tokenizer.save(model / "tokenizer.json")
    documents = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch([r["document"] for r in train])]
    documents = [ids for ids in documents if len(ids) >= 8]
    if not documents or config.length < 50:
        raise ValueError(
            f"{config.data}: {len(documents)} training documents of 8 tokens or more, length {config.length}; "
            "at least one is needed, and a length of at least 50"
        )
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
            else _document_row(rng, config.length + 1, documents, tokenizer.sep_id, tokenizer.eos_id)
            for _ in range(config.rows)
        ]
        token, segment, position = (np.stack(column).astype(np.int32) for column in zip(*rows, strict=True))
        parts = token[:, :-1], token[:, 1:], position[:, :-1], segment[:, :-1]
        inputs = PackedInputs(*map(jnp.asarray, parts))
        weight = jnp.asarray(segment[:, 1:] == segment[:, :-1], jnp.float32)
        return put_rows(mesh, sft.Batch(inputs, weight))

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


def _document_row(rng, length, documents, sep, eos):
    """Documents, each with a span of it after a separator, until the row is full. (token, segment, position)"""
    import numpy as np

    token, segment, position, filled, number = [], [], [], 0, 1
    while filled < length:
        document = documents[rng.integers(len(documents))]
        span = int(rng.integers(3, 17))
        start = int(rng.integers(0, max(1, len(document) - span)))
        ids = np.concatenate([document, [sep], document[start : start + span], [eos]])
        token.append(ids)
        segment.append(np.full(len(ids), number))
        position.append(np.arange(len(ids)))
        filled, number = filled + len(ids), number + 1
    return tuple(np.concatenate(column)[:length] for column in (token, segment, position))


def _repeated_row(rng, length, vocab_size, sep):
    """Random tokens, then spans of them again and again, each after a separator. (token, segment, position)"""
    import numpy as np

    base = rng.integers(0, vocab_size, size=int(rng.integers(16, length // 3)))
    parts, filled = [base], len(base)
    while filled < length:
        span = int(rng.integers(4, 21))
        start = int(rng.integers(0, len(base) - 4))
        parts.append(np.concatenate([[sep], base[start : start + span]]))
        filled += len(parts[-1])
    token = np.concatenate(parts)[:length]
    return token, np.ones(length, np.int32), np.arange(length)
