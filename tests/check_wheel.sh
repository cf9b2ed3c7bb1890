#!/usr/bin/env bash
# Builds the wheel and the source distribution, and tries the wheel in an environment of its own, away from this checkout:
# it imports, updates, and carries its data; neither tests nor experiments are in it. Usage: tests/check_wheel.sh [PYTHON]
# Needs a package index for what the package needs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 JAX_PLATFORMS=cpu

mkdir "$work/source"
(cd "$root" && git ls-files -z -- pyproject.toml README.md LICENSE CHANGELOG.md rlhfjax | xargs -0 cp --parents -t "$work/source")
"$python" -m venv "$work/env"
"$work/env/bin/pip" install --quiet build twine
"$work/env/bin/python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
"$work/env/bin/twine" check --strict "$work"/dist/*

"$work/env/bin/python" - "$work"/dist/*.whl "$work"/dist/*.tar.gz "$root" <<'PYTHON'
import subprocess, sys, tarfile, zipfile

wheel, source, root = sys.argv[1:]
names = zipfile.ZipFile(wheel).namelist()
listed = subprocess.run(["git", "ls-files", "rlhfjax"], cwd=root, check=True, capture_output=True, text=True).stdout
missing = set(listed.split()) - set(names)
assert not missing, f"not in the wheel: {sorted(missing)}"
strangers = {name.split("/")[0] for name in names} - {"rlhfjax"}
assert len(strangers) == 1 and strangers.pop().endswith(".dist-info"), "more than rlhfjax is in the wheel"
with tarfile.open(source) as packed:
    inside = {name.split("/", 1)[-1] for name in packed.getnames()}
assert {"pyproject.toml", "README.md", "LICENSE", "rlhfjax/py.typed"} <= inside, "the source distribution is not whole"
print(f"{len(names)} files in the wheel, {len(inside)} in the source distribution")
PYTHON

"$python" -m venv "$work/user"
"$work/user/bin/pip" install --quiet "$(echo "$work"/dist/*.whl)"
cd "$work"
"$work/user/bin/python" -P - <<'PYTHON'
import time

start = time.perf_counter()
import rlhfjax

seconds = time.perf_counter() - start
import jax, jax.numpy as jnp, optax
from rlhfjax.algorithms import sft
from rlhfjax.config import SFT
from rlhfjax.environments.text import wordle

assert "site-packages" in rlhfjax.__file__, rlhfjax.__file__
algorithm = sft.make(lambda logits, token: jax.nn.log_softmax(logits)[token], optax.sgd(1.0), SFT())
batch = sft.Batch(jnp.array([[2, 2, 3]]), weight=jnp.array([[1.0, 1.0, 0.0]]))
state, metrics = jax.jit(algorithm.update)(algorithm.init(jnp.zeros(4)), batch, jax.random.key(0))
assert int(jnp.argmax(state.params)) == 2 and metrics["optimizer/refused"] == 0
print(f"import rlhfjax: {seconds:.2f} s; one update: loss {float(metrics['loss/nll']):.3f} nats a token")
PYTHON
