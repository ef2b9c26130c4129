"""Training of wide shifted-ReLU networks in time that does not grow with their weights (arXiv 2208.04508).

    model = hbll.sublinear.fit(X, y, width=2**20, kappa=0.24)
    model.predict(X_new); model.history[-1]["loss"]

Needs the extra: pip install 'hbll[sublinear]'. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .estimator import SublinearRegressor
    from .model import Model
    from .training import fit

__all__ = ["Model", "SublinearRegressor", "fit"]

_HOMES = {"Model": "model", "SublinearRegressor": "estimator", "fit": "training"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "scipy", "threadpoolctl"):
            raise
        raise ModuleNotFoundError(
            f"hbll.sublinear needs {error.name}: pip install 'hbll[sublinear]'", name=error.name
        ) from None
