"""Small networks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import MLP
from rlhfjax.networks.mlp import mlp


def forward64(params, x, config, outputs, numbers):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for i in range(len(config.hidden)):
        layer = params[f"hidden_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        if config.layer_norm:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * layer["norm_scale"] + layer["norm_bias"]
        x = np.maximum(x, 0) if config.activation == "relu" else np.tanh(x)
    out = (x @ params["output"]["kernel"] + params["output"]["bias"]).reshape(len(x), outputs, numbers)
    if config.dueling:
        value = x @ params["value"]["kernel"] + params["value"]["bias"]
        out = value[:, None, :] + out - out.mean(1, keepdims=True)
    return out


@pytest.mark.parametrize(
    "config",
    [
        MLP(hidden=(5, 4)),
        MLP(hidden=(5,), layer_norm=True, dueling=True),
        MLP(hidden=(), activation="tanh", dueling=True),
    ],
)
def test_outputs_equal_numpy(config, key):
    observation = jax.random.normal(key, (3, 2, 4))
    for quantiles in (None, 3):
        network = mlp(config, (2, 4), 6, quantiles=quantiles)
        params = jax.tree.map(lambda p: p + 0.1, network.init(key))  # biases that matter
        got = jax.jit(network.apply)(params, observation)
        expected = forward64(
            params, np.asarray(observation, np.float64).reshape(3, 8), config, 6, quantiles or 1
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got.reshape(3, 6, -1), expected, rtol=1e-4, atol=1e-5)
        one = network.apply(params, observation[1])
        np.testing.assert_allclose(one, got[1], rtol=1e-5, atol=1e-6)


def test_the_start_has_the_stated_size(key):
    params = mlp(MLP(hidden=(256, 256), output_scale=0.1), (64,), 256).init(key)
    np.testing.assert_allclose(jnp.std(params["hidden_0"]["kernel"]), (2 / 64) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(jnp.std(params["output"]["kernel"]), 0.1 * (2 / 256) ** 0.5, rtol=0.05)
    assert not jnp.any(params["hidden_1"]["bias"])


def test_bad_input_is_named(key):
    with pytest.raises(ValueError, match="activation='ReLU' is unknown; choose among relu"):
        mlp(MLP(activation="ReLU"), (2,), 3)
    network = mlp(MLP(), (2,), 3)
    with pytest.raises(ValueError, match=r"an observation has shape \(2,\), got \(4, 3\)"):
        network.apply(network.init(key), jnp.zeros((4, 3)))
