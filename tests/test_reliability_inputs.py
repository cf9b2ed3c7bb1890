"""Spoilt files, hostile ones, and what the source may call: nothing that is read is run. More: tests/reliability.py."""

import ast
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import reliable_inputs
import yaml

from experiments.arrays import read_arrays, save_arrays
from experiments.options import read_yaml
from rlhfjax.data import ChatTemplate
from rlhfjax.pretrained import load_pretrained

pytest.importorskip("gguf")

ROOT = Path(__file__).resolve().parents[1]
TARGETS = reliable_inputs.targets()
CASES = 25
PEERS = "experiments/benchmarks/peers.py"  # runs other libraries beside ours; reads no file of theirs
OURS = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("rlhfjax", "experiments")
    for path in (ROOT / room).rglob("*.py")
)


@pytest.mark.reliability
@pytest.mark.parametrize("name", TARGETS)
def test_a_spoilt_file_is_read_or_named(name, tmp_path):
    seen = reliable_inputs.fuzz(TARGETS[name], tmp_path, CASES)
    assert seen.total() >= CASES and seen.keys() <= {"read", "clear error"}


def test_the_fuzzer_finds_a_reader_that_names_nothing(tmp_path):
    """A check of the checker: an IndexError, and a ValueError without the file's name, are failures."""
    bad = [
        lambda f: (f / "a.jsonl").read_text()[200],
        lambda f: yaml.safe_load((f / "a.jsonl").read_bytes())["a"],
    ]
    for read in bad:
        target = reliable_inputs.Target(
            "a.jsonl", lambda f: (f / "a.jsonl").write_text("a: " + "x" * 300), read
        )
        with pytest.raises(AssertionError):
            reliable_inputs.fuzz(target, tmp_path, 40)


# ------------------------------------------------------------------------------------------------ hostile on purpose

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(messages[0]) }}",
    "{{ (messages[0].content ~ '').format.__self__.__class__ }}",
    "{{ '{0.__class__.__base__}'.format(messages) }}",
)
ENDLESS = (
    "{% for i in range(999999999) %}x{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_but_its_messages(source):
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])
    except ValueError as error:
        assert "the chat template refuses" in str(error)
    else:
        assert text == ""  # a name that is not defined


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_ends(source):
    with reliable_inputs.limit(10), pytest.raises(ValueError, match="the chat template refuses"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])


def test_the_tag_of_an_object_in_yaml_makes_none(tmp_path):
    (tmp_path / "c.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/made']\n")
    with pytest.raises(ValueError, match="c.yaml is not valid YAML"):
        read_yaml(tmp_path / "c.yaml")
    assert not (tmp_path / "made").exists()


def test_arrays_hold_no_objects_and_do_not_grow(tmp_path):
    objects = np.array([Path(tmp_path)], dtype=object)
    with pytest.raises(TypeError, match="'x'"):
        save_arrays(tmp_path / "a.npz", {"x": objects})
    np.savez(tmp_path / "pickled.npz", x=objects)
    with pytest.raises(ValueError, match="pickled.npz is damaged .*allow_pickle=False"):
        read_arrays(tmp_path / "pickled.npz")
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(4_000_000))
    with pytest.raises(ValueError, match="bomb.npz is damaged .*compressed"):
        read_arrays(tmp_path / "bomb.npz")


@pytest.mark.parametrize("length", [0, 2**31, 2**62, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is(length, tmp_path):
    from tiny_chat import write_chat_model

    from rlhfjax.pretrained import read_gguf

    write_chat_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_pretrained(tmp_path)
    for tensors, entries in ((length, 1), (1, length)):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + bytes(64))
        with reliable_inputs.limit(10):
            try:
                found = read_gguf(tmp_path / "m.gguf")
            except ValueError as error:
                assert "m.gguf" in str(error)
            else:
                assert length == 0 and len(found.tensors) <= 1


@pytest.mark.parametrize("layers", [10**20, "2", 0, True, {"a": 1}])
def test_sizes_that_no_model_has(layers, tmp_path):
    (tmp_path / "model").mkdir()
    reliable_inputs.targets()["model: config.json"].write(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    with reliable_inputs.limit(10), pytest.raises(ValueError, match="config.json: layers is"):
        load_pretrained(tmp_path / "model")


# ----------------------------------------------------------------------------------------------- what is never called

# Modules that make objects of what they read, or run it; and calls that do.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "torch"}
CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "np.loadtxt",
}


def offences(source: str) -> list[str]:
    """Calls and imports of `source` that may run what was read, in words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS or keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
                found.append(ast.unparse(node))
            if name == "np.load" and keywords.get("allow_pickle") != "False":
                found.append(ast.unparse(node))
            if name.endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
                found += [f"import {m}" for m in (str(node.args[0].value).split(".")[0],) if m in MODULES]
    return found


def test_nothing_that_is_read_is_run():
    found = {path: offences((ROOT / path).read_text()) for path in OURS if path not in PEERS}
    assert len(found) > 300 and {path: bad for path, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from torch import load", "eval(x)", "yaml.load(f)", "np.load(f)"),
        *("np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "import_module('dill')"),
    ],
)
def test_each_of_them_is_seen(source):
    assert offences(source)
    assert not offences("yaml.safe_load(f); np.load(f, allow_pickle=False); import json")
