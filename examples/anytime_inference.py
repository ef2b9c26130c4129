"""One network, several depths: a path uses some of the blocks, and a device short of time takes a short one.

python examples/anytime_inference.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hbll
from hbll.data import digits
from hbll.models.mlp import SkipBlock

torch.manual_seed(0)
data = digits()
batches = DataLoader(TensorDataset(data.train.inputs, data.train.labels), batch_size=64, shuffle=True)
network = hbll.Chain(embed=nn.Linear(64, 64), blocks=[SkipBlock(64) for _ in range(15)], head=nn.Linear(64, 10))

# rim=: beside the chain, the label's loss of the short paths too. (The rule "paper" trains them by itself.)
rule = hbll.make_rule("stream", network, stage=(4, 5, 6), states="chain", rim=0.3)
hbll.train.fit(rule, batches, torch.optim.AdamW(rule.parameters(), lr=2e-3), epochs=6)

network.eval()
for readout in sorted(network.readouts, key=lambda readout: readout.blocks):  # from a single block to the chain of all
    with torch.no_grad():
        logits = network(data.test.inputs, path=readout.path)
    right = (logits.argmax(1) == data.test.labels).float().mean()
    print(f"{readout.blocks:2} of 15 blocks: {right:.1%} of the test digits (path {readout.name})")

small = network.sequential(path=4)  # deployed alone: a plain nn.Sequential that has these four blocks and no others
print(f"{sum(p.numel() for p in small.parameters())} of {sum(p.numel() for p in network.parameters())} parameters")
