"""``micro_batches="auto"``: into how many parts to split a batch.

More micro-batches fill a pipeline better and keep fewer activations each, but every one of them costs its
messages and launches anew, and small operators run less efficiently. Which of the two counts more is measured:
the model is traced, planned and its stages timed for a few numbers of parts. What no schedule can bring below
the best so far, because the work alone takes longer, is not planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from pipecompile.errors import PipecompileError
from pipecompile.passes.choose_step import Candidate, ChooseStep

#: How far from the wanted number of parts a divisor of the batch may be to be taken in its place.
_NEAR = 1.3

#: Stages may run faster than their share of the whole model, by what caches hold of their weights and do not of all.
_FAR = 0.85

#: What a simulation says is so much longer than the best at the most may still be faster; and how many are raced.
_CLOSE, _RACED = 1.15, 4

#: The same for ways that are raced in any case.
_ALWAYS = 2.0


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
    beside: Callable[[int, Sequence[Candidate]], Sequence[Candidate]] = lambda _, found: found,
    raced: Callable[[Sequence[tuple[int, Candidate]]], Sequence[float]] | None = None,
    always: Collection[int] = (),
) -> tuple[int, Candidate, tuple[str, ...]]:
    """The way and its candidate that are best of all, and a note of what was considered where there were several.

    A way is a number of micro-batches on some devices; ``names`` say which. Of the way at an index ``least`` gives
    the seconds that no schedule can be far below, and ``tried`` the candidates, asked for only where the first does
    not rule them out. ``beside`` gives them with the costs they have while all devices compute, which makes none
    faster: it is asked for from the fastest on, until the next is far behind as it is. A way that cannot be compiled is
    left out as long as another can. Those that come close to the best by simulation are ``raced``, which gives
    measured seconds of a step of each; so are the ways ``always``, unless they are very far behind.

    Raises:
        PlanError: if no candidate fits.
        PipecompileError: what the first way raises, if none can be compiled.
    """
    if len(names) == 1:
        return 0, choose.apply(beside(0, tried(0))), ()
    found, told, errors = _planned(names, least, tried, choose)
    if not found:
        raise errors[0]
    candidates, more = _settled(names, found, choose, beside, always)
    chosen = choose.apply([candidate for _, candidate in candidates])
    index, how, seconds = next(i for i, c in candidates if c is chosen), "simulation", chosen.seconds
    told, close = [*more, *told], _close(candidates, choose, always)
    if raced is not None and len(close) > 1:
        try:
            times = raced(close)
        except (PipecompileError, OSError) as error:
            told.append(f"not tried in workers: {str(error).splitlines()[0]}")
        else:
            tries = [f"{names[i]} ({c.name}) {t * 1e3:.3g} ms" for (i, c), t in zip(close, times, strict=True)]
            told.append(f"in workers, taking turns: {', '.join(tries)}")
            seconds, place = min((t, place) for place, t in enumerate(times))
            (index, chosen), how = close[place], "trial"
    within = "" if choose.memory_limit is None else f" within {choose.memory_limit:,} bytes"
    note = f"micro_batches='auto' took {names[index]} ({chosen.name}, {seconds * 1e3:.3g} ms a step by {how}{within}); "
    return index, chosen, (f"{note}the fastest schedule of each number was {'; '.join(told)}",)


def _planned(
    names: Sequence[str],
    least: Callable[[int], float],
    tried: Callable[[int], Sequence[Candidate]],
    choose: ChooseStep,
) -> tuple[dict[int, Sequence[Candidate]], list[str], list[PipecompileError]]:
    """The candidates of every way that can be compiled and may be best; what is said of the others, and their errors."""
    found, told, texts = dict[int, Sequence[Candidate]](), list[str](), dict[str, list[str]]()
    errors, best = list[PipecompileError](), math.inf
    for index, name in enumerate(names):
        try:
            if best < math.inf and (bound := least(index)) * _FAR > best:
                told.append(f"{name}: not planned, {bound * 1e3:.3g} ms if no device ever waited")
                continue
            found[index] = tried(index)
        except PipecompileError as error:
            errors.append(error)
            texts.setdefault(str(error).splitlines()[0], []).append(name)
            continue
        best = min([best, *(c.seconds for c in found[index] if choose.fits(c))])
    return found, told + [f"{', '.join(those)}: {text}" for text, those in texts.items()], errors


def _settled(
    names: Sequence[str],
    found: Mapping[int, Sequence[Candidate]],
    choose: ChooseStep,
    beside: Callable[[int, Sequence[Candidate]], Sequence[Candidate]],
    always: Collection[int],
) -> tuple[list[tuple[int, Candidate]], list[str]]:
    """The candidates that can be best, with their costs beside others, and the best of every way in words."""
    candidates, told, best = list[tuple[int, Candidate]](), list[str](), math.inf
    alone = {index: min((c.seconds for c in own if choose.fits(c)), default=math.inf) for index, own in found.items()}
    for index in sorted(alone, key=lambda index: alone[index]):
        own, more = found[index], ", measured alone"
        if alone[index] <= (_ALWAYS if index in always else _CLOSE) * best:
            own, more = beside(index, own), ""
            candidates += [(index, candidate) for candidate in own]
            best = min([best, *(c.seconds for c in own if choose.fits(c))])
        shown = min(own, key=_seconds)
        told.append(f"{names[index]}: {shown.seconds * 1e3:.3g} ms ({shown.name}{more}), keeps {shown.memory:,} bytes")
    return candidates, told


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds


def _close(
    candidates: Sequence[tuple[int, Candidate]], choose: ChooseStep, always: Collection[int]
) -> list[tuple[int, Candidate]]:
    """The best of each way that fits and is near the best of all by simulation, the best first."""
    best: dict[int, Candidate] = {}
    for index, candidate in candidates:
        if choose.fits(candidate) and (index not in best or candidate.seconds < best[index].seconds):
            best[index] = candidate
    order = sorted(best.items(), key=lambda item: item[1].seconds)
    ratios = [candidate.seconds / order[0][1].seconds for _, candidate in order]
    near = [item for item, ratio in zip(order, ratios, strict=True) if ratio <= _CLOSE][:_RACED]
    more = [item for item, ratio in zip(order, ratios, strict=True) if item[0] in always and ratio <= _ALWAYS]
    return near + [item for item in more if item not in near]


__all__ = ["best_way", "part_counts"]
