"""The allow-list for generated code: what may stand in a ``device_<i>.py`` that is loaded.

A saved pipeline holds code, so doing without pickle is not safety yet. Loaded code may define
functions, call torch operators, operator and math functions and what it defined itself, index,
branch, loop over ``count()`` and yield. It may not import anything else, reach attributes by
other paths, assign to anything but its own variables, or touch names that begin with an underscore.

This bounds what loaded code can reach, not what a kernel does when it is given nonsense.
"""

from __future__ import annotations

import ast
import re

from pipecompile.artefact.operators import is_tensor_operator
from pipecompile.errors import ArtefactError
from pipecompile.ir.training import HELPERS

_IMPORTS = {"import math", "import operator", "import torch", "from itertools import count"}

_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Expr, ast.Assign, ast.Return, ast.Delete),
    *(ast.For, ast.If, ast.Break, ast.With, ast.withitem, ast.Yield, ast.IfExp, ast.Import, ast.ImportFrom, ast.alias),
    *(ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Load, ast.Store, ast.Del, ast.Constant, ast.Tuple, ast.List),
    *(ast.Dict, ast.Subscript, ast.Slice, ast.Starred, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add),
    *(ast.Mod, ast.FloorDiv),
    *(ast.Compare, ast.Is, ast.Eq),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TORCH = _words("device autocast sym_max sym_min sym_not sym_float sym_int sym_sum sym_ite")
_OPERATOR = _words(
    "add sub mul truediv floordiv mod pow neg eq ne lt le gt ge and_ or_ xor not_ abs getitem pos inv invert"
)
#: Higher-order operators: they call functions of the same file only.
_HIGHER_ORDER = _words("while_loop scan map_impl associative_scan flex_attention")
#: ATen operators that reach outside the process, or skip the checks that keep others within their memory.
_REFUSED = _words("from_file _sparse_coo_tensor_unsafe _sparse_compressed_tensor_unsafe _sparse_csr_tensor_unsafe") | (
    _words("_sparse_csc_tensor_unsafe _sparse_bsr_tensor_unsafe _sparse_bsc_tensor_unsafe")
)
_MATH = _words("ceil floor trunc sqrt inf nan")
_BUILTINS = _words("complex slice range")
_MODULE_NAMES = _words("torch aten operator math count link")
_OPENERS = ("link.receiver", "link.sender")
_LINK = _words("state receiver sender")
_PORT = _words("post put end")

#: What training adds.
_HELPERS = {ast.unparse(statement) for statement in ast.parse(HELPERS).body}
_CONSTANT = re.compile(r"(STATE|TRAINED)_\d+ = \(('\w+'(, '\w+')*,?)?\)")
_STEP_LINK = _words("sums parts tensors receiver sender draw loss commit norm update")
_STEP_PATHS = _words("draw.statistics sums.add sums.receive sums.take kept.pop passed.pop torch.enable_grad")
_METHODS = _words("detach requires_grad_ clone contiguous")
_DICTS = _words("kept passed")


def check_source(source: str, filename: str, *, trust: bool = False, step: bool = False) -> None:
    """Refuse generated code that holds anything not on the allow-list: that of a stream, or of a training ``step``.

    Raises:
        ArtefactError: naming the file, the line and what is not allowed there.
    """
    try:
        tree = ast.parse(source, filename)
    except SyntaxError as error:
        raise ArtefactError(f"{filename}:{error.lineno}: not valid Python: {error.msg}") from error
    (_StepChecker if step else _Checker)(filename, trust, tree).visit(tree)


