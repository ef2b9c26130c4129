"""The ways of reading a network that are measured, by name."""

from dataclasses import dataclass

from hbll.recipes import Network, TrainingRule
from hbll.recurrent import RecurrentNetwork, RecurrentRule
from hbll.tree import Path, format_path


@dataclass(frozen=True)
class Readout:
    """A path through a network."""

    name: str
    """The network's name for it, or its blocks joined by dashes."""

    path: Path

    blocks: int
    """Blocks that are evaluated along it; of a recurrent network, cells."""


def usual_readouts(network: Network, rule: TrainingRule) -> list[Readout]:
    """The chain first; then the rim cut short at every length, or what else of a recurrent network the rule trains."""
    match network, rule:
        case RecurrentNetwork(), RecurrentRule():
            paths = [path for name, path in network.readouts.items() if name in rule.readouts]
        case _:
            paths = [network.tree.chain, *network.tree.rim_paths]
    return [_readout(network, path) for path in dict.fromkeys(paths)]


def find_readout(network: Network, name: str) -> Readout:
    """The readout that a user names; ValueError when the network has none like it."""
    named = network.readouts if isinstance(network, RecurrentNetwork) else {}
    return _readout(network, named[name] if name in named else network.tree.parse(name))


def _readout(network: Network, path: Path) -> Readout:
    if not isinstance(network, RecurrentNetwork):
        return Readout(format_path(path), path, len(path))
    names = {known: name for name, known in network.readouts.items()}
    # Times are the ends of arcs, each with a cell; the end of the last arc, N, is no part of a path.
    return Readout(names.get(path, format_path(path)), path, len(path) + 1)
