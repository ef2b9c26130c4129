import torch

from hbll.models.resnet import BasicBlock, resnet18


def test_resnet_18_has_its_published_number_of_parameters():
    # 11.17 million: 64 * 27 in the stem, 3 x 3 convolutions, three 1 x 1 skips, batch norms, the linear head.
    stages, before, expected = (64, 128, 256, 512), 64, 64 * 27 + 2 * 64
    for channels in stages:
        expected += 9 * channels * (before + 3 * channels) + 4 * 2 * channels
        expected += 0 if before == channels else before * channels + 2 * channels
        before = channels
    expected += 10 * (512 + 1)
    assert sum(p.numel() for module in resnet18() for p in module.parameters()) == expected == 11_173_962


def test_states_halve_in_size_and_double_in_channels():
    *body, head = resnet18(4)
    assert len(body) == 9
    state, shapes = torch.randn(2, 3, 32, 32), []
    for module in body:
        state = module(state)
        shapes.append(tuple(state.shape[1:]))
    pixels = [(4, 32, 32)] * 3 + [(8, 16, 16)] * 2 + [(16, 8, 8)] * 2 + [(32, 4, 4)] * 2
    assert shapes == pixels
    assert head(state).shape == (2, 10)


def test_a_basic_block_adds_to_its_skip():
    torch.manual_seed(0)
    block = BasicBlock(4, 4, 1).eval()
    state = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(state), (state + block.second(block.first(state).relu())).relu())
    with torch.no_grad():
        block.second[1].weight.zero_()
    torch.testing.assert_close(block(state), state.relu())
