"""Deep models from shallow ones: of equal layers each adds the same, so two depths tell what any depth needs."""

from rlhfjax.planner.analysis import Analysis, Memory


def deepened(shallow: Analysis, deeper: Analysis, depths: tuple[int, int], depth: int) -> Analysis:
    """The analysis of a program of `depth` equal layers, from those of the same program at two smaller depths.

    Work, traffic, collectives and memory are straight lines in the number of layers: operations of the two are counted
    with weights that sum to 1, some below 0. Peak memory is the larger of several lines, of which the steepest may not
    show at small depths: the line is then a lower bound.

    Raises ValueError where the depths are not three that grow.
    """
    first, second = depths
    if not 0 < first < second <= depth:
        raise ValueError(f"depths {first} and {second} must grow, up to {depth}")
    share = (depth - first) / (second - first)
    weights = (1 - share, share)
    both = (shallow, deeper)
    memory = Memory(*(round(a + share * (b - a)) for a, b in zip(shallow.memory, deeper.memory, strict=True)))
    names = {name for analysis in both for name in analysis.uncounted}
    return Analysis(
        memory,
        tuple(
            o._replace(calls=o.calls * w) for a, w in zip(both, weights, strict=True) for o in a.operations
        ),
        tuple(
            c._replace(calls=c.calls * w) for a, w in zip(both, weights, strict=True) for c in a.collectives
        ),
        deeper.loops,
        {
            name: sum(a.uncounted.get(name, 0.0) * w for a, w in zip(both, weights, strict=True))
            for name in names
        },
    )
