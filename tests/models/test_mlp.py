import torch
from hypothesis import given
from hypothesis import strategies as st

from hbll.models.mlp import SkipBlock, normed_layer, sigmoid_layer


def test_a_sigmoid_layer_is_the_sigmoid_of_a_linear_map():
    layer = sigmoid_layer(3, 2)
    x = torch.randn(5, 3)
    linear = x @ layer[0].weight.T + layer[0].bias
    torch.testing.assert_close(layer(x), 1 / (1 + (-linear).exp()))


@given(st.integers(1, 8), st.integers(1, 4))
def test_a_skip_block_adds_a_linear_map_of_what_is_positive(width, batch):
    block = SkipBlock(width)
    z = torch.randn(batch, width)
    torch.testing.assert_close(block(z), z + z.clamp(min=0) @ block.linear.weight.T + block.linear.bias)


def test_a_normed_layer_standardises_over_the_batch_before_its_leaky_relu():
    torch.manual_seed(0)
    layer = normed_layer(3, 2).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    linear = x @ layer[0].weight.T + layer[0].bias
    standard = (linear - linear.mean(0)) / (linear.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), torch.where(standard > 0, standard, 0.01 * standard))
