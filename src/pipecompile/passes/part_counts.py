"""``micro_batches="auto"``: into how many parts to split a batch.

More micro-batches fill a pipeline better and keep fewer activations each, but every one of them costs its
messages and launches anew, and small operators run less efficiently. Which of the two counts more is measured:
the model is traced, planned and its stages timed for a few numbers of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipecompile.errors import PipecompileError
from pipecompile.passes.choose_step import Candidate, ChooseStep

#: How far from the wanted number of parts a divisor of the batch may be to be taken in its place.
_NEAR = 1.3


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


def best_count(
    counts: Sequence[int], tried: Callable[[int], Sequence[Candidate]], choose: ChooseStep
) -> tuple[Candidate, tuple[str, ...]]:
    """The best candidate of all counts, and a note of what was considered where there were several.

    ``tried`` gives the candidates of the count at an index. A count that cannot be compiled is left out as
    long as another can.

    Raises:
        PlanError: if no candidate fits.
        PipecompileError: what the first count raises, if none can be compiled.
    """
    if len(counts) == 1:
        return choose.apply(tried(0)), ()
    candidates, told = list[Candidate](), list[str]()
    errors = list[PipecompileError]()
    for index, count in enumerate(counts):
        try:
            found = tried(index)
        except PipecompileError as error:
            errors.append(error)
            told.append(f"{count}: {str(error).splitlines()[0]}")
            continue
        candidates += found
        fastest = min(found, key=lambda c: c.seconds)
        told.append(f"{count}: {fastest.seconds * 1e3:.3g} ms ({fastest.name}), keeps {fastest.memory:,} bytes")
    if not candidates:
        raise errors[0]
    chosen = choose.apply(candidates)
    within = "" if choose.memory_limit is None else f" within {choose.memory_limit:,} bytes"
    return chosen, (
        f"micro_batches='auto' took {chosen.program.micro_batches} ({chosen.name}, {chosen.seconds * 1e3:.3g} ms a step "
        f"by simulation{within}); the fastest schedule of each number was {'; '.join(told)}",
    )


__all__ = ["best_count", "part_counts"]
