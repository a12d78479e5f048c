"""The stack of networks must do just what plain PyTorch does with one network at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

BAR = tqdm(disable=True)


def draw(seed: int, trial: int, level: int, purpose: int) -> torch.Generator:
    """The seeds' published recipe, written a second time."""
    word = np.random.SeedSequence([seed, trial, level, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word))


def starting_stack(lth, scales: list[float]):
    """Double-precision networks with weights of different scales; in the later half, half the weights masked."""
    singles = [lth.initial_weights(draw(7, n, 0, 0)) for n in range(len(scales))]
    weights = {name: torch.stack([scale * single[name] for scale, single in zip(scales, singles, strict=True)]).double()
               for name in singles[0]}
    masks = {name: (torch.rand(tensor.shape, generator=draw(8, 0, 0, 0)) < 0.5).double()
             for name, tensor in weights.items() if name.endswith("weight")}
    for mask in masks.values():
        mask[:len(scales) // 2] = 1
    return lth.masked(weights, masks), masks


@pytest.mark.parametrize(("model", "prunable"), [("mlp", 266_200), ("lenet", 61_470)])
def test_architecture_is_the_papers(lth, model, prunable):
    lth.use(MODEL=model)
    network = lth.build_network(model, 0.2)
    masks = lth.full_masks(lth.stack([lth.initial_weights(torch.Generator())]))
    assert sum(layer.weight.numel() for layer in lth.weighted_layers(network).values()) == prunable
    assert sum(mask.numel() for mask in masks.values()) == prunable
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize(("init", "gain"), [("kaiming_normal", 2), ("xavier_normal", None)])
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_initial_weights_have_the_variance_of_their_init(lth, model, init, gain):
    lth.use(MODEL=model, INIT=init)
    weights = lth.initial_weights(torch.Generator().manual_seed(1))
    for name, layer in lth.weighted_layers(lth.build_network(model, 0)).items():
        outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
        area = layer.weight[0, 0].numel()
        variance = 2 / inputs if gain else 2 / (inputs + outputs * area)
        count = layer.weight.numel()
        measured = weights[f"{name}.weight"].var().item()
        assert abs(measured / variance - 1) < 5 * (2 / count) ** 0.5, name     # five standard errors of a variance
        assert not weights[f"{name}.bias"].any()


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_stack_gives_the_logits_of_its_plain_networks(lth, model, some_mnist):
    lth.use(MODEL=model)
    weights, _ = starting_stack(lth, [1, 2, 0.5])
    images = some_mnist["train"][0][:60].view(3, 20, 1, 28, 28)
    network = lth.build_network(model, 0.2).double().eval()
    logits = lth.forward(network, weights, images)
    for n in range(3):
        plain = lth.as_plain_network(network, lth.pick(weights, n))
        assert all(type(layer) in (nn.Linear, nn.Conv2d) for layer in lth.weighted_layers(plain).values())
        torch.testing.assert_close(logits[n], plain(images[n]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("model", "level"), [("mlp", 0), ("mlp", 5), ("lenet", 5)])
def test_stack_trains_as_plain_networks_do(lth, model, level, some_mnist):
    """40 steps of two arms and two trials, against nn layers, unfused AdamW and clip_grad_norm_, one at a time."""
    steps, batch = 40, 64
    clip = 1.0 if model == "mlp" else 0.5
    lth.use(MODEL=model, TRIALS=2, DROPOUT=0, BATCH_SIZE=batch, EVAL_EVERY=25, SEED=3, CLIP_NORM=clip)
    weights, masks = starting_stack(lth, [1, 0.3, 2, 1])
    trained, evaluations = lth.train(weights, masks, some_mnist, ("rewind", "reinit"), level, steps=steps, bar=BAR)
    assert [evaluation[0] for evaluation in evaluations] == [25, 40]

    images, labels = some_mnist["train"]
    clipped = []
    for n in range(4):
        plain = lth.as_plain_network(lth.build_network(model, 0).double(), lth.pick(weights, n))
        layers = lth.weighted_layers(plain)
        plain_masks = {name: mask.T if mask.dim() == 2 else mask for name, mask in lth.pick(masks, n).items()}
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1.2e-3, weight_decay=1e-2)
        order_generator, losses = draw(3, n % 2, level, 4), []                  # trial n % 2, purpose "order"
        order = [torch.randperm(2_000, generator=order_generator)[:2_000 // batch * batch] for _ in range(2)]
        for pick in torch.cat(order).split(batch)[:steps]:
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(images[pick]), labels[pick])
            loss.backward()
            for name, layer in layers.items():
                layer.weight.grad *= plain_masks[f"{name}.weight"]
            clipped.append(bool(nn.utils.clip_grad_norm_(plain.parameters(), clip) > clip))
            optimizer.step()
            losses.append(loss.item())
        for name, layer in layers.items():
            expected = layer.weight.T if isinstance(layer, nn.Linear) else layer.weight
            torch.testing.assert_close(trained[f"{name}.weight"][n], expected.detach(), rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(trained[f"{name}.bias"][n].flatten(), layer.bias.detach(), rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            validation, test = (plain(some_mnist[part][0]) for part in ("validation", "test"))
        _, train_loss, val_loss, val_accuracy, test_accuracy = evaluations[-1]
        assert train_loss[n].item() == pytest.approx(np.mean(losses[25:]), rel=1e-5)
        expected_loss = F.cross_entropy(validation, some_mnist["validation"][1]).item()
        assert val_loss[n].item() == pytest.approx(expected_loss, rel=1e-5)
        for logits, part, accuracy in ((validation, "validation", val_accuracy), (test, "test", test_accuracy)):
            right = (logits.argmax(1) == some_mnist[part][1]).double().mean().item()
            assert accuracy[n].item() == pytest.approx(100 * right, abs=1e-4)
    assert 0 < sum(clipped) < len(clipped)                                      # both sides of the clipping were tried


def test_dropout_zeroes_the_given_share_and_keeps_the_mean(lth):
    lth.use(MODEL="mlp")
    network = lth.build_network("mlp", 0.3)
    weights = lth.stack([lth.initial_weights(torch.Generator().manual_seed(n)) for n in range(2)])
    # A first layer that passes 1 to every unit, and a second that counts: what arrives is the share kept, rescaled.
    weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    weights["fc1.bias"] += 1
    weights["fc2.weight"] += 1 / 300
    weights["output.weight"] += 1 / 100
    x = torch.zeros(2, 4_000, 1, 28, 28)
    lth.use(DROPOUT=0.3)
    factors = lth.dropout_factors(network, 4_000, x.device)
    assert [factor.shape for factor in factors] == [(4_000, 300), (4_000, 100)]
    lth.draw_dropout(factors, torch.Generator().manual_seed(0))
    dropped = lth.forward(network, weights, x, factors)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropped.std().item() > 0.02
    assert torch.equal(dropped[0], dropped[1])                                  # one mask serves the whole stack
    assert torch.allclose(lth.forward(network, weights, x), torch.ones(2, 4_000, 10))


def test_evaluation_is_without_dropout(lth, mnist):
    """Against a plain network in eval mode, on more images than one chunk holds and a chunk that is not full."""
    lth.use(DROPOUT=0.5)
    network = lth.build_network("mlp", 0.5)
    weights = lth.stack([lth.initial_weights(torch.Generator().manual_seed(n)) for n in range(2)])
    images, labels = mnist["test"][0][:2_500], mnist["test"][1][:2_500]
    loss, accuracy = lth.evaluate(network, weights, images, labels)
    for n in range(2):
        with torch.no_grad():
            logits = lth.as_plain_network(network, lth.pick(weights, n)).eval()(images)
        assert loss[n].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        assert accuracy[n].item() == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=0.05)


def test_a_networks_training_does_not_depend_on_its_neighbours(lth, mnist):
    """To the bit, and with dropout: the same trials in a stack of one, of two and of five."""
    data = {name: (images[:1_000], labels[:1_000]) for name, (images, labels) in mnist.items()}
    results = []
    for trials in (1, 2, 5):
        lth.use(TRIALS=trials, BATCH_SIZE=128, EVAL_EVERY=10)
        weights = lth.stack([lth.initial_weights(lth.generator("init", trial)) for trial in range(trials)])
        results.append(lth.train(weights, lth.full_masks(weights), data, ("dense",), level=0, steps=20, bar=BAR))
    five, five_evaluations = results.pop()
    for trials, (few, evaluations) in enumerate(results, start=1):
        for name in five:
            assert torch.equal(few[name], five[name][:trials]), name
        for measures, more in zip(evaluations, five_evaluations, strict=True):
            assert all(torch.equal(a, b[:trials]) for a, b in zip(measures[1:], more[1:], strict=True))


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph where there is no GPU: every kernel call, with its arguments as they were. Played
    again, the calls read and write the same memory; Python is not asked again, as with a graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, call, _types, arguments=(), options=None):
        assert call is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        result = call(*arguments, **(options or {}))
        self.calls.append((call, arguments, options or {}, result))
        return result

    @torch.no_grad()
    def play(self):
        for call, arguments, options, recorded in self.calls:
            for new, old in zip(tree_leaves(call(*arguments, **options)), tree_leaves(recorded), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():          # no view of an argument
                    old.copy_(new)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_a_captured_step_trains_as_the_step_itself(lth, mnist, monkeypatch, model):
    """To the bit, dropout, clipping and decay included: all that changes from step to step is in the same memory."""
    data = {name: (images[:1_000], labels[:1_000]) for name, (images, labels) in mnist.items()}
    lth.use(MODEL=model, TRIALS=2, BATCH_SIZE=50, EVAL_EVERY=8)
    weights = lth.stack([lth.initial_weights(lth.generator("init", trial)) for trial in (0, 1, 0, 1)])
    masks = lth.prune(weights, lth.full_masks(weights), lth.prune_rates(lth.build_network(model, 0)), "layer")

    def train():
        return lth.train(lth.masked(weights, masks), masks, data, ("rewind", "reinit"), level=1, steps=20, bar=BAR)

    def capture(step):
        tape, played = Tape(), []
        with tape:
            step()                                              # to record, the step is taken: the first replay

        def replay():
            if played:
                tape.play()
            played.append(True)

        replays.append(played)
        return replay

    replays = []
    expected, evaluations = train()
    monkeypatch.setattr(lth, "graphs_work", lambda _: True)
    monkeypatch.setattr(lth, "capture", capture)
    captured, captured_evaluations = train()
    assert [len(played) for played in replays] == [17]          # steps 4 to 20
    assert all(torch.equal(captured[name], tensor) for name, tensor in expected.items())
    for measures, others in zip(evaluations, captured_evaluations, strict=True):
        assert measures[0] == others[0]
        assert all(torch.equal(a, b) for a, b in zip(measures[1:], others[1:], strict=True))


def test_where_graphs_cannot_be_captured_a_line_says_so(lth, monkeypatch, capsys):
    def fail():
        raise RuntimeError("CUDA error: operation not permitted\nmore that nobody reads")

    lth.graphs_work.cache_clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    assert not lth.graphs_work(torch.device("cuda")) and not lth.graphs_work(torch.device("cuda"))
    said = "CUDA graphs do not work here (CUDA error: operation not permitted): steps are launched one by one\n"
    assert capsys.readouterr().out == said
    assert not lth.graphs_work(torch.device("cpu"))
    assert capsys.readouterr().out == ""
    lth.graphs_work.cache_clear()
