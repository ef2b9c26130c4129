"""Every rule on a GPU. Oracle: the same rule on the CPU, in float64."""

import copy

import pytest
import torch
from tests.networks import KINDS, batches

from hbll import make_rule
from hbll.rules import RULES, options_of
from hbll.train import fit, make_optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def made(name, kind="mlp", **options):
    network, x, _ = KINDS[kind][0](8)
    torch.manual_seed(0)
    return make_rule(name, network, x, **options)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("name", RULES)
def test_gradients_are_the_cpus(name, engine):
    if engine == "batched" and "engine" not in options_of(name):
        pytest.skip("it evaluates stages one by one")
    options = {"engine": engine} if "engine" in options_of(name) else {}
    here = made(name, **options)
    there = copy.deepcopy(here).cuda()
    if name == "ff":
        pytest.skip("it draws wrong labels, other ones on another device")
    for x, y in batches(9):
        found = []
        for rule, batch in ((here, (x, y)), (there, (x.cuda(), y.cuda()))):
            rule.zero_grad()
            step = rule.backward(*batch)
            found.append(
                (step.loss.cpu(), [torch.zeros_like(p) if p.grad is None else p.grad for p in rule.parameters()])
            )
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-9)
        for one, other in zip(found[1][1], found[0][1], strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["paper", "tree", "scan", "stream", "solo", "2bw", "bp"])
def test_training_lowers_the_loss(name, precision, optimizer):
    rule = made(name).float().cuda()
    seen = [(x.float(), y) for x, y in batches(2)] * 20
    done = fit(rule, seen, make_optimizers(rule, optimizer, 3e-3, 0.0), epochs=4, device="cuda", precision=precision)
    assert done.losses[-1] < done.losses[0]
