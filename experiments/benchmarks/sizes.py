"""The sizes that all benchmarks share. No jax here, so that `--help` answers at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Model and batch. The model is a Llama: RMS norms, rotary positions, a gated MLP, multi-head attention.

    A sequence is a prompt and a completion: prompt_length + new_tokens tokens, none of them padding.
    """

    layers: int = 4
    """Blocks."""
    width: int = 256
    """Size of the residual stream."""
    heads: int = 4
    """Heads, each of size width / heads."""
    kv_heads: int = 0
    """Key-value heads, which divide the heads; 0: as many as heads."""
    mlp_width: int = 1024
    """Hidden size of the MLP."""
    tie_embeddings: bool = False
    """Whether input and output share one embedding."""
    dtype: str = "float32"
    """Compute type: float32 or bfloat16."""
    attention: str = "auto"
    """Attention's kernel: auto, xla, cudnn or splash."""
    remat: str = "none"
    """What the backward pass computes again: none, attention, dots or block."""
    lora_rank: int = 0
    """In sft and grpo, adapters of this rank are trained on a frozen base; 0: the whole model."""
    packing: float | None = None
    """Pack the sequences of updates into so many times the tokens of full rows; None: full rows."""
    batch: int = 16
    """Sequences in a step; for the reward model, pairs."""
    samples: int = 4
    """Samples of each prompt in ppo_grouped; divides the batch."""
    prompt_length: int = 32
    """Tokens of a prompt."""
    new_tokens: int = 96
    """Tokens of a completion."""
    generation_vocab_size: int = 8192
    """Vocabulary where only generation is measured."""
    training_vocab_size: int = 4096
    """Vocabulary where there is an update."""
    top_p: float = 0.9
    """Nucleus of generate_top_p."""
    mean_tokens: int = 24
    """Mean of the lengths in the ragged cases, which are geometric and at most new_tokens."""
    ragged_batches: int = 4
    """Completions in the ragged cases, in batches."""
    memory_length: int = 512
    """Tokens of a completion in the memory cases."""
    memory_vocab_size: int = 50_000
    """Vocabulary of the memory cases."""
    seeds: int = 1
    """Runs trained together in ppo_seeds and the control cases, by `vmap`."""
    control_iterations: int = 100
    """Iterations of acting and learning in one step of a control case, one program."""
    matmul_size: int = 2048
    """Rows and columns of the float32 product that measures the machine's ceiling."""
