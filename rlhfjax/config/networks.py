"""Settings of models: decoders, MLPs, and the language model that can be enumerated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context a model was pretrained with."""

    kind: str = "none"
    """none; linear (arXiv 2306.15595); llama3 (Llama 3.1); yarn (arXiv 2309.00071); longrope (arXiv 2402.13753)."""
    factor: float = 1.0
    """Times the context is stretched."""
    original_positions: int = 0
    """Positions of the pretraining; llama3, yarn and longrope need it."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_positions / this are stretched whole."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_positions / this are left."""
    beta_fast: float = 32.0
    """yarn: turns over the original context above which a frequency is left."""
    beta_slow: float = 1.0
    """yarn: turns below which a frequency is stretched whole."""
    truncate: bool = True
    """yarn: whether the bounds of the blend are rounded to whole dimensions."""
    attention_factor: float | None = None
    """yarn and longrope: what cosine and sine are multiplied by; None: as the paper computes it from the factor."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency in contexts up to original_positions, one for two rotated dimensions."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same in longer contexts. A decoder whose max_positions exceeds original_positions uses these at
    every length, as its cache must hold one kind of keys; transformers switches with the length of the input."""


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model. The defaults are a small Llama."""

    vocab_size: int = 2048
    """Tokens, special ones included."""
    width: int = 128
    """Size of the residual stream."""
    layers: int = 4
    """Blocks of attention and MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key-value heads: equal to heads is multi-head, 1 is multi-query (arXiv 2305.13245)."""
    head_size: int = 32
    """Size of one head."""
    mlp_width: int = 384
    """Hidden size of the MLP."""
    max_positions: int = 512
    """Longest sequence, prompt and completion together."""
    norm: str = "rmsnorm"
    """rmsnorm (arXiv 1910.07467) or layernorm."""
    norm_epsilon: float = 1e-5
    """Added to the variance in the norms."""
    norm_offset: bool = False
    """Whether a norm multiplies by 1 + its scale (Gemma), so that weight decay and zeros leave it alone."""
    post_norms: bool = False
    """Whether what attention and MLP give is normed too, before it is added (Gemma 2 and 3)."""
    qk_norm: bool = False
    """Whether queries and keys are normed, head by head, before they are rotated (Qwen 3, Gemma 3)."""
    parallel_blocks: bool = False
    """Whether attention and MLP of a block read the same input and are added together (GPT-NeoX)."""
    positions: str = "rotary"
    """rotary (arXiv 2104.09864) or learned."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_fraction: float = 1.0
    """Share of a head's dimensions that is rotated, the first ones (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary positions."""
    windows: tuple[int, ...] = ()
    """Of each layer the last tokens that a token sees, itself included; 0: all. Empty: every layer sees all."""
    window_rope_theta: float | None = None
    """Base of the wavelengths in layers with a window, which are not stretched then (Gemma 3); None: as the others."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: head_size ** -0.5."""
    attention_softcap: float | None = None
    """Scores x become cap * tanh(x / cap), before the mask (Gemma 2); None: they stay."""
    logit_softcap: float | None = None
    """The same of the logits over the vocabulary (Gemma 2)."""
    embedding_scale: float | None = None
    """What embedded tokens are multiplied by (Gemma: width ** 0.5, rounded to the compute type); None: 1."""
    gated_mlp: bool = True
    """Whether the MLP has a gate (SwiGLU, arXiv 2002.05202)."""
    activation: str = "silu"
    """silu, gelu (the tanh approximation), gelu_exact or relu."""
    tie_embeddings: bool = True
    """Whether input and output share one embedding."""
    attention_bias: bool = False
    """Biases on query, key and value."""
    output_bias: bool = False
    """A bias on attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    embedding_stddev: float = 0.02
    """Deviation of the embeddings' initialisation."""
    dtype: str = "float32"
    """Compute type: float32 or bfloat16. Parameters are float32 unless they were loaded otherwise."""
    packing: float | None = None
    """Where prompts and completions are evaluated: pack them into so many times the tokens of full rows, for
    completions of ragged length; a batch that does not fit takes full rows. None: always full rows, which the samples
    of a prompt share."""
    attention: str = "auto"
    """xla; cudnn (fused; bfloat16 on an NVIDIA GPU); splash (fused; a TPU, untried there); or auto: cudnn where it
    serves, else xla."""
    remat: str = "none"
    """What the backward pass computes again to save memory: none; attention (its weights alone); dots (all but products
    with parameters); block (all but what enters a block, about a third more time). XLA's CPU backend undoes it."""


@dataclass(frozen=True)
class MLP:
    """A small network for observations that are vectors (`rlhfjax.networks.mlp`)."""

    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    activation: str = "relu"
    """relu, tanh, silu or gelu."""
    layer_norm: bool = False
    """Normalise each hidden layer before its activation (arXiv 1607.06450); PQN depends on it."""
    dueling: bool = False
    """Q = V + advantage - mean advantage, from two heads (arXiv 1511.06581)."""
    output_scale: float = 1.0
    """Initial size of the last layer, relative to that of the others; small: values start near 0."""


@dataclass(frozen=True)
class Enumerable:
    """A language model of which every sequence can be listed (`rlhfjax.environments.enumerable`)."""

    vocab_size: int = 8
    """Tokens."""
    length: int = 3
    """Positions; without a stop token every sequence has so many."""
    stop_token: int | None = None
    """The token that ends a sequence early; None: there is none."""
