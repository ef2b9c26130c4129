"""The network that a new run begins with: as drawn, or with the weights of a saved one."""

from collections.abc import Mapping

from torch import Tensor, nn

from hbll.data.vocabulary import load_vocabulary
from hbll.files import read_tensors
from hbll.train.evaluate import load_rule
from hbll.train.run import CONFIGURATION, Run, open_run

__all__ = ["first_network", "start_weights"]


def start_weights(run: Run) -> dict[str, Tensor] | None:
    """The weights that a run begins with, from the folder of another run or one that `network.save` wrote; None where they
    are drawn.

    ValueError when there are none in the folder, or they are damaged or of other tokens.
    """
    folder = run.start_from
    if folder is None:
        return None
    runs = [home for home in (folder, folder.parent) if (home / CONFIGURATION).is_file()]
    if runs:  # its own, or that of a run's model
        other = open_run(runs[0])
        tokens = load_vocabulary(other.vocabulary_file) if other.vocabulary_file.is_file() else None
        ours = run.recipe.vocabulary(run.data_dir)
        if (tokens is None) != (ours is None):
            texts = run.recipe.name if ours else other.recipe.name
            raise ValueError(
                f"{folder} holds a network of {other.recipe.name}, not of {run.recipe.name}: {texts} is of texts"
            )
        if tokens != ours:
            raise ValueError(f"{folder} holds a network of other tokens than those of {run.recipe.name} here")
        if other.folder == folder:
            return load_rule(other).network.state_dict()
    file = folder / "weights.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds neither a run nor a saved network: it has no {CONFIGURATION} and no {file.name}"
        )
    return read_tensors(file)[0]


def first_network(run: Run, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """The network before training, with these weights if there are some; ValueError when they are of another one."""
    network = run.recipe.initial_network(run.seed)
    if weights is not None:
        there, here = ({name: tuple(t.shape) for name, t in known.items()} for known in (weights, network.state_dict()))
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"{run.start_from} holds another network than this one: {name} has shape {there.get(name)} there and "
                    f"{here.get(name)} here"
                )
        network.load_state_dict(weights)
    return network
