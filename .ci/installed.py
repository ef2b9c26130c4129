"""Runs the lines of the README on the installed package: `python installed.py README.md`."""

import importlib.metadata
import re
import sys
import time
from pathlib import Path

began = time.perf_counter()
(lines,) = re.findall(r"^```python\n(.*?)^```", Path(sys.argv[1]).read_text(), re.DOTALL | re.MULTILINE)
names: dict = {}
exec(lines, names)
hbll, package = names["hbll"], Path(names["hbll"].__file__).parent
right = (names["network"](names["x"]).argmax(1) == names["y"]).float().mean()
assert right > 0.5, "the lines of the README train nothing"
assert package.is_relative_to(sys.prefix), f"hbll is not the installed one but {package}"
assert (package / "py.typed").exists(), "py.typed is missing"
assert hbll.__version__ == importlib.metadata.version("hbll")
for extra in ("matplotlib", "rich", "sklearn", "tyro"):
    assert extra not in sys.modules, f"the library imports {extra}, which belongs to an extra"
size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) / 2**20
print(
    f"hbll {hbll.__version__}: the lines of the README took {time.perf_counter() - began:.0f} s; {size:.1f} MiB installed"
)
