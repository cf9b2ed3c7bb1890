"""What a run in a world of words says at its end: its table, its curves and a game of each policy."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.stages import games
from experiments.stages.control import choose
from experiments.stages.control_report import code, figure_section
from experiments.stages.games import Outcome, Policy, Task
from rlhfjax.environments.text import Conversation, Player, TextWorld
from rlhfjax.figures import Bands, plot_bands
from rlhfjax.mesh import make_mesh
from rlhfjax.report import (
    Section,
    Table,
    bootstrap_interval,
    markdown_table,
    paired_difference_interval,
    write_report,
)
from rlhfjax.run_folder import RunFolder, read_lines


def solve(
    title: str,
    config,
    task: Task,
    folder: RunFolder,
    *,
    optimum: float | None,
    players: Mapping[str, Player],
    text: str,
) -> dict[str, float]:
    """Data, the methods that `config.algorithms` names, games of all of them, report; returns summary.json.

    Args:
      config: `algorithms`, `games`, `best_fraction`, `network`, `play` and a section for each method.
      optimum: expected score of the best player; None: not known.
      players: scripted ones, to compare with.
      text: the report's first words.

    Raises:
      ValueError: bad settings, before anything is run.
    """
    names = choose(config.algorithms, [name for name in games.METHODS if hasattr(config, name)])
    games.check(config, names, make_mesh(folder.mesh))
    data = games.collect(task, config.games, folder)
    policies = games.learn_all(names, config, task, data, folder)
    found = games.evaluate(policies, task, config.play, folder)
    known = games.scripted(players, task, config.play, folder)
    result = result_section(data, found, known, optimum, folder.seed)
    print(f"\n{title}\n\n{markdown_table(result.table)}" if result.table else "")
    sections = [
        result._replace(text=f"{text} {result.text}"),
        curve_section(names, data, optimum, folder),
        *game_sections(policies, folder),
    ]
    write_report(folder.path, f"{title}, seed {folder.seed}", sections)
    return summarise(data, found, known, optimum)


def known_or_none(optimum: Callable[[TextWorld], float], world: TextWorld) -> float | None:
    """The expected score of the best player, or None where the game is too large to enumerate."""
    try:
        return optimum(world)
    except ValueError:
        return None


def result_section(
    data: Conversation,
    found: Mapping[str, Outcome],
    known: Mapping[str, np.ndarray],
    optimum: float | None,
    seed: int,
) -> Section:
    """One row a player, best known answers first."""
    base = float(np.mean(data.score_B))

    def way(score: float) -> str | None:
        if optimum is None or optimum == base:
            return None
        return f"{(score - base) / (optimum - base):.0%}"

    baseline = next((x for name, x in found.items() if name.startswith("best")), None)
    rows: list[list] = []
    if optimum is not None:
        rows.append(["the optimum, exact", f"{optimum:.4g}", None, None, None, "100%", None])
    for name, score in known.items():
        mean = str(bootstrap_interval(score, seed))
        rows.append([name, mean, None, None, None, way(float(score.mean())), None])
    turns = f"{np.mean(data.turns_B):.1f}"
    won = f"{np.mean(data.success_B):.0%}"
    rows.append(
        ["the games to learn from", str(bootstrap_interval(data.score_B, seed)), None, won, turns, "0%", None]
    )
    for name, item in found.items():
        lead = None
        if baseline is not None and item is not baseline:
            lead = str(paired_difference_interval(item.score, baseline.score, seed))
        rows.append(
            [
                name,
                str(bootstrap_interval(item.score, seed)),
                str(bootstrap_interval(item.greedy_score, seed)),
                f"{item.success.mean():.0%}",
                f"{item.turns.mean():.1f}",
                way(float(item.score.mean())),
                lead,
            ]
        )
    header = ["player", "score", "score, greedy", "won", "turns", "from the data to the optimum"]
    count = len(next(iter(found.values())).score)
    text = (
        f"Means over {count} games with 95 % bootstrap intervals; the same worlds for all players. Won, turns and "
        "the share of the way are of sampled games (temperature 1)."
    )
    return Section("Players", text, Table([*header, "lead over the best cloned"], rows))


def curve_section(
    names: Sequence[str], data: Conversation, optimum: float | None, folder: RunFolder
) -> Section:
    """Scores of games against updates."""
    lines = read_lines(folder.path / "metrics.jsonl")

    def curve(name: str):
        own = [line for line in lines if line["stage"] == name]
        return [line["updates"] for line in own], np.array([[line["game/score"] for line in own]])

    panel = Bands("score", {name: curve(name) for name in names}, x_label="updates", level=optimum)
    return figure_section(
        "Learning curves",
        "Mean score of games sampled by the last policy of each method. The games to learn from score "
        f"{np.mean(data.score_B):.4g}"
        + (", the dashed line is the optimum." if optimum is not None else "."),
        {"Score against updates": lambda path: plot_bands(path, [panel], columns=1)},
        folder,
        "curves",
    )


def game_sections(policies: Sequence[Policy], folder: RunFolder, most: int = 40) -> list[Section]:
    """The first game of each policy that was evaluated, its middle left out where it is long."""
    rows = {
        line["player"]: line["game"]
        for line in read_lines(folder.path / "samples.jsonl")
        if line["stage"] == "evaluation"
    }
    sections = []
    for policy in policies:
        lines = rows[policy.name].split("\n")
        if len(lines) > most:
            lines = [*lines[: most - 6], f"... {len(lines) - most + 1} lines ...", *lines[-5:]]
        sections.append(Section(f"A game of {policy.name}", code("\n".join(lines))))
    return sections


def summarise(
    data: Conversation, found: Mapping[str, Outcome], known: Mapping[str, np.ndarray], optimum: float | None
) -> dict[str, float]:
    """Flat names and numbers for summary.json."""
    numbers = {"data/score": float(np.mean(data.score_B))}
    if optimum is not None:
        numbers["optimum/score"] = optimum
    numbers |= {f"{name}/score": float(score.mean()) for name, score in known.items()}
    for name, item in found.items():
        label = name.replace(", beta ", "/beta_").replace(" ", "_").replace("%", "_percent")
        numbers |= {
            f"{label}/score": float(item.score.mean()),
            f"{label}/greedy_score": float(item.greedy_score.mean()),
            f"{label}/won": float(item.success.mean()),
        }
    return numbers
