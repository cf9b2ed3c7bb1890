"""Settings every test runs under; they must be in place before JAX starts its backend.

CPU only (so that numbers do not depend on the machine's accelerator), four virtual devices (so that sharding
is exercised on any machine), and an error wherever two arrays of unequal rank would be broadcast silently.
"""

import os
import zlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["RLHFJAX_CACHE_DIR"] = ""  # experiments keep their compiled programs where the other tests do

import jax
import pytest
from metric_table import unlisted

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", metavar="K/N", help="run only the K-th of N shares of the tests, or several: 2,3/3"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the shares asked for. A test is in the same share whatever else is installed and collected."""
    if config.option.share is None:
        return
    asked, _, of = config.option.share.partition("/")
    if not of.isdigit() or not all(k.isdigit() and 1 <= int(k) <= int(of) for k in asked.split(",")):
        raise pytest.UsageError(
            f"--share {config.option.share}: give K/N with 1 <= K <= N, such as 1/3 or 2,3/3"
        )
    shares = {int(k) - 1 for k in asked.split(",")}
    kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % int(of) in shares]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """Most of a run's time is compilation: most of that is saved by optimising nothing, unless XLA_FLAGS says how
    much, and compiled programs are kept from one test run to the next.

    `pytest --cache-clear` empties the store, `-p no:cacheprovider` does without it. Of a damaged entry JAX
    warns, and compiles anew.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in given:
        flags = [given, "--xla_backend_optimization_level=0"]
        if jax.__version_info__ < (0, 11):  # later ones abort at a flag that they do not know
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def _metrics_are_listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end: docs/metrics.md has every metric that a run of an experiment has logged in a folder of the tests."""
    yield
    missing = sorted(set(unlisted(tmp_path_factory.getbasetemp())))
    assert not missing, "metrics that no table of docs/metrics.md has:\n" + "\n".join(missing)


@pytest.fixture
def key() -> jax.Array:
    """A typed random key; every test that asks for it starts from the same one."""
    return jax.random.key(0)