class _Checker(ast.NodeVisitor):
    """Visits a generated module of a stream."""

    nodes: tuple[type[ast.AST], ...] = _NODES
    callable: frozenset[str] = _BUILTINS | {"count"}

    def __init__(self, filename: str, trust: bool, tree: ast.Module) -> None:
        self.filename = filename
        self.trust = trust
        self.functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.ports: set[str] = set()
        self.reserved = self.functions | _MODULE_NAMES | _BUILTINS

    def refuse(self, node: ast.AST, what: str) -> ArtefactError:
        line = getattr(node, "lineno", 0)
        hint = "" if self.trust else " (trust=True allows operators outside torch's own, nothing else)"
        return ArtefactError(f"{self.filename}:{line}: {what} is not allowed in generated code{hint}")

    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, self.nodes):
            raise self.refuse(node, type(node).__name__)
        super().generic_visit(node)

    def visit_Module(self, node: ast.Module) -> None:
        for statement in node.body:
            text = ast.unparse(statement)
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)
            elif (
                text not in _IMPORTS and text != "aten = torch.ops.aten" and not docstring and not self._constant(text)
            ):
                raise self.refuse(statement, f"the statement {text.splitlines()[0]!r}")

    def _constant(self, statement: str) -> bool:
        """Whether another statement may stand outside functions."""
        del statement
        return False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in self.reserved - self.functions | _MODULE_NAMES:
            raise self.refuse(node, f"redefining {node.name!r}")
        extras = (node.decorator_list, node.args.defaults, node.args.kw_defaults, node.returns)
        typed = getattr(node, "type_params", None) or any(
            a.annotation for a in ast.walk(node) if isinstance(a, ast.arg)
        )
        nested = any(isinstance(inner, ast.FunctionDef) for inner in ast.walk(node) if inner is not node)
        if any(extras) or typed or nested:
            raise self.refuse(node, f"the form of function {node.name!r}")
        self.visit(node.args)
        self.ports = _ports(node)
        for statement in node.body:
            self.visit(statement)

    def visit_arg(self, node: ast.arg) -> None:
        self._name(node, node.arg)
        if node.arg in self.reserved - {"link"}:
            raise self.refuse(node, f"redefining {node.arg!r}")

    def _target(self, node: ast.AST, target: ast.expr) -> None:
        """Only variables are assigned to, looped over and deleted: nothing outside changes."""
        names = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        for name in names:
            if not isinstance(name, ast.Name):
                raise self.refuse(node, f"changing {ast.unparse(target)!r}")

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._target(node, target)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._target(node, target)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._target(node, node.target)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._name(node, node.id)
        if not isinstance(node.ctx, ast.Load) and node.id in self.reserved:
            raise self.refuse(node, f"redefining {node.id!r}")

    def _name(self, node: ast.AST, name: str) -> None:
        if name.startswith("_"):
            raise self.refuse(node, f"the name {name!r}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path, owner = ast.unparse(node), node.value
        if isinstance(owner, ast.Subscript) and isinstance(owner.value, ast.Name) and owner.value.id in self.ports:
            self.visit(owner.slice)
            path = f"{owner.value.id}.{node.attr}"
        if not self._allowed_path(path):
            raise self.refuse(node, f"{path!r}")

    def _allowed_path(self, path: str) -> bool:
        """Attributes are reached by these paths only."""
        first, *rest = path.split(".")
        if not all(part.isidentifier() for part in (first, *rest)):
            return False
        if first == "aten" and len(rest) == 2:
            return rest[0] not in _REFUSED and is_tensor_operator(rest[0], rest[1])
        if any(part.startswith("__") for part in rest):
            return False
        match first, rest:
            case "torch", ["ops", "higher_order", name]:
                return self.trust or name in _HIGHER_ORDER
            case "torch", ["ops", _, _, _]:
                return self.trust
            case "torch", [name]:
                return name in _TORCH or _is_torch_constant(name)
            case "operator", [name]:
                return name in _OPERATOR
            case "math", [name]:
                return name in _MATH
            case "link", [name]:
                return name in _LINK
            case _, [name]:
                return first in self.ports and name in _PORT
            case _:
                return False

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Name):
            if function.id not in self.functions | self.callable:
                raise self.refuse(node, f"calling {function.id!r}")
        elif isinstance(function, ast.IfExp):
            for choice in (function.body, function.orelse):
                if not isinstance(choice, ast.Name) or choice.id not in self.functions:
                    raise self.refuse(node, f"calling {ast.unparse(choice)!r}")
        elif not isinstance(function, ast.Attribute):
            raise self.refuse(node, f"calling {ast.unparse(function)!r}")
        self.generic_visit(node)

    def _context(self, call: ast.Call) -> bool:
        return ast.unparse(call.func) == "torch.autocast"

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            call = item.context_expr
            if not isinstance(call, ast.Call) or not self._context(call) or item.optional_vars:
                raise self.refuse(node, f"'with {ast.unparse(call)}'")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        raise self.refuse(node, f"{ast.unparse(node)!r}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        raise self.refuse(node, f"{ast.unparse(node)!r}")


class _StepChecker(_Checker):
    """Visits a generated training module.

    Beyond what a stream may: the helpers of every training module, word for word; constants that name
    tensors; what is kept between forward and backward in two dicts; ``grad``; the parts of a step's
    link; and a few methods of tensors that make others of them.
    """

    nodes = (*_Checker.nodes, ast.Mult, ast.IsNot, ast.Gt)
    callable = _Checker.callable | {"grad", "draw", "loss_of"}

    def _constant(self, statement: str) -> bool:
        return statement in _HELPERS or _CONSTANT.fullmatch(statement) is not None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A helper is known; the rest is checked."""
        if ast.unparse(node) not in _HELPERS:
            super().visit_FunctionDef(node)

    def _target(self, node: ast.AST, target: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._target(node, part)
        elif not (isinstance(target, ast.Subscript) and ast.unparse(target.value) in _DICTS):
            super()._target(node, target)

    def _name(self, node: ast.AST, name: str) -> None:
        if name != "_":
            super()._name(node, name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Methods of tensors, on variables and on what calls and subscripts give."""
        module = isinstance(node.value, ast.Name) and node.value.id in self.reserved
        if node.attr in _METHODS and not module and not isinstance(node.value, ast.Attribute):
            self.visit(node.value)
        else:
            super().visit_Attribute(node)

    def _allowed_path(self, path: str) -> bool:
        first, _, name = path.partition(".")
        return path in _STEP_PATHS or (first == "link" and name in _STEP_LINK) or super()._allowed_path(path)

    def _context(self, call: ast.Call) -> bool:
        return ast.unparse(call) == "torch.enable_grad()" or super()._context(call)


def _ports(function: ast.FunctionDef) -> set[str]:
    """Variables that hold an end of a channel, or a list of those of replicas, and never anything else."""
    opened: list[str] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            calls = node.value.elts if isinstance(node.value, ast.List) else [node.value]
            if calls and all(isinstance(c, ast.Call) and ast.unparse(c.func) in _OPENERS for c in calls):
                opened.append(node.targets[0].id)
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return {name for name in opened if stored.count(name) == opened.count(name)}


def _is_torch_constant(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format))
