"""Size expressions against Python's own arithmetic, and what they may not contain."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hand_made
from pipecompile.ir.graph import evaluate

SIZES = {"s0": 3, "s1": 7, "s77": 1}

atoms = st.integers(0, 20).map(str) | st.sampled_from(list(SIZES))
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda e: f"(-{e})"),
        st.tuples(st.sampled_from(["Max", "Min"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        st.tuples(st.sampled_from(["FloorDiv", "Mod"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=6,
)


@hand_made.RELAXED
@given(expressions)
def test_agrees_with_python(expression: str) -> None:
    known = {"Max": max, "Min": min, "FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b, **SIZES}
    try:
        wanted = eval(expression, {"__builtins__": {}}, known)
    except ZeroDivisionError:
        assume(False)
    assert evaluate(expression, SIZES) == wanted


def test_powers_and_several_arguments() -> None:
    assert evaluate("s0**2 * 4", SIZES) == math.prod([3, 3, 4])
    assert evaluate("Max(1, s1, s0)", SIZES) == 7


@pytest.mark.parametrize("expression", ["s9", "1.5", "s0 / 2", "__import__('os')", "s0.real", "[s0]", "Max(s0, x=1)()"])
def test_refuses_anything_else(expression: str) -> None:
    with pytest.raises(ValueError, match="cannot evaluate the size"):
        evaluate(expression, SIZES)
