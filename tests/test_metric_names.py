"""docs/metrics.md names every metric that the code emits, and none that it does not."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from rlhfjax.algorithms import grpo, ppo
from rlhfjax.config import GRPO, PPO

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[a-z_]+/[a-z_0-9]+")
WITHIN = {"policy/logp_gap_max", "score/mean_square"}  # sums on the way to a metric, taken out by the update


def table(heading: str) -> list[dict[str, str]]:
    page = (ROOT / "docs" / "metrics.md").read_text()
    (part,) = (part for part in page.split("\n## ") if part.startswith(heading))
    rows = [
        [cell.strip().strip("`") for cell in line.strip("| ").split(" | ")]
        for line in part.splitlines()
        if line.startswith("|")
    ]
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in (re_split(row, len(head)) for row in body)]


def re_split(row: list[str], length: int) -> list[str]:
    """A row with its empty cells: "|  |" has none of the spaces that the others are parted by."""
    return row if len(row) == length else [row[0], "", *row[1:]]


@cache
def emitted(path: str) -> tuple[str, ...]:
    """The keys of dictionaries in a file, as regular expressions: what an f-string fills in may be anything."""
    return tuple(_keys(ast.parse((ROOT / path).read_text())))


def _keys(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = node.keys
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        elif isinstance(node, ast.DictComp):
            keys = [node.key]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield re.escape(key.value)
            elif isinstance(key, ast.JoinedStr):
                yield "".join(
                    re.escape(str(x.value)) if isinstance(x, ast.Constant) else "[^/]+" for x in key.values
                )


OURS = [
    path.relative_to(ROOT).as_posix()
    for room in ("algorithms", "recipes")
    for path in sorted((ROOT / "rlhfjax" / room).rglob("*.py"))
]


@pytest.mark.parametrize("path", OURS)
def test_what_a_file_emits_is_in_the_table(path: str):
    names = {row["name"] for row in table("What algorithms")}
    for pattern in emitted(path):
        if pattern in WITHIN or not NAME.fullmatch(pattern.replace("[^/]+", "x")):
            continue
        assert any(re.fullmatch(pattern, name) for name in names), f"{path} emits {pattern}"


@pytest.mark.parametrize(
    ("heading", "root"), [("What algorithms", "rlhfjax"), ("What the stages", "experiments")]
)
def test_what_the_table_has_is_emitted_where_it_says(heading: str, root: str):
    rows = table(heading)
    assert len({row["name"] for row in rows}) == len(rows) >= 20, "a name stands twice"
    for row in rows:
        patterns = emitted(f"{root}/{row['from']}")
        assert any(re.fullmatch(pattern, row["name"]) for pattern in patterns), row["name"]
        assert row["meaning"], row["name"]


def update_metrics(name: str) -> set[str]:
    """The names of the metrics of one tiny update, traced only."""

    def evaluate(params, action):
        logp = jax.nn.log_softmax(params["logits"])[action]
        return logp, jnp.zeros(logp.shape), jnp.zeros(logp.shape) + params["value"]

    params = {"logits": jnp.zeros(4), "value": jnp.zeros(())}
    action, numbers = jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2))
    mask = jnp.ones((4, 2), bool)
    if name == "ppo":
        config = PPO(reward_clip=1.0, advantage_clip=1.0, dual_clip=3.0, kl_estimator="k2", minibatches=1)
        algorithm = ppo.make(evaluate, optax.sgd(0.1), config)
        batch = ppo.Rollout(action, numbers, numbers, numbers, numbers, mask=mask)
    else:
        algorithm = grpo.make(lambda p, x: evaluate(p, x)[:2], optax.sgd(0.1), GRPO(minibatches=1))
        of_groups = jnp.zeros((4, 2, 3))
        tokens, counts = of_groups.astype(jnp.int32), of_groups == 0
        batch = grpo.Rollout(tokens, of_groups, of_groups, jnp.zeros((4, 2)), counts)
    traced = jax.eval_shape(algorithm.update, algorithm.init(params), batch, jax.random.key(0))
    return set(traced[1])


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_column_given_by_is_what_an_update_gives(name: str):
    rows = [row for row in table("What algorithms") if f"`{name}`" in f"`{row['given by']}`"]
    optional = {row["name"] for row in rows if re.search(f"`{name}` if |, if ", row["given by"])}
    given, found = {row["name"] for row in rows}, update_metrics(name)
    assert found <= given | {"optimizer/gradient_norm", "loss/total"}
    assert given - optional <= found
