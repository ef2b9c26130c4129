"""A rule of one's own: the one method that it needs, and everything else comes with it.

python examples/writing_a_rule.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hbll
from hbll.cut import fresh_copy
from hbll.data import digits
from hbll.losses import mean_loss
from hbll.models.mlp import SkipBlock


class Readouts(hbll.Rule):
    """Every stage learns the label by a head of its own, the last one by the network's."""

    def __init__(self, network, **options):  # stage=, loss=
        super().__init__(network, **options)
        self.heads = nn.ModuleList(fresh_copy(network.head) for _ in self.stages[:-1])

    def auxiliary(self, stage):  # whose modules they are: of rule.own(stage), and of the audit
        return list(self.heads[stage - 1 : stage])

    def losses(self, x, y, step):
        state, context = self.network.embedded(x)
        for k, (stage, head) in enumerate(zip(self.stages, [*self.heads, self.network.head], strict=True), 1):
            output = stage(state, **context)
            yield hbll.StageLoss(k, mean_loss(self.loss, head(output), y))
            state = output.detach()  # all that the next stage is given


def main() -> None:
    torch.manual_seed(0)
    data = digits()
    batches = DataLoader(TensorDataset(data.train.inputs, data.train.labels), batch_size=64, shuffle=True)
    network = hbll.Chain(embed=nn.Linear(64, 64), blocks=[SkipBlock(64) for _ in range(6)], head=nn.Linear(64, 10))
    rule = Readouts(network, stage=2)
    print(hbll.audit(rule, *next(iter(batches))))
    hbll.train.fit(rule, batches, torch.optim.AdamW(rule.parameters(), lr=2e-3), epochs=6)
    with torch.no_grad():
        right = (network(data.test.inputs).argmax(1) == data.test.labels).float().mean()
    print(f"{right:.1%} of the test digits")


if __name__ == "__main__":
    main()
