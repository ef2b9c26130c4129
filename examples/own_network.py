"""A network of one's own, trained by a local rule: transformer blocks on scikit-learn's digits, a row of pixels a token.

python examples/own_network.py [paper|tree|scan|stream|bp]
"""

import sys

import torch
from torch import nn

import hbll
from hbll.data import digits

torch.manual_seed(0)
torch.set_num_threads(1)
rule = sys.argv[1] if len(sys.argv) > 1 else "stream"

network = hbll.TreeNetwork(
    embed=nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 32)),  # (B, 64) -> 8 tokens of 32 features
    blocks=[
        nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        for _ in range(7)
    ],
    head=nn.Sequential(nn.Flatten(), nn.Linear(8 * 32, 10)),
)
objective = hbll.Objective(rule).prepare(network)
optimizer = torch.optim.AdamW([*network.parameters(), *objective.parameters()], lr=1e-3)

data = digits()
for epoch in range(1, 6):
    for batch in torch.randperm(len(data.train)).split(64):
        if len(batch) == 64:
            samples = data.train[batch]
            step = objective(network, samples.inputs, samples.labels)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
    with torch.no_grad():
        correct = (network(data.test.inputs).argmax(1) == data.test.labels).float().mean()
    print(
        f"epoch {epoch}: {correct:.1%} of the test digits; a step has work {step.work}, span {step.span} ({step.engine})"
    )

samples = data.train[:64]
print(hbll.audit(network, objective, samples.inputs, samples.labels))
