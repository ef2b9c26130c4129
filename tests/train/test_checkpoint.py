import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from hbll.train import checkpoint

numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tensors = st.builds(
    lambda shape, kind: (torch.rand(shape) * 100).to(kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
keys = st.text("abc.", min_size=1) | st.integers(0, 99)
nests = st.recursive(
    numbers | tensors,
    lambda part: st.lists(part, max_size=3) | st.lists(part, max_size=3).map(tuple) | st.dictionaries(keys, part),
    max_leaves=8,
)


def same(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and left.equal(right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@given(state=nests)
def test_what_was_saved_is_loaded(tmp_path_factory, state):
    file = tmp_path_factory.getbasetemp() / "checkpoint.safetensors"
    checkpoint.save(file, state)
    assert same(checkpoint.load(file), state)


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    state = {"whole": whole, "row": whole[1], "turned": whole.T}
    checkpoint.save(tmp_path / "c", state)
    assert same(checkpoint.load(tmp_path / "c"), state)


def test_places_that_look_alike_are_kept_apart(tmp_path):
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    checkpoint.save(tmp_path / "c", state)
    assert same(checkpoint.load(tmp_path / "c"), state)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_goes_on_as_if_it_had_not_been_saved(tmp_path, optimizer):
    def steps(weight, chosen, count):
        for _ in range(count):
            chosen.zero_grad()
            (weight**4).sum().backward()
            chosen.step()

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    chosen = optimizer([weight], lr=0.01)
    steps(weight, chosen, 3)
    checkpoint.save(tmp_path / "c", {"weight": weight, "optimizer": chosen.state_dict()})
    steps(weight, chosen, 3)

    loaded = checkpoint.load(tmp_path / "c")
    other_weight = torch.nn.Parameter(loaded["weight"])
    other = optimizer([other_weight], lr=0.5)
    other.load_state_dict(loaded["optimizer"])
    steps(other_weight, other, 3)
    assert other_weight.equal(weight)


def test_the_file_is_an_ordinary_safetensors_file(tmp_path):
    checkpoint.save(tmp_path / "c", {"network": {"head.bias": torch.ones(2)}, "epoch": 3})
    with safe_open(tmp_path / "c", framework="np") as stored:
        assert list(stored.keys()) == ["network.head.bias"]
        assert stored.get_tensor("network.head.bias").tolist() == [1, 1]
        json.loads(stored.metadata()["outline"])


def test_what_has_no_place_in_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"ndarray at optimizer\.0"):
        checkpoint.save(tmp_path / "c", {"optimizer": [np.zeros(1)]})


def test_a_damaged_or_missing_file_is_named(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors cannot be read"):
        checkpoint.load(file)
    checkpoint.save(file, {"weight": torch.ones(100)})
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors cannot be read"):
        checkpoint.load(file)
