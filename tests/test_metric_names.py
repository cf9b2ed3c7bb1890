"""docs/metrics.md names every metric that the code emits, and none that it does not.

What the runs of all tests have logged is held against it too, at the end of the tests: `conftest.py`.
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache

import jax
import jax.numpy as jnp
import optax
import pytest
from metric_table import PACKAGE, PLACEHOLDER, ROOT, STAGES, as_pattern, listed, table, unlisted

from rlhfjax.algorithms import grpo, ppo
from rlhfjax.config import GRPO, PPO
from rlhfjax.report.units import UNITS, unit_of

NAME = re.compile(r"[a-z_]+/[a-z_0-9]+")
WITHIN = {"policy/logp_gap_max", "score/mean_square"}  # sums on the way to a metric, taken out by the update
ANY = "[^/]+"
ELSEWHERE = re.compile(  # names of summary.json, and what benchmarks print
    r"experiments/(benchmarks/\w+|stages/(\w+_)?report|stages/all_results|referee|summarize|overoptimisation)\.py"
)
ARRAYS = {  # names that a file has for arrays, for rows of its report or for summary.json: never logged; X is any word
    "audit_measure": r"X/(grade|pairs|seconds_\w+|temperature)|best_of_.+",
    "control_tables": r"X/(greedy_return|largest_\w+|seeds_optimal)",
    "overopt_text": "(along|bon|rl|start)/.+",
    "overopt_toy": "(exact|trained)/.+|X/X/X",
    "reasoning": "X/(answer|right)",
    "reward_runs": "reward_model/X",
}
ASSEMBLED = {"guard/NAME", "guard/NAME/mean", "guard/NAME/acted"}  # of constants: no key stands in the code


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
            named = [
                x for loop in node.generators for x in ast.walk(loop.iter) if isinstance(x, ast.Constant)
            ]
            keys = [*named] if isinstance(node.key, ast.Name) else [node.key]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield re.escape(key.value)
            elif isinstance(key, ast.JoinedStr):
                yield "".join(
                    re.escape(str(x.value)) if isinstance(x, ast.Constant) else ANY for x in key.values
                )


OURS = [
    path.relative_to(ROOT).as_posix()
    for room in ("algorithms", "recipes")
    for path in sorted((ROOT / "rlhfjax" / room).rglob("*.py"))
]


@pytest.mark.parametrize("path", OURS)
def test_what_a_file_emits_is_in_the_table(path: str):
    names = {row["name"] for row in table(PACKAGE)}
    for pattern in emitted(path):
        if pattern in WITHIN or not NAME.fullmatch(pattern.replace(ANY, "x")):
            continue
        assert any(re.fullmatch(pattern, name) for name in names), f"{path} emits {pattern}"


@pytest.mark.parametrize(("heading", "root"), [(PACKAGE, "rlhfjax"), (STAGES, "experiments")])
def test_what_the_table_has_is_emitted_where_it_says(heading: str, root: str):
    rows = table(heading)
    assert len({row["name"] for row in rows}) == len(rows) >= 20, "a name stands twice"
    for row in rows:
        patterns = emitted(f"{root}/{row['from']}")
        found = any(re.fullmatch(pattern, row["name"]) for pattern in patterns)
        assert found or row["name"] in ASSEMBLED, row["name"]
        assert row["meaning"], row["name"]


FILES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "experiments").rglob("*.py"))]


@pytest.mark.parametrize("path", [path for path in FILES if not ELSEWHERE.fullmatch(path)])
def test_what_a_stage_emits_is_in_the_tables(path: str):
    """Every name of two parts that a file has for a key, and every name that it returns to be logged."""
    rows = [*table(PACKAGE), *table(STAGES)]
    names = {row["name"] for row in rows if not re.search("POLICY|VARIANT|KIND", row["name"])}
    own = {row["name"] for row in rows if path == f"experiments/{row['from']}"}  # any placeholder holds there
    not_logged = re.compile(ARRAYS.get(path.split("/")[-1].removesuffix(".py"), ""))
    in_two = {pattern for pattern in emitted(path) if NAME.fullmatch(pattern.replace(ANY, "x"))}
    for pattern in in_two | set(returned_to_be_logged(path)):
        if pattern.startswith("perf/") or not_logged.fullmatch(pattern.replace(ANY, "X")):
            continue
        found = any(re.fullmatch(pattern, name) for name in names | own)
        assert found or any(as_pattern(name).fullmatch(pattern) for name in own), f"{path} emits {pattern}"


def returned_to_be_logged(path: str) -> Iterator[str]:
    """The keys of the metrics that `run_once` and `Show.measure` are given, be they written at once or step by step."""
    for function in ast.walk(ast.parse((ROOT / path).read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name not in given_to("compute", "measure"):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                value = node.value.elts[1] if isinstance(node.value, ast.Tuple) else node.value
                yield from _keys_of(value, function)


@cache
def given_to(*keywords: str) -> set[str]:
    """The functions that experiments pass by these keywords, as f, as a.f, as partial(f) or as lambda: f()."""
    nodes = (node for path in FILES for node in ast.walk(ast.parse((ROOT / path).read_text())))
    found = set()
    for node in nodes:
        if isinstance(node, ast.keyword) and node.arg in keywords:
            value = node.value.body if isinstance(node.value, ast.Lambda) else node.value
            if isinstance(value, ast.Call):
                partial = isinstance(value.func, ast.Name) and value.func.id == "partial"
                value = value.args[0] if partial else value.func
            found |= {value.id} if isinstance(value, ast.Name) else set()
            found |= {value.attr} if isinstance(value, ast.Attribute) else set()
    return found


def _keys_of(value: ast.expr, function: ast.FunctionDef) -> Iterator[str]:
    """The keys of a dictionary: of a display, of both sides of `|`, of all that a local name is assigned or given."""
    if isinstance(value, ast.BinOp):
        yield from (*_keys_of(value.left, function), *_keys_of(value.right, function))
    elif isinstance(value, ast.Dict | ast.DictComp):
        yield from _keys(value)
    elif isinstance(value, ast.Name):
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign | ast.AugAssign):
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id == value.id:
                    yield from _keys_of(node.value, function)
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == value.id:
                    yield from _keys(target)


def test_a_name_that_no_table_has_is_found_in_a_log(tmp_path):
    (tmp_path / "environment.json").touch()
    (tmp_path / "config.yaml").write_text("experiment: length\n")
    metrics = {"objective/kl": 1.0, "ppo, greedy/gold": 1.0, "gold/run_3": 1.0, "guard/a:b/mean": 0.0}
    line = {"stage": "ppo", "step": 1, **metrics, "objective/unheard_of": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"stage": "ppo", "st')
    found = [words.split(": ", 1)[1] for words in unlisted(tmp_path)]
    assert found == [
        "ppo: objective/unheard_of",
        "ppo: ppo, greedy/gold",
    ]  # the second is one of other stages
    assert listed("validation", "ppo, greedy/gold") and not listed("ppo", "run_3")
    (tmp_path / "config.yaml").write_text("experiment: one_of_a_test\n")
    assert not list(unlisted(tmp_path))


def test_the_units_on_axes_are_those_of_the_tables():
    rows = [row for row in (*table(PACKAGE), *table(STAGES)) if not PLACEHOLDER.search(row["name"])]
    own = re.compile(r".*score units.*|gold's own|")  # no two rewards have the same
    assert {row["name"]: row["unit"] for row in rows if not own.fullmatch(row["unit"])} == UNITS
    assert unit_of("labels_25/reward/loss") == "nats a pair"
    assert unit_of("objective/kl/run_3") == "nats a sequence" and unit_of("objective/score") is None


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
    rows = [row for row in table(PACKAGE) if f"`{name}`" in f"`{row['given by']}`"]
    optional = {row["name"] for row in rows if re.search(f"`{name}` if |, if ", row["given by"])}
    given, found = {row["name"] for row in rows}, update_metrics(name)
    assert found <= given | {"optimizer/gradient_norm", "loss/total"}
    assert given - optional <= found
