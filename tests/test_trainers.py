"""Rules in training loops of others. Oracle: the same steps in a plain loop."""

import copy

import pytest
import torch
from tests.networks import batches, residual

from hbll import make_rule

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
pytest.importorskip("accelerate", reason="the Hugging Face trainer needs accelerate")


class Trainer(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step = model(inputs["x"], inputs["labels"])
        return (step.loss, step) if return_outputs else step.loss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["stream", "tree"])
def test_the_hugging_face_trainer_accumulates_as_a_plain_loop(name, tmp_path):
    steps, accumulated, size = 3, 2, 4
    rule = make_rule(name, residual(5)[0], engine="loop")
    twin = copy.deepcopy(rule)
    seen = batches(steps * accumulated, sizes=(size,))
    samples = [{"x": x, "labels": y} for xs, ys in seen for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    Trainer(rule, arguments, train_dataset=samples, optimizers=(optimizer, None)).train()

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for i, (x, y) in enumerate(seen, 1):
        (twin(x, y).loss / accumulated).backward()
        if i % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(rule.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
