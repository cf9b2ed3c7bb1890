"""The code of docs/axis_name.md runs, and its roads end where one device does."""

import re

from test_docs_q_learning import DOCS, blocks, run

from rlhfjax import algorithms

SHARD_MAP, PMAP, VMAP, LOSS = blocks("axis_name.md")


def test_every_road_ends_where_one_device_does(capsys):
    """Each block goes on from those before it."""
    printed = run("\n".join((SHARD_MAP, PMAP, VMAP, LOSS)), capsys)
    reward, alone = (float(x) for x in re.findall(r"(?:reward|device) (\d\.\d+)", printed))
    assert reward == alone > 0.8  # by chance: 1 in 16
    differences = [float(x) for x in re.findall(r"differ by (\S+)", printed)]
    assert len(differences) == 3 and max(differences) < 1e-3
    right, wrong = (float(x) for x in re.findall(r"off by ([\d.]+)%", printed))
    assert right == 0 and wrong > 2


def test_the_table_names_every_algorithm():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "axis_name.md").read_text(), re.MULTILINE)
    assert set(rows) == {name for name in algorithms.__all__ if hasattr(getattr(algorithms, name), "make")}
