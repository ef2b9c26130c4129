"""Models of others, cut into chains. Oracle: the model's own forward and plain autograd through it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbll
from hbll.losses import cross_entropy

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

VOCABULARY, WIDTH, LAYERS, TOKENS, BATCH, CLASSES = 11, 8, 4, 7, 6, 3


def gpt2():
    options = {"n_positions": 16, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **options, **no_dropout))
    words, places, norm, head = model.transformer.wte, model.transformer.wpe, model.transformer.ln_f, model.lm_head
    chain = hbll.Chain(
        embed=hbll.part(lambda tokens: words(tokens) + places(torch.arange(tokens.shape[1])), words, places),
        blocks=model.transformer.h,
        head=hbll.part(lambda state: head(norm(state)), norm, head),
    )
    return model, chain, *tokens()


def llama():
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    words, rotary, norm, head = model.model.embed_tokens, model.model.rotary_emb, model.model.norm, model.lm_head

    def embed(tokens):
        state = words(tokens)
        return state, {"position_embeddings": rotary(state, torch.arange(tokens.shape[1])[None])}

    chain = hbll.Chain(
        embed=hbll.part(embed, words, rotary),
        blocks=model.model.layers,
        head=hbll.part(lambda state: head(norm(state)), norm, head),
    )
    return model, chain, *tokens()


def vit():
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    images = {"image_size": 8, "patch_size": 4, "num_labels": CLASSES}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))
    norm, head = model.vit.layernorm, model.classifier
    chain = hbll.Chain(
        embed=model.vit.embeddings,
        blocks=model.vit.layers,
        head=hbll.part(lambda state: head(norm(state)[:, 0]), norm, head),
    )
    return model, chain, torch.randn(BATCH, 3, 8, 8), torch.randint(CLASSES, (BATCH,))


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=CLASSES, **sizes))
    pooler, head = model.resnet.pooler, model.classifier
    chain = hbll.Chain(
        embed=model.resnet.embedder,
        blocks=[block for stage in model.resnet.encoder.stages for block in stage.layers],
        head=hbll.part(lambda state: head(pooler(state)), pooler, head),
    )
    return model, chain, torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))


def tokens():
    sequences = torch.randint(VOCABULARY, (BATCH, TOKENS + 1))
    return sequences[:, :-1], sequences[:, 1:]


MODELS = {"gpt2": gpt2, "llama": llama, "vit": vit, "resnet": resnet}


@pytest.fixture
def made(request):
    """A model in float64, the chain of its parts, and a batch."""
    torch.manual_seed(0)
    model, chain, x, y = MODELS[request.param]()
    return model.double().train(), chain, x.double() if x.is_floating_point() else x, y


every_model = pytest.mark.parametrize("made", MODELS, indirect=True)
transformer = pytest.mark.parametrize("made", ["gpt2", "llama", "vit"], indirect=True)


@every_model
def test_backpropagation_is_autograd_through_the_model(made):
    model, chain, x, y = made
    # Batch norm's statistics do not decide on the gradients of a batch in training mode.
    values, _ = cross_entropy(model(x).logits, y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(values.mean(), parameters)
    step = hbll.make_rule("bp", chain)(x, y)
    torch.testing.assert_close(step.loss.detach(), values.mean().detach())
    for name, ours, theirs in zip(names, torch.autograd.grad(step.loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@transformer
@pytest.mark.parametrize("name", ["stream", "greedy", "tree", "scan"])
def test_transformers_learn(made, name):
    _, chain, x, y = made
    rule = hbll.make_rule(name, chain, stage=2)
    assert trained(rule, chain, x, y) < 0.8


@transformer
def test_a_copy_of_a_rule_has_modules_of_its_own(made):
    _, chain, x, y = made
    rule = hbll.make_rule("greedy", chain, stage=2, states="chain")
    other = copy.deepcopy(rule)
    before = rule(x, y).loss.item()
    trained(other, other.network, x, y)
    assert rule(x, y).loss.item() == before
    # A head of its own is a copy that is called for itself.
    rule.backward(x, y)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rule.credit.own[0].parameters())


@pytest.mark.parametrize("made", ["resnet"], indirect=True)
def test_a_network_whose_states_change_shape_is_trained_by_rules_that_evaluate_in_order(made):
    _, chain, x, y = made
    for name in ("stream", "tree", "scan"):
        rule = hbll.make_rule(name, chain)
        with pytest.raises(ValueError, match="called out of order"):
            steps(rule, x, y)
    rule = hbll.make_rule("dgl", chain, example=x, stage=2)
    assert trained(rule, chain, x, y) < 0.8


def trained(rule, chain, x, y):
    """The loss of the chain on a batch after a few steps, by that before them."""
    optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2)

    def loss():
        with torch.no_grad():
            values, _ = cross_entropy(chain(x), y)
        return values.mean().item()

    before = loss()
    for _ in range(30):
        optimizer.zero_grad()
        rule.backward(x, y)
        optimizer.step()
    return loss() / before


def steps(rule, x, y):
    for _ in rule.stages:  # the pipeline of stream fills
        rule(x, y)


def test_tied_weights_add_up_their_gradients():
    torch.manual_seed(0)
    _, chain, x, y = gpt2()
    chain = chain.double()
    assert chain.head.used[1].weight is chain.embed.used[0].weight
    for name in ("paper", "tree", "scan", "stream", "greedy", "pipeline", "bp"):
        rule = hbll.make_rule(name, copy.deepcopy(chain))
        tied = rule.network.embed.used[0].weight
        assert tied is rule.network.head.used[1].weight
        apart = hbll.make_rule(name, copy.deepcopy(chain))
        apart.network.head.used[1].weight = nn.Parameter(tied.detach().clone())
        apart.load_state_dict(rule.state_dict())
        for _ in range(2 * LAYERS):  # until a pipeline is full
            rule.backward(x, y)
            apart.backward(x, y)
        parts = apart.network.embed.used[0].weight, apart.network.head.used[1].weight
        torch.testing.assert_close(tied.grad, parts[0].grad + parts[1].grad)


def test_a_sequential_model_is_cut_by_the_paths_of_its_modules():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(nn.Linear(5, 6), nn.Sequential(*layers), nn.Linear(6, 3))
    chain = hbll.Chain.cut(model, at=["1.0", "1.1", "1.2", "1.3", "2"])
    assert list(chain.blocks) == layers  # the user's own
    x, y = torch.randn(BATCH, 5), torch.randint(3, (BATCH,))
    torch.testing.assert_close(chain(x), model(x))
    step = hbll.make_rule("bp", chain)(x, y)
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for ours, theirs in zip(torch.autograd.grad(step.loss, list(model.parameters())), exact, strict=True):
        torch.testing.assert_close(ours, theirs)
