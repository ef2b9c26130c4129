"""Sequential MNIST: the sequences, the network, and every method for a step."""

import numpy as np
import pytest
import torch

from hbll.recipes import RECIPES
from hbll.recurrent import RULES
from hbll.train.evaluate import evaluate_run
from hbll.train.loop import train
from hbll.train.run import Run

Recipe = RECIPES["sequential-mnist"]


@pytest.mark.parametrize(("depth", "chunk_width", "missing"), [(1, 392, 0), (4, 49, 0), (6, 13, 48), (8, 4, 240)])
def test_sequences_are_the_pixels_in_order_with_zeros_before(depth, chunk_width, missing):
    images = torch.rand(3, 784)
    found = Recipe(depth=depth).sequences(images)
    assert found.shape == (3, 2**depth, chunk_width)
    assert found.flatten(1)[:, missing:].equal(images)
    assert (found.flatten(1)[:, :missing] == 0).all()


def test_permuted_pixels_are_the_same_ones_in_one_order():
    images = torch.arange(784.0).repeat(2, 1)
    found = Recipe(depth=4, permuted=True).sequences(images).flatten(1)
    assert found[0].equal(found[1])
    assert not found.equal(images)
    assert np.array_equal(np.sort(found[0]), np.arange(784))
    assert Recipe(depth=4, permuted=True).sequences(images).flatten(1).equal(found)


@pytest.mark.parametrize("method", RULES)
def test_every_method_learns(method):
    recipe = Recipe(depth=3, width=8)
    torch.manual_seed(0)
    network = recipe.initial_network(0)
    x, y = recipe.sequences(torch.rand(32, 784)), torch.randint(10, (32,))
    rule = recipe.rule(method, network, x)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2)
    before = torch.nn.functional.cross_entropy(network(x), y).item()
    for _ in range(40):
        optimizer.zero_grad()
        rule(x, y).loss.backward()
        optimizer.step()
    path = "tree" if method == "paper" else "chain"
    assert torch.nn.functional.cross_entropy(network(x, path=path), y).item() < before


def test_methods_that_do_not_exist():
    for cell, method, message in (
        ("gru", "bp", "unknown rule"),
        ("elman", "bptt-fused", "no recurrent network like Elman"),
    ):
        recipe = Recipe(depth=2, width=4, cell=cell)
        with pytest.raises(ValueError, match=message):
            recipe.rule(method, recipe.network(), torch.zeros(1, 4, 196))


def test_the_initial_network_is_the_same_for_every_method():
    recipe = Recipe(depth=2, width=8)
    first = recipe.initial_network(3)
    recipe.rule("hbll", first, torch.zeros(1, 4, 196))
    first, again = first.state_dict(), recipe.initial_network(3).state_dict()
    assert all(first[name].equal(again[name]) for name in first)


@pytest.mark.parametrize(("method", "readouts"), [("paper", [("chain", 4), ("tree", 3)]), ("hbll", [("chain", 4)])])
def test_a_run_is_measured_along_its_chain_and_its_tree(mnist_folder, tmp_path, method, readouts):
    recipe = Recipe(depth=2, width=4, epochs=1, train_samples=256)
    run = Run(recipe=recipe, method=method, seed=0, folder=tmp_path / "run", data_dir=mnist_folder)
    train(run)
    paths = evaluate_run(run.folder)
    assert [(path["path"], path["blocks"]) for path in paths] == readouts
    assert evaluate_run(run.folder, ["chain"]) == paths[:1]
