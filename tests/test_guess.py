"""First guesses. Oracles: means by hand, the tree of tests/reference.py, autograd of the regression."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.reference import parents
from tests.test_objective import WIDTH, Residual, assert_equal_gradients, gradients, residual
from torch import nn

import hbll

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])


def predicted(jumps, z0, guess="tree"):
    """T_n = jump_n(T_left(n)), by the recursion of tests/reference.py, or jump_n(z_0); every jump reads a detached state."""
    if guess == "star":
        return torch.stack([jump(z0.detach()) for jump in jumps])
    states = {0: z0.detach()}
    for level in parents(len(jumps) + 1):
        for n, left, _ in level:
            states[n] = jumps[n - 1](states[left].detach())
    return torch.stack([states[n] for n in range(1, len(jumps) + 1)])


class TestMean:
    """The running mean of what stages add to the embedded input."""

    def test_a_new_one_is_zero(self):
        net, x, y = residual(5)
        z0 = net.embed(x)
        step = hbll.Objective("scan", guess="mean", sweeps=1)(net, x, y)
        for n, block in enumerate(net.blocks, 1):
            torch.testing.assert_close(step.trace.outputs((n,))[0], block(z0))

    @every_engine
    def test_updates(self, engine):
        net, x, y = residual(5)
        # Eight sweeps: the corrected states are the chain's.
        objective = hbll.Objective("scan", guess="mean", sweeps=8, engine=engine)
        mean = None
        for _ in range(4):
            x = torch.randn_like(x)
            objective(net, x, y)
            z0 = state = net.embed(x)
            newest = []
            for block in net.blocks:
                state = block(state)
                newest.append((state - z0).mean(0))
            newest = torch.stack(newest).detach()
            mean = newest if mean is None else 0.9 * mean + 0.1 * newest
            torch.testing.assert_close(objective.states.guess.mean.nest, mean)
        assert not objective.states.guess.mean.nest.requires_grad

    @pytest.mark.parametrize("look", ["eval", "diagnose", "audit", "predict"])
    def test_looking_does_not_move_it(self, look):
        net, x, y = residual(5)
        objective = hbll.Objective("scan", guess="mean")
        objective(net, x, y)
        before = objective.states.guess.mean.nest.clone()
        if look == "eval":
            objective.eval()(net, x + 1, y)
            objective.train()
        elif look == "diagnose":
            objective.diagnose(net, x + 1, y)
        elif look == "audit":
            hbll.audit(net, objective, x + 1, y)
        else:
            objective.predict(net, x + 1, 2)
        assert torch.equal(objective.states.guess.mean.nest, before)
        assert objective.training
        objective(net, x + 1, y)
        assert not torch.equal(objective.states.guess.mean.nest, before)

    def test_it_is_saved_and_loaded(self):
        net, x, y = residual(5)
        objective = hbll.Objective("scan", guess="mean", sweeps=1)
        objective(net, x, y)
        fresh = hbll.Objective("scan", guess="mean", sweeps=1)
        fresh.load_state_dict(objective.state_dict())
        for _ in range(2):
            x = x + 0.2
            one, other = objective(net, x, y), fresh(net, x, y)
            assert_equal_gradients(gradients(net, other.loss), gradients(net, one.loss))
            assert torch.equal(objective.states.guess.mean.nest, fresh.states.guess.mean.nest)


class TestTree:
    """The predictor tree."""

    def test_it_must_be_prepared(self):
        net, x, y = residual()
        for jumps in ([], [Residual().double() for _ in range(7)]):
            objective = hbll.Objective("scan", guess="tree", jumps=jumps)
            with pytest.raises(ValueError, match=r"call objective.prepare\(network\) before the optimizer is made"):
                objective(net, x, y)
            with pytest.raises(ValueError, match=r"objective.prepare\(network\)"):
                objective.predict(net, x, 1)

    @pytest.mark.parametrize("nodes", [6, 10])
    def test_it_is_of_one_network(self, nodes):
        objective = hbll.Objective("scan", guess="tree").prepare(residual()[0])
        other, x, y = residual(nodes)
        with pytest.raises(ValueError, match=f"for these {nodes - 1} stages: .*an objective for each network"):
            objective(other, x, y)

    def test_a_step_that_fails_leaves_nothing(self):
        net, x, y = residual()
        objective = hbll.Objective("scan", guess="tree").prepare(net)
        with pytest.raises(ValueError, match="label"):
            objective(net, x, y + 100)
        copy.deepcopy(objective)(net, x, y)

    @pytest.mark.parametrize("given", [3, 8])
    def test_a_jump_per_stage(self, given):
        net, _, _ = residual()
        with pytest.raises(ValueError, match=f"predictors need a jump per stage, 7; got {given}"):
            hbll.Objective("scan", guess="tree", jumps=[Residual() for _ in range(given)]).prepare(net)

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_jumps_are_fresh_copies_of_each_stages_last_block(self, size):
        net, _, _ = residual()
        net.blocks[2] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
        objective = hbll.Objective("scan", stage=size, guess="tree").prepare(net)
        jumps, stages = objective.states.guess.jumps, objective.stages(net).numbers
        assert len(jumps) == len(stages)
        owned = {id(p) for p in net.parameters()}
        for jump, numbers in zip(jumps, stages, strict=True):
            last = net.blocks[numbers[-1] - 1]
            assert type(jump) is type(last)
            for p, q in zip(jump.parameters(), last.parameters(), strict=True):
                assert p.shape == q.shape
                assert p.dtype == q.dtype
                assert not torch.equal(p, q)
                assert id(p) not in owned
        assert len(list(objective.parameters())) == 2 * len(stages)
        kept = [p.clone() for p in objective.parameters()]
        objective.prepare(net)  # once more changes nothing
        assert all(torch.equal(p, q) for p, q in zip(objective.parameters(), kept, strict=True))

    @every_engine
    @pytest.mark.parametrize(("size", "sweeps"), [(1, 1), (1, 3), (3, 2)])
    @pytest.mark.parametrize(("nodes", "kind"), [(8, "tree"), (11, "tree"), (8, "star")])
    def test_guess_and_regression_by_autograd(self, nodes, kind, size, sweeps, engine):
        net, x, y = residual(nodes)
        objective = hbll.Objective("scan", stage=size, sweeps=sweeps, guess=kind, engine=engine).prepare(net)
        jumps = objective.states.guess.jumps
        step = objective(net, x, y)
        z0, blocks = net.embed(x).detach(), list(net.blocks)
        guess = predicted(jumps, z0, kind)
        f = [nn.Sequential(*blocks[start : start + size]) for start in range(0, len(blocks), size)]
        h = list(guess.detach())
        for _ in range(sweeps):
            inputs = [z0, *h[:-1]]
            rest = [(stage(state) - state).detach() for stage, state in zip(f, inputs, strict=True)]
            last, h = h, [z0 + sum(rest[:n]) for n in range(1, len(f) + 1)]
        new, old = torch.stack(h), torch.stack(last)
        assert step.defect.item() == pytest.approx(((new - old).norm() / new.norm()).item(), rel=1e-5)
        error = F.mse_loss(guess, new)
        values = {name: term for name, term in step.trace.terms if name == "jumps"}
        assert values["jumps"].item() == pytest.approx(error.item())
        exact = gradients(jumps, error)
        norm = torch.stack([g.norm() for g in exact.values()]).norm()
        clipped = {name: g / max(1.0, norm.item()) for name, g in exact.items()}
        assert_equal_gradients(gradients(jumps, step.loss), clipped)

    @every_engine
    @pytest.mark.parametrize(("scale", "clipped"), [(0.01, False), (10.0, True)])
    def test_the_norm_of_all_jumps_together_is_clipped(self, scale, clipped, engine):
        net, x, y = residual()
        with torch.no_grad():
            net.embed.weight.mul_(scale)
            net.embed.bias.mul_(scale)
            for block in net.blocks:
                block.linear.bias.mul_(scale)
        jumps = [nn.Linear(WIDTH, WIDTH).double() for _ in range(7)]
        for jump in jumps:
            nn.init.eye_(jump.weight)
            nn.init.zeros_(jump.bias)
        objective = hbll.Objective("scan", guess="tree", jumps=jumps, engine=engine).prepare(net)
        found = gradients(objective, objective(net, x, y).loss)
        norm = torch.stack([g.norm() for g in found.values()]).norm().item()
        assert norm == pytest.approx(1.0) if clipped else 0 < norm < 0.9

    @every_engine
    def test_nothing_leaks_into_the_network(self, engine):
        # The guess alone is exact here, sweep or not: the jumps change the network's gradient in no way.
        net, x, y = residual(5)
        options = {"sweeps": 4, "credit_sweeps": 4, "engine": engine}
        objective = hbll.Objective("scan", guess="tree", **options).prepare(net)
        with_tree = objective(net, x, y)
        without = hbll.Objective("scan", **options)(net, x, y)
        assert_equal_gradients(gradients(net, with_tree.loss), gradients(net, without.loss))
        net, x, y = residual(5)
        for name, term in objective(net, x, y).trace.terms:
            found = torch.autograd.grad(term, list(net.parameters()), materialize_grads=True, retain_graph=True)
            own = torch.autograd.grad(term, list(objective.parameters()), materialize_grads=True, retain_graph=True)
            assert any(g.abs().max() > 0 for g in own) == (name == "jumps")
            assert any(g.abs().max() > 0 for g in found) == (name != "jumps")

    @every_engine
    def test_jumps_of_the_users_own(self, engine):
        net, x, y = residual(8)
        jumps = [nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH)).double() for _ in range(7)]
        objective = hbll.Objective("scan", guess="tree", jumps=jumps, sweeps=1, engine=engine).prepare(net)
        assert {id(p) for p in objective.parameters()} == {id(p) for jump in jumps for p in jump.parameters()}
        exact = predicted(jumps, net.embed(x))
        torch.testing.assert_close(objective.predict(net, x, 0), net.head(exact[-1]))
        step = objective(net, x, y)
        assert all(g.abs().max() > 0 for g in gradients(objective, step.loss).values())

    @every_engine
    def test_one_jump_for_all_stages(self, engine):
        net, x, y = residual(8)
        jump = Residual().double()
        options = {"guess": "tree", "jumps": [jump] * 7, "sweeps": 7}
        objective = hbll.Objective("scan", engine=engine, **options).prepare(net)
        state, chain = net.embed(x), []
        for block in net.blocks:
            state = block(state)
            chain.append(state.detach())
        exact = gradients(jump, F.mse_loss(predicted([jump] * 7, net.embed(x)), torch.stack(chain)))
        norm = torch.stack([g.norm() for g in exact.values()]).norm().item()
        expected = {name: g / max(1.0, norm) for name, g in exact.items()}
        assert_equal_gradients(gradients(jump, objective(net, x, y).loss), expected)

    def test_jumps_without_parameters(self):
        net, x, y = residual(8)
        objective = hbll.Objective("scan", guess="tree", jumps=[nn.Identity()] * 7, engine="loop").prepare(net)
        expected = hbll.Objective("scan", guess="mean")(net, x, y)
        assert_equal_gradients(gradients(net, objective(net, x, y).loss), gradients(net, expected.loss))

    @every_engine
    def test_learning_makes_the_guess_better(self, engine):
        net, x, y = residual(8)
        objective = hbll.Objective("scan", guess="tree", sweeps=2, engine=engine).prepare(net)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
        defects = []
        for _ in range(60):
            step = objective(net, x, y)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            defects.append(step.defect.item())
        assert defects[-1] < 0.5 * defects[0]

    @every_engine
    def test_copies_and_checkpoints(self, engine):
        net, x, y = residual(8)
        objective = hbll.Objective("scan", guess="tree", sweeps=1, engine=engine).prepare(net)
        objective.predict(net, x, 2)
        copy.deepcopy(objective)  # no graph is kept
        objective(net, x, y)
        other = hbll.Objective("scan", guess="tree", sweeps=1, engine=engine).prepare(net)
        assert other(net, x, y).defect != objective(net, x, y).defect
        other.load_state_dict(objective.state_dict())
        twin = copy.deepcopy(objective)
        with torch.no_grad():
            for p in objective.parameters():
                p.add_(0.0)
        expected = objective(net, x, y)
        for one in (other, twin):
            assert one(net, x, y).defect == expected.defect
        with torch.no_grad():
            for p in objective.parameters():
                p.mul_(3.0)
        assert twin(net, x, y).defect == expected.defect  # the copy has jumps of its own
        assert objective(net, x, y).defect != expected.defect
