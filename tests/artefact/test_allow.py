"""The loader's allow-list: nothing a saved pipeline should not do gets through."""

from __future__ import annotations

import pytest

from pipecompile.artefact.allow import check_source
from pipecompile.errors import ArtefactError

GOOD = '''"""Device 0."""
import math
import operator
from itertools import count

import torch

aten = torch.ops.aten


def stage_0(weight, x):
    """One layer."""
    # linear  (model.py:3)
    linear = aten.linear.default(x, weight, None)
    parts = aten.split.Tensor(linear, 2, 1)
    first = parts[0]
    size = operator.floordiv(aten.sym_size.int(x, 0), 2)
    full = aten.full.default([size], -math.inf, dtype=torch.float32, device=torch.device('cpu'))
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True, cache_enabled=False):
        mm = aten.mm.default(first, first)
    del linear, parts
    return (mm, full)


def run(link, start):
    state = link.state()
    from_host = link.receiver("host>0")
    to_host = link.sender("0>host")
    if start == 0:
        from_host.post(0)
    for sample in count(start):
        from_host.post(sample + 1)
        message = yield from_host
        if message is None:
            break
        (x,) = message
        (mm, full) = stage_0(*state, x)
        yield to_host
        to_host.put(sample, mm, full)
    yield to_host
    to_host.end()
'''


def test_what_codegen_writes_is_allowed() -> None:
    check_source(GOOD, "device_0.py")


BAD = {
    "another import": "import os",
    "import from": "from os import system",
    "import under another name": "import torch as operator",
    "module level call": "torch.manual_seed(0)",
    "module level assignment": "x = 1",
    "class": "class A: pass",
    "open": "def f(x):\n    return open(x)",
    "eval": "def f(x):\n    return eval(x)",
    "getattr": "def f(x):\n    return getattr(x, 'y')",
    "dunder": "def f(x):\n    return x.__class__",
    "dunder through torch": "def f(x):\n    return torch.__builtins__",
    "tensor method": "def f(x):\n    return x.numpy()",
    "torch.load": "def f(x):\n    return torch.load('w')",
    "torch.hub": "def f(x):\n    return torch.hub.load('a', 'b')",
    "torch submodule": "def f(x):\n    return torch.os.system('true')",
    "operator call": "def f(x):\n    return operator.attrgetter('y')(x)",
    "methodcaller": "def f(x):\n    return operator.methodcaller('y')(x)",
    "file mapping": "def f(x):\n    return aten.from_file.default('/etc/passwd')",
    "custom operator": "def f(x):\n    return torch.ops.mine.op.default(x)",
    "lambda": "def f(x):\n    return (lambda: x)()",
    "comprehension": "def f(x):\n    return [y for y in x]",
    "decorator": "@torch.no_grad\ndef f(x):\n    return x",
    "default": "def f(x=open('y')):\n    return x",
    "annotation": "def f(x: open('y')):\n    return x",
    "global": "def f(x):\n    global torch\n    torch = x",
    "redefining torch": "def f(x):\n    torch = x\n    return torch",
    "redefining a parameter": "def f(torch):\n    return torch",
    "loop target": "def f(x):\n    for torch in x:\n        break",
    "assignment to an attribute": "def f(x):\n    x.y = 1",
    "assignment to an item": "def f(x):\n    x[0] = 1",
    "with": "def f(x):\n    with x:\n        return 1",
    "try": "def f(x):\n    try:\n        return x\n    finally:\n        return 1",
    "f-string": "def f(x):\n    return f'{x}'",
    "walrus": "def f(x):\n    return (y := x)",
    "nested function": "def f(x):\n    def g(y):\n        return y\n    return g(x)",
    "while": "def f(x):\n    while x:\n        break",
    "calling a result": "def f(x):\n    return x(1)",
    "calling an item": "def f(x):\n    return x[0](1)",
    "redefining an allowed function": "def count():\n    return 1",
    "attribute of an operator": "def f(x):\n    return aten.add.__getattribute__('__class__')",
    "attribute set on an operator": "def f(x):\n    aten.add.__setattr__('g', x)",
    "attribute kept on an operator": "def f(x):\n    return aten.add.g(x)",
    "plain attribute of an operator": "def f(x):\n    return aten.add.op(x)",
    "TorchScript function that writes a file": "def f(x):\n    aten.save.default(x, 'evil')",
    "TorchScript function that seeds": "def f(x):\n    aten.manual_seed.default(3)",
    "unchecked sparse indices": "def f(x):\n    return aten._sparse_coo_tensor_unsafe.default(x, x, [1])",
    "unknown higher-order operator": "def f(x):\n    return torch.ops.higher_order.call_torchbind(x)",
    "deleting from torch": "def f(x):\n    del torch.float32",
    "loop over an attribute": "def f(x):\n    for torch.float32 in x:\n        break",
    "item in a tuple of targets": "def f(x):\n    (y, x[0]) = x",
    "deleting an item": "def f(x):\n    del x[0]",
    "port that was something else": "def f(link, x):\n    p = link.sender('a')\n    p = x\n    p.put(1)",
    "function inside a branch": "def f(x):\n    if x:\n        def g(y):\n            return y\n    return x",
    "syntax": "def f(:",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_anything_else_is_refused_by_file_and_line(text: str) -> None:
    with pytest.raises(ArtefactError, match=r"device_0\.py:\d+"):
        check_source(f"import math\nimport operator\nimport torch\naten = torch.ops.aten\n{text}\n", "device_0.py")


def test_trust_allows_custom_operators_and_nothing_else() -> None:
    custom = "import torch\n\n\ndef f(x):\n    return torch.ops.mine.op.default(x)\n"
    check_source(custom, "device_0.py", trust=True)
    with pytest.raises(ArtefactError):
        check_source("def f(x):\n    return open(x)\n", "device_0.py", trust=True)


def test_operators_with_unusual_names_are_allowed() -> None:
    """Every operator the dispatcher knows, in-place, dunder and sizes included; the adapter's internals are there."""
    names = ("add.Tensor", "add_.Tensor", "__and__.Tensor", "sym_size.int", "_to_copy.default", "scatter.src")
    for name in names:
        check_source(f"def f(x):\n    return aten.{name}(x)\n", "device_0.py")
