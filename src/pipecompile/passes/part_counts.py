"""``micro_batches="auto"``: into how many parts to split a batch.

More micro-batches fill a pipeline better and keep fewer activations each, but every one of them costs its
messages and launches anew, and small operators run less efficiently. Which of the two counts more is measured:
the model is traced, planned and its stages timed for a few numbers of parts. What no schedule can bring below
the best so far, because the work alone takes longer, is not planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pipecompile.errors import PipecompileError
from pipecompile.passes.choose_step import Candidate, ChooseStep

#: How far from the wanted number of parts a divisor of the batch may be to be taken in its place.
_NEAR = 1.3

#: Stages may run faster than their share of the whole model, by what caches hold of their weights and do not of all.
_FAR = 0.85


def part_counts(batch: int, devices: int) -> list[int]:
    """The numbers worth trying: one, two, four and eight micro-batches a device, of two samples at least.

    A divisor of the batch close by is taken instead; where there is none, micro-batches differ by a sample.
    """
    most = max(batch // 2, 1)
    wanted = [min(devices * 2**k, most) for k in range(4)]
    divisors = [d for d in range(1, most + 1) if batch % d == 0]

    def near(count: int) -> int:
        ratio, found = min((max(d / count, count / d), d) for d in divisors)
        return found if ratio <= _NEAR else count

    return sorted({near(count) for count in wanted})


def best_way(
    names: Sequence[str],
    least: Callable[[int], float],
    tried: Callable[[int], Sequence[Candidate]],
    choose: ChooseStep,
) -> tuple[Candidate, tuple[str, ...]]:
    """The best candidate of all ways, and a note of what was considered where there were several.

    A way is a number of micro-batches on some devices; ``names`` say which. Of the way at an index ``least`` gives
    the seconds that no schedule can be far below, and ``tried`` the candidates, asked for only where the first does
    not rule them out. A way that cannot be compiled is left out as long as another can.

    Raises:
        PlanError: if no candidate fits.
        PipecompileError: what the first way raises, if none can be compiled.
    """
    if len(names) == 1:
        return choose.apply(tried(0)), ()
    candidates, told = list[tuple[str, Candidate]](), list[str]()
    errors, best = list[PipecompileError](), math.inf
    for index, name in enumerate(names):
        try:
            if best < math.inf and (bound := least(index)) * _FAR > best:
                told.append(f"{name}: not planned, {bound * 1e3:.3g} ms if no device ever waited")
                continue
            found = tried(index)
        except PipecompileError as error:
            errors.append(error)
            told.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        candidates += [(name, candidate) for candidate in found]
        best = min([best, *(c.seconds for c in found if choose.fits(c))])
        fastest = min(found, key=lambda c: c.seconds)
        told.append(f"{name}: {fastest.seconds * 1e3:.3g} ms ({fastest.name}), keeps {fastest.memory:,} bytes")
    if not candidates:
        raise errors[0]
    chosen = choose.apply([candidate for _, candidate in candidates])
    taken = next(name for name, candidate in candidates if candidate is chosen)
    within = "" if choose.memory_limit is None else f" within {choose.memory_limit:,} bytes"
    return chosen, (
        f"micro_batches='auto' took {taken} ({chosen.name}, {chosen.seconds * 1e3:.3g} ms a step by "
        f"simulation{within}); the fastest schedule of each number was {'; '.join(told)}",
    )


__all__ = ["best_way", "part_counts"]
