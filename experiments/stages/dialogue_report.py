"""What a run of dialogues says at its end: its table, its curves, and the same dialogue before and after."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.stages import dialogue
from experiments.stages.control_report import code, figure_section
from experiments.stages.dialogue import Outcome
from experiments.stages.dialogue_configs import Stages
from experiments.stages.games import Policy, Task
from experiments.stages.results import Row, stage_seconds, write_results
from rlhfjax.environments.text import Conversation, Player
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

METRIC = "score of a game: success less the cost of its turns"
STAGES = {"dpo": ("pairs", "dpo")}  # of methods that have more than one
Q_LEARNING = ("ilql", "monte_carlo", "soft_q")


def solve(
    title: str,
    config: Stages,
    task: Task,
    folder: RunFolder,
    *,
    optimum: float | None,
    players: Mapping[str, Player],
    flags: str,
) -> dict[str, float]:
    """Data, clone, methods, games of all of them in the same worlds, report; returns summary.json.

    Args:
      optimum: expected score of the best player; None: not known.
      players: scripted ones, to compare with.
      flags: that name the world on the command line.

    Raises:
      ValueError: bad settings, before anything is run.
    """
    dialogue.check(config, make_mesh(folder.mesh))
    data, policies = dialogue.learn_all(config, task, folder)
    found = dialogue.evaluate(policies, config, task, folder)
    best = dialogue.best_of(policies[0], config, task, folder)
    known = dialogue.scripted(players, config, task, folder)
    seconds = {name: stage_seconds(folder, *STAGES.get(name, (name,))) for name in _names(config)}
    result = result_section(data, found, best, known, optimum, config, seconds, folder.seed)
    print(f"\n{title}\n\n{markdown_table(result.table)}" if result.table else "")
    write_report(
        folder.path,
        f"A dialogue: {title}, seed {folder.seed}",
        [result, curve_section(config, data, optimum, folder), *dialogue_sections(policies, folder)],
    )
    write_results(
        folder,
        task=f"dialogue, {title}",
        metric=METRIC,
        rows=result_rows(found, best, config, seconds, f"{flags} --seed {folder.seed}"),
    )
    return summarise(data, found, best, known, optimum)


def result_section(
    data: Conversation,
    found: Mapping[str, Outcome],
    best: Mapping[str, np.ndarray],
    known: Mapping[str, Conversation],
    optimum: float | None,
    config: Stages,
    seconds: Mapping[str, float],
    seed: int,
) -> Section:
    """One row a player: known answers, then where all methods start, then methods."""
    clone = found["clone"]
    start = float(clone.score.mean())

    def way(score: np.ndarray) -> str | None:
        if optimum is None or optimum == start:
            return None
        return f"{(float(score.mean()) - start) / (optimum - start):.0%}"

    def plain(name: str, score, success, turns) -> list:
        return [
            name,
            bootstrap_interval(score, seed),
            f"{np.mean(success):.0%}",
            f"{np.mean(turns):.1f}",
            way(np.asarray(score)),
            *[None] * 5,
        ]

    rows: list[list] = []
    if optimum is not None:
        rows.append(["the optimum, exact", f"{optimum:.4g}", None, None, "100%", *[None] * 5])
    rows += [plain(name, x.score_B, x.success_B, x.turns_B) for name, x in known.items()]
    rows.append(plain("the games to learn from", data.score_B, data.success_B, data.turns_B))
    for name, item in found.items():
        lead = None if item is clone else paired_difference_interval(item.score, clone.score, seed)
        greedy = bootstrap_interval(item.greedy_score, seed)
        rows.append(
            [
                *plain(name, item.score, item.success, item.turns)[:5],
                lead,
                greedy,
                f"{item.greedy_success.mean():.0%}",
                f"{item.kl.mean() + 0.0:.1f}",
                f"{seconds[_method(name)]:.0f}",
            ]
        )
        if item is clone:
            rows.append(plain(_best_of(config), best["score"], best["success"], best["turns"]))
    header = ["player", "score", "won", "turns", "of the way", "lead over the clone"]
    header += ["score, greedy", "won, greedy", "KL (nats)", "seconds"]
    text = (
        f"Means over {len(clone.score)} games with 95 % bootstrap intervals; the same worlds for all players and "
        "seeds. Score, won, turns and the lead are of games sampled at temperature 1, those called greedy of games at "
        "temperature 0: compare within a column. Of the way: from the clone to the optimum. KL is that of a whole "
        "sampled game from the clone. Seconds are those of the method's own stages, compilation included. Of the best "
        f"of {config.play.best_of} games in the same world it is their true score that chooses: nobody can choose so "
        "while the game is on; it bounds what choosing among the clone's games can give."
    )
    return Section("Players", text, Table(header, rows))


def curve_section(config: Stages, data: Conversation, optimum: float | None, folder: RunFolder) -> Section:
    """Scores against games played, of the methods that play to learn, and against updates of the others."""
    lines = read_lines(folder.path / "metrics.jsonl")

    def curves(names: Sequence[str], x_of) -> dict[str, tuple]:
        own = {name: [line for line in lines if line["stage"] == name] for name in names}
        return {
            name: ([x_of(name, line) for line in rows], np.array([[line["game/score"] for line in rows]]))
            for name, rows in own.items()
        }

    def played(name: str, line: dict) -> int:
        stage = getattr(config, name)
        return line["step"] * stage.worlds * stage.samples

    playing = [name for name in config.methods if name in dialogue.ON_POLICY]
    offline = [name for name in _names(config) if name not in playing]
    panels = [Bands("score", curves(offline, lambda _, line: line["updates"]), "updates", "Offline", optimum)]
    if playing:
        panels.append(Bands("score", curves(playing, played), "games played", "Playing to learn", optimum))
    return figure_section(
        "Learning curves",
        f"Mean score of games sampled on the way. The games to learn from score {np.mean(data.score_B):.4g}"
        + (", the dashed line is the optimum." if optimum is not None else "."),
        {"Score while learning": lambda path: plot_bands(path, panels, columns=2)},
        folder,
        "curves",
    )


def dialogue_sections(policies: Sequence[Policy], folder: RunFolder) -> list[Section]:
    """The first dialogues of each policy, in the same worlds."""
    lines = [x for x in read_lines(folder.path / "samples.jsonl") if x["stage"] == "evaluation"]
    sections = []
    for policy in policies:
        texts = [line["game"] for line in lines if line["player"] == policy.name]
        sections.append(Section(f"Dialogues of {policy.name}", "\n\n".join(code(text) for text in texts)))
    return sections


def result_rows(
    found: Mapping[str, Outcome],
    best: Mapping[str, np.ndarray],
    config: Stages,
    seconds: Mapping[str, float],
    flags: str,
) -> list[Row]:
    """The rows of results.json: of a method with several policies each."""
    command = f"python experiments/run.py dialogue {flags} --methods"
    several = {name: sum(_method(x) == name for x in map(str, found)) > 1 for name in _names(config)}
    rows = []
    for name, item in found.items():
        method = _method(name)
        label = f"q-learning ({name if several[method] else method})" if method in Q_LEARNING else name
        kl = float(item.kl.mean())
        rows.append(Row(label, item.score, kl, seconds[method], f"{command} {method}"))
        if method == "clone":
            rows.append(Row(_best_of(config), best["score"], None, 0.0, f"{command} clone"))
    return rows


def summarise(
    data: Conversation,
    found: Mapping[str, Outcome],
    best: Mapping[str, np.ndarray],
    known: Mapping[str, Conversation],
    optimum: float | None,
) -> dict[str, float]:
    """Flat names and numbers for summary.json."""
    numbers = {"data/score": float(np.mean(data.score_B)), "best_of/score": float(np.mean(best["score"]))}
    if optimum is not None:
        numbers["optimum/score"] = optimum
    numbers |= {f"{name}/score": float(x.score_B.mean()) for name, x in known.items()}
    for name, item in found.items():
        label = name.replace(", beta ", "/beta_").replace(" ", "_").replace("%", "_percent")
        numbers |= {
            f"{label}/score": float(item.score.mean()),
            f"{label}/greedy_score": float(item.greedy_score.mean()),
            f"{label}/won": float(item.success.mean()),
            f"{label}/turns": float(item.turns.mean()),
            f"{label}/kl": float(item.kl.mean()),
        }
    return numbers


def _names(config: Stages) -> list[str]:
    """Stages that train, the clone's first."""
    return list(dict.fromkeys(["clone", *config.methods]))


def _method(name: str) -> str:
    """The method that made the policy of that name."""
    return name.split(",")[0].split(" ")[0]


def _best_of(config: Stages) -> str:
    return f"best of {config.play.best_of}"
