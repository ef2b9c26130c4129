"""The asynchronous pipeline. Oracles: backpropagation on the batch that a stage is late for, and a transcription."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tests.test_objective import CLASSES, INPUTS, assert_equal_gradients, convolutional, gradients, mlp, transformer
from torch import nn

import hbll

KINDS = {"mlp": mlp, "convolutional": convolutional, "transformer": transformer}


def label_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def batches(count, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(4, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (4,))) for _ in range(count)]


def stages_of(count, size):
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("kind", "engine"), [*((kind, "loop") for kind in KINDS), ("mlp", "batched")])
def test_with_frozen_weights_it_is_backpropagation(kind, size, engine):
    net, x, y = KINDS[kind](6)
    objective = hbll.Objective("pipeline", stage=size, engine=engine if size < 3 else "auto")
    for _ in range(2 * len(stages_of(5, size))):
        step = objective(net, x, y)
    loss = label_loss(net(x), y)
    torch.testing.assert_close(step.loss.detach(), loss.detach())
    assert_equal_gradients(gradients(net, step.loss), gradients(net, loss))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_stage_is_late_by_its_distance_from_the_head(size):
    # Weights do not move: the gradient of stage n at step t is backpropagation's on the batch that stage n saw 2 (S - n)
    # steps earlier, which came in n - 1 steps before that.
    net, _, _ = mlp(8)
    cut = stages_of(7, size)
    last, seen = len(cut), batches(20)
    exact = [gradients(net, F.cross_entropy(net(x), y)) for x, y in seen]
    objective = hbll.Objective("pipeline", stage=size)
    for t, (x, y) in enumerate(seen):
        found = gradients(net, objective(net, x, y).loss)

        def check(names, came_in, found=found):
            for name in names:
                if came_in < 0:
                    assert (found[name] == 0).all()
                else:
                    torch.testing.assert_close(found[name], exact[came_in][name])

        for n, numbers in enumerate(cut, 1):
            names = [f"blocks.{b}.linear.{part}" for b in numbers for part in ("weight", "bias")]
            check(names, t - 2 * (last - n) - (n - 1))
        check(["head.weight", "head.bias"], t - (last - 1))
        check(["embed.weight", "embed.bias"], t - 2 * last + 1)


class Reference:
    """A pipeline whose stages recompute with the weights of the day, written down stage by stage."""

    def __init__(self, net, size):
        self.net, self.last = net, len(stages_of(len(net.blocks), size))
        self.stages = [nn.Sequential(*(net.blocks[b] for b in numbers)) for numbers in stages_of(len(net.blocks), size)]
        self.came_in, self.inputs, self.gradients = [], {}, {}  # by batch; (stage, batch) -> state; (stage, batch) -> g

    def accumulate(self, x, y):
        """Adds this step's gradients to the parameters'."""
        net, last, t = self.net, self.last, len(self.came_in)
        self.came_in.append((x, y))
        outputs = {}
        with torch.no_grad():
            for n in range(1, last + 1):
                batch = t - (n - 1)
                if batch >= 0:
                    if n == 1:
                        self.inputs[1, batch] = net.embed(x)
                    outputs[n + 1, batch] = self.stages[n - 1](self.inputs[n, batch])
        pulled = {}
        for n in range(last, -1, -1):
            batch = t - 2 * (last - n) - (n - 1) if n else t - 2 * last + 1
            if batch < 0:
                continue
            if n == 0:
                net.embed(self.came_in[batch][0]).backward(self.gradients[0, batch])
                continue
            if n == last:
                leaf = outputs[last + 1, batch].requires_grad_()
                F.cross_entropy(net.head(leaf), self.came_in[batch][1]).backward()
                gradient = leaf.grad
            else:
                gradient = self.gradients[n, batch]
            state = self.inputs[n, batch].clone().requires_grad_()
            self.stages[n - 1](state).backward(gradient)
            pulled[n - 1, batch] = state.grad
        self.inputs.update(outputs)
        self.gradients.update(pulled)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_training_is_the_transcription(size):
    net, _, _ = mlp(8)
    other = copy.deepcopy(net)
    objective, reference = hbll.Objective("pipeline", stage=size), Reference(other, size)
    moved = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, other)]
    for x, y in batches(22):
        for optimizer in moved:
            optimizer.zero_grad()
        objective(net, x, y).loss.backward()
        reference.accumulate(x, y)
        for optimizer in moved:
            optimizer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy"])
@pytest.mark.parametrize("filled", [2, 9, 15])
def test_it_continues_exactly_from_mid_flight(filled, way):
    net, _, _ = mlp(6)
    objective = hbll.Objective("pipeline", stage=1)

    def train(objective, net, seen):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for x, y in seen:
            optimizer.zero_grad()
            objective(net, x, y).loss.backward()
            optimizer.step()

    train(objective, net, batches(filled))
    twin = copy.deepcopy(net)
    if way == "deepcopy":
        other = copy.deepcopy(objective)
    else:
        other, saved = hbll.Objective("pipeline", stage=1), objective.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    rest = batches(12, seed=2)
    train(objective, net, rest)
    train(other, twin, rest)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    # An objective that starts anew has nothing to learn from yet.
    x, y = rest[0]
    assert hbll.Objective("pipeline")(net, x, y).loss.item() == 0 != objective(net, x, y).loss.item()


@pytest.mark.parametrize("frozen", ["embed", "head", "blocks.1", "blocks"])
def test_frozen_parts(frozen):
    net, x, y = mlp(6)
    exact = gradients(net, F.cross_entropy(net(x), y))
    net.get_submodule(frozen).requires_grad_(False)
    objective = hbll.Objective("pipeline")
    for _ in range(10):
        net.zero_grad()
        objective(net, x, y).loss.backward()  # also while it fills
    for name, p in net.named_parameters():
        if name.startswith(frozen):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, exact[name])


def test_an_embed_without_parameters():
    net, _, y = mlp(4)
    net.embed = nn.Flatten()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    objective = hbll.Objective("pipeline")
    for _ in range(6):
        step = objective(net, x, y)
        found = gradients(net, step.loss)
    assert_equal_gradients(found, gradients(net, F.cross_entropy(net(x), y)))


def test_while_it_fills_nothing_moves():
    net, x, y = mlp(6)
    objective = hbll.Objective("pipeline")
    for _ in range(4):
        step = objective(net, x, y)
        assert step.nodes == {}
        assert all((g == 0).all() for g in gradients(net, step.loss).values())
    step = objective(net, x, y)
    assert list(step.nodes) == [5]
    assert step.nodes[5].error == pytest.approx(F.cross_entropy(net(x), y).item())


def test_it_cannot_be_looked_at():
    net, x, y = mlp(6)
    objective = hbll.Objective("pipeline")
    objective(net, x, y)
    assert objective.diagnose(net, x, y) == {}
    with pytest.raises(ValueError, match="no gradients of the batch at hand"):
        hbll.audit(net, objective, x, y)
    assert objective.training
    objective(net, x, y)


def test_another_batch_size_is_refused():
    net, x, y = mlp(6)
    objective = hbll.Objective("pipeline")
    objective(net, x, y)
    with pytest.raises(ValueError, match="batches of one size"):
        objective(net, x[:2], y[:2])
