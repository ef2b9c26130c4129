"""A network of one's own, trained by a local rule: transformer blocks on scikit-learn's digits, a row of pixels a token.

python examples/own_network.py [stream|greedy|paper|tree|scan|dgl|bll|bp|..]
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hbll
from hbll.data import digits
from hbll.train import fit

torch.manual_seed(0)
torch.set_num_threads(1)
data = digits()
batches = DataLoader(TensorDataset(data.train.inputs, data.train.labels), batch_size=64, shuffle=True)
x, y = next(iter(batches))

network = hbll.Chain(
    embed=nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 32)),  # (B, 64) -> 8 tokens of 32 features
    blocks=[
        nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        for _ in range(7)
    ],
    head=nn.Sequential(nn.Flatten(), nn.Linear(8 * 32, 10)),
)
rule = hbll.make_rule(sys.argv[1] if len(sys.argv) > 1 else "stream", network, example=x, stage=(3, 4))
if not rule.late:  # credit from other steps leaves nothing to see
    print(hbll.audit(rule, x, y))


def show(number: int, step: hbll.Step) -> None:
    """Measures the network at the end of every epoch."""
    if number % len(batches) == 0:
        with torch.no_grad():
            right = (network(data.test.inputs).argmax(1) == data.test.labels).float().mean()
        print(f"{number} steps: {right:.1%} of the test digits; work {step.work}, span {step.span} ({step.engine})")


fit(rule, batches, torch.optim.AdamW(rule.parameters(), lr=1e-3), epochs=3, on_step=show)
