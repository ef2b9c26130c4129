"""Imports go one way, those that wait for a call among them."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import hbll

ROOT = Path(hbll.__file__).parent
MODULES = {".".join(("hbll", *p.relative_to(ROOT).with_suffix("").parts)): p for p in ROOT.rglob("*.py")}


def imported(name, path):
    """The modules of the package that a module names in its imports."""
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            # ``from package import name`` names a module, or something in the package's own.
            found = [f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source for a in node.names]
        else:
            continue
        for module in found:
            module = f"{module}.__init__" if f"{module}.__init__" in MODULES else module
            if module in MODULES and module != name:
                yield module


def test_no_module_stands_on_one_that_stands_on_it():
    imports = {name: set(imported(name, path)) for name, path in MODULES.items()}
    assert {"hbll.tree", "hbll.calls"} <= imports["hbll.network"]
    assert "hbll.sublinear.cost" in imports["hbll.sublinear.training"]  # relative
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle
