"""The best that can be done in a guessing game, by going through all that can happen.

One of N things is hidden, each as likely. A turn is one of M queries; the answer tells which things it may still be.
A turn costs 1 unless it finds the thing, which ends the game; so does the last of the turns.
"""

import math

import numpy as np


def best_score(answer_MN: np.ndarray, win_MN: np.ndarray, *, turns: int, work: int = 2_000_000) -> float:
    """Expected score of the optimal player of a guessing game, exact: minus the expected number of misses.

    Args:
      answer_MN: int, the answer to query m where thing n is hidden; equal numbers are equal answers.
      win_MN: bool, whether query m finds thing n. A query finds at most one.
      turns: of a game.
      work: queries looked at before giving up.

    The sets of things that are still possible are gone through with what is known of each remembered; a query whose
    answers could not beat the best one, even if all later ones split perfectly, is not followed. ValueError where
    `work` does not suffice: games of some ten things are done in no time, of a hundred often not at all.
    """
    answer_MN, win_MN = np.asarray(answer_MN), np.asarray(win_MN, bool)
    if answer_MN.shape != win_MN.shape or answer_MN.ndim != 2:
        raise ValueError(f"answers {answer_MN.shape} and wins {win_MN.shape} must both be [queries, things]")
    if np.any(win_MN.sum(axis=1) > 1):
        raise ValueError("a query must find at most one thing")
    if not np.all(win_MN.any(axis=0)):
        raise ValueError(f"no query finds thing {int(np.argmin(win_MN.any(axis=0)))}")
    if turns < 1:
        raise ValueError(f"a game needs at least 1 turn, got {turns}")
    answers = max(len(np.unique(row)) for row in answer_MN)
    search = _Search(_cells(answer_MN, win_MN), answers, work)
    everything = (1 << answer_MN.shape[1]) - 1
    return -search.misses(everything, turns, math.inf) / answer_MN.shape[1]


def _cells(answer_MN: np.ndarray, win_MN: np.ndarray) -> list[list[int]]:
    """Of each query, the sets of things that its answers leave, as bits. What it finds is in none of them."""
    cells = []
    for answer_N, win_N in zip(answer_MN, win_MN, strict=True):
        left = [np.flatnonzero((answer_N == answer) & ~win_N) for answer in np.unique(answer_N)]
        cells.append([sum(1 << int(n) for n in things) for things in left if things.size])
    return cells


class _Search:
    """Total misses over the things of a set, each hidden in turn: branch and bound with a memory."""

    def __init__(self, cells: list[list[int]], answers: int, work: int):
        self.cells, self.answers, self.work = cells, answers, work
        self.exact: dict[tuple[int, int], float] = {}
        self.floor: dict[tuple[int, int], float] = {}
        self.ideal: dict[tuple[int, int], float] = {}

    def least(self, size: int, turns: int) -> float:
        """No set of this size can have fewer misses: every turn finds a thing and splits the rest perfectly."""
        if (size, turns) not in self.ideal:
            total, left, nodes = 0, size, 1
            for depth in range(turns):
                found = min(left, nodes)
                total, left, nodes = total + depth * found, left - found, nodes * self.answers
            self.ideal[size, turns] = total + turns * left
        return self.ideal[size, turns]

    def misses(self, things: int, turns: int, below: float) -> float:
        """The least total, exact where it is less than `below`; otherwise something that is not less."""
        size = things.bit_count()
        if size <= 1 or turns == 0:
            return 0.0  # it is known and will be named, or the misses were counted when they were made
        key = (things, turns)
        if key in self.exact:
            return self.exact[key]
        if self.floor.get(key, self.least(size, turns)) >= below:
            return self.floor.get(key, self.least(size, turns))
        best = self._best(things, turns, below)
        if best < below:
            self.exact[key] = best
        else:
            self.floor[key] = best
        return best

    def _best(self, things: int, turns: int, below: float) -> float:
        """Tries the queries, the most promising first."""
        plans = []
        for cells in self.cells:
            parts = [part for part in (things & cell for cell in cells) if part]
            missed = sum(part.bit_count() for part in parts)
            bound = missed + sum(self.least(part.bit_count(), turns - 1) for part in parts)
            plans.append((bound, max((part.bit_count() for part in parts), default=0), parts, missed))
        self.work -= len(plans)
        if self.work < 0:
            raise ValueError("too many sets of things to go through; give more work, or a smaller game")
        best = below
        seen = set()
        for bound, _, parts, missed in sorted(plans, key=lambda plan: plan[:2]):
            if bound >= best:
                break
            if tuple(sorted(parts)) in seen:
                continue
            seen.add(tuple(sorted(parts)))
            best = min(best, self._follow(parts, missed, bound, turns, best))
        return best

    def _follow(self, parts: list[int], missed: int, bound: float, turns: int, best: float) -> float:
        """Total of a query whose answers leave these parts; given up where it cannot be less than `best`."""
        total = bound
        for part in sorted(parts, key=int.bit_count):
            least = self.least(part.bit_count(), turns - 1)
            total += self.misses(part, turns - 1, best - total + least) - least
            if total >= best:
                return math.inf
        return total
