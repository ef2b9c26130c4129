"""A rule inside a LightningModule: automatic optimisation, as with any loss.

python examples/lightning_module.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hbll
from hbll.data import digits
from hbll.models.mlp import SkipBlock


class Classifier(lightning.LightningModule):
    """A network trained by a rule; what is deployed is ``self.rule.network``."""

    def __init__(self) -> None:
        super().__init__()
        network = hbll.Chain(embed=nn.Linear(64, 64), blocks=[SkipBlock(64) for _ in range(7)], head=nn.Linear(64, 10))
        self.rule = hbll.make_rule("stream", network, stage=(3, 4), states="chain")

    def training_step(self, batch, batch_idx):
        step = self.rule(*batch)
        self.log("label_loss", step.label_loss)  # the task's loss; step.loss is a sum over stages
        return step.loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.rule.network(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.rule.parameters(), lr=2e-3)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    data = digits()
    train = DataLoader(TensorDataset(data.train.inputs, data.train.labels), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(data.test.inputs, data.test.labels), batch_size=256)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", log_every_n_steps=1, **quiet)
    trainer.fit(Classifier(), train, test)
    print(f"{trainer.callback_metrics['accuracy'].item():.1%} of the test digits")


if __name__ == "__main__":
    main()
