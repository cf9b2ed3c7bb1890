"""Worlds drawn from their observations, as letters for a terminal and as strokes for a figure."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhfjax.figures import Stroke

Range = tuple[float, float]


class Scene(NamedTuple):
    """How a world is drawn, in its own coordinates, y upwards."""

    strokes: Callable[[np.ndarray], list[Stroke]]  # of one observation; later ones cover earlier ones
    x_range: Range
    y_range: Range
    columns: int  # of the picture in letters
    rows: int

    def draw(self, observation: np.ndarray) -> str:
        """The scene in letters."""
        return letters(
            self.strokes(observation), self.x_range, self.y_range, columns=self.columns, rows=self.rows
        )


def letters(strokes: Sequence[Stroke], x_range: Range, y_range: Range, *, columns: int, rows: int) -> str:
    """Strokes as `rows` lines of `columns` letters; what lies outside of the ranges is not seen."""
    canvas = np.full((rows, columns), " ")
    for stroke in strokes:
        points = np.asarray(stroke.points, np.float64)
        for start, end in zip(points[:-1], points[1:], strict=True) if len(points) > 1 else [points[[0, 0]]]:
            along = np.linspace(0.0, 1.0, 2 * (rows + columns))[:, None]
            x, y = (start + along * (end - start)).T
            column = np.floor((x - x_range[0]) / (x_range[1] - x_range[0]) * columns).astype(int)
            row = np.floor((y_range[1] - y) / (y_range[1] - y_range[0]) * rows).astype(int)
            seen = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
            canvas[row[seen], column[seen]] = stroke.mark
    return "\n".join("".join(row).rstrip() for row in canvas)


def beside(frames: Sequence[str], titles: Sequence[str], *, width: int = 100, gap: int = 3) -> str:
    """Text pictures beside each other, each under its title, as many in a row as fit."""
    widths = [max(map(len, [title, *frame.split("\n")])) for frame, title in zip(frames, titles, strict=True)]
    cell = max(widths) + gap
    per_row = max(1, (width + gap) // cell)
    blocks = []
    for first in range(0, len(frames), per_row):
        chosen = [
            [title, *frame.split("\n")]
            for frame, title in zip(
                frames[first : first + per_row], titles[first : first + per_row], strict=True
            )
        ]
        height = max(map(len, chosen))
        lines = [[*block, *[""] * (height - len(block))] for block in chosen]
        blocks.append(
            "\n".join("".join(part.ljust(cell) for part in row).rstrip() for row in zip(*lines, strict=True))
        )
    return "\n\n".join(blocks)


def _cart_pole(observation: np.ndarray) -> list[Stroke]:
    x, _, angle, _ = observation.tolist()
    tip = (x + math.sin(angle), 0.2 + math.cos(angle))
    return [
        Stroke([(-2.4, 0.0), (2.4, 0.0)], "_"),
        Stroke([(x - 0.25, 0.1), (x + 0.25, 0.1)], "#"),
        Stroke([(x, 0.2), tip], "o"),
    ]


def _acrobot(observation: np.ndarray) -> list[Stroke]:
    cos_1, sin_1, cos_2, sin_2, _, _ = observation.tolist()
    elbow = (sin_1, -cos_1)
    tip = (elbow[0] + sin_1 * cos_2 + cos_1 * sin_2, elbow[1] - (cos_1 * cos_2 - sin_1 * sin_2))
    return [
        Stroke([(-2.2, 1.0), (2.2, 1.0)], "-"),
        Stroke([(0.0, 0.0), elbow], "o"),
        Stroke([elbow, tip], "x"),
        Stroke([(0.0, 0.0)], "@"),
    ]


def _mountain_car(observation: np.ndarray) -> list[Stroke]:
    def hill(x: float) -> float:
        return 0.45 * math.sin(3 * x) + 0.55

    x, _ = observation.tolist()
    ground = [(float(at), hill(at)) for at in np.linspace(-1.2, 0.6, 60)]
    return [
        Stroke(ground, "."),
        Stroke([(0.5, hill(0.5)), (0.5, hill(0.5) + 0.25)], "|"),
        Stroke([(x, hill(x) + 0.05)], "O"),
    ]


def catch_scene(rows: int, columns: int) -> Scene:
    """Catch: the ball o falls towards the paddle =."""

    def strokes(observation: np.ndarray) -> list[Stroke]:
        at = np.argwhere(observation > 0)
        empty = [Stroke([(c + 0.5, rows - r - 0.5)], ".") for r in range(rows) for c in range(columns)]
        paddle = [Stroke([(c + 0.5, rows - r - 0.5)], "=") for r, c in at if r == rows - 1]
        ball = [Stroke([(c + 0.5, rows - r - 0.5)], "o") for r, c in at if r < rows - 1]
        return [*empty, *paddle, *ball]

    return Scene(strokes, (0.0, float(columns)), (0.0, float(rows)), columns, rows)


CART_POLE = Scene(_cart_pole, (-2.4, 2.4), (-0.2, 1.4), 30, 6)
ACROBOT = Scene(_acrobot, (-2.2, 2.2), (-2.2, 2.2), 24, 12)
MOUNTAIN_CAR = Scene(_mountain_car, (-1.2, 0.6), (0.0, 1.35), 30, 9)


def of_scaled(scene: Scene, low: Sequence[float], high: Sequence[float]) -> Scene:
    """The scene of a world whose observations were mapped from [low, high] to [-1, 1]."""
    lowest, highest = np.asarray(low), np.asarray(high)
    return scene._replace(
        strokes=lambda x: scene.strokes(lowest + (np.asarray(x) + 1) / 2 * (highest - lowest))
    )


def of_binned(scene: Scene, low: Sequence[float], high: Sequence[float], bins: Sequence[int]) -> Scene:
    """The scene of a world whose observations are the numbers of cells over [low, high]: their middles are drawn."""
    lowest, highest = np.asarray(low), np.asarray(high)

    def strokes(number: np.ndarray) -> list[Stroke]:
        place = np.asarray(np.unravel_index(int(number), tuple(bins)))
        return scene.strokes(lowest + (place + 0.5) / np.asarray(bins) * (highest - lowest))

    return scene._replace(strokes=strokes)
