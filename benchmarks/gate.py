"""The gate of a benchmark: the tests that hold its rules to their oracles, without which no table is printed.

python benchmarks/gate.py bp stream      # what a benchmark of these two runs first
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"


def oracle_tests(name: str) -> list[str]:
    """The tests of a rule: its classes of the contract that every rule keeps, the file of its module, and those of the
    modules beside that it is made of; or those at a place in the folder of tests."""
    if (TESTS / name).exists():
        return [str(TESTS / name)]
    from hbll.rules import RULES  # and torch, whose threads other benchmarks do without

    contract = TESTS / "rules" / "test_contract.py"
    classes = re.findall(r'^class (Test\w+)\(.*\):\n    name.* = "(\w+)"', contract.read_text(), re.MULTILINE)
    module = Path(inspect.getfile(RULES[name]))
    parts = re.findall(r"^from hbll\.rules\.(\w+) import", module.read_text(), re.MULTILINE)
    files = [TESTS / "rules" / f"test_{part}.py" for part in (module.stem, *parts)]
    return [
        *(f"{contract}::{title}" for title, rule in classes if rule == name),
        *(str(file) for file in files if file.exists()),
    ]


def gate(names: Iterable[str]) -> bool:
    """Runs the oracle tests of these rules, or at these places, and ends the process unless all of them pass.

    Where there are no tests or no pytest, as on a machine that has torch alone, it says so and lets pass; so it does with
    GATE=0 in the environment, where they have passed just before. Whether they were run.
    """
    if os.environ.get("GATE") == "0":
        print("gate: left out by GATE=0, for it has been passed before", flush=True)
        return False
    missing = {"tests/": not TESTS.is_dir(), "pytest": importlib.util.find_spec("pytest") is None}
    reasons = [f"there is no {name} here" for name, absent in missing.items() if absent]
    if reasons:
        print(f"gate: not passed, for {reasons[0]}; what follows has not been checked", flush=True)
        return False
    names = list(dict.fromkeys(names))
    tests = dict.fromkeys(test for name in names for test in oracle_tests(name))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"--rootdir={TESTS.parent}",
        *tests,
    ]
    run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{run.stdout}{run.stderr}gate: an oracle test failed, so nothing is measured")
    print(f"gate: the oracle tests of {', '.join(names)} pass", flush=True)
    return True


if __name__ == "__main__":
    gate(sys.argv[1:])
