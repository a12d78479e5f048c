"""The stack of networks must do just what plain PyTorch does with one network at a time."""

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_here
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

BAR = tqdm(disable=True)
FROM_STEP_0 = ("dense", "reinit", "signs", "magnitude", "small")               # these start there with REWIND_STEP, too


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


def own_network(convolutions: list[nn.Module], *linear: nn.Module) -> nn.Sequential:
    """A network that is neither model's: these layers, and an output layer behind whatever they give."""
    layers = nn.Sequential(*convolutions, nn.Flatten(), *linear)
    units = layers(torch.zeros(2, 1, 28, 28)).shape[1]
    network = nn.Sequential()
    for number, layer in enumerate(layers):
        network.add_module(f"layer{number}", layer)
    network.add_module("output", nn.Linear(units, 10))
    return network


def own_convolutions() -> nn.Sequential:
    """With a stride, uneven padding, overlapping pools and no ReLU between two of its layers."""
    return own_network([nn.Conv2d(1, 5, 5, stride=2, padding=(2, 1)), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1),
                        nn.Conv2d(5, 7, 3)], nn.ReLU(), nn.Linear(175, 20), nn.ReLU())


def use_model(lth, model: str) -> None:
    """Set MODEL; "own" puts a network of the test's own in the place of the MLP."""
    if model == "own":
        lth.use(build_network=lambda *_: own_convolutions())
    else:
        lth.use(MODEL=model)


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
    """Three arms of two trials: the networks n and n + 2 see the same images, as all arms of a trial do."""
    lth.use(MODEL=model)
    weights, _ = starting_stack(lth, [1, 2, 0.5, 1, 3, 0.7])
    images = some_mnist["train"][0][:40].view(2, 20, 1, 28, 28)
    network = lth.build_network(model, 0.2).double().eval()
    logits = lth.forward(network, weights, images)
    for n in range(6):
        plain = lth.as_plain_network(network, lth.pick(weights, n))
        assert all(type(layer) in (nn.Linear, nn.Conv2d) for layer in lth.weighted_layers(plain).values())
        torch.testing.assert_close(logits[n], plain(images[n % 2]), rtol=1e-10, atol=1e-10)


OWN = {
    "stride": lambda: own_network([nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=(1, 3))]),
    "padding": lambda: own_network([nn.Conv2d(1, 4, 5, padding=3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=(2, 0))]),
    "padding same": lambda: own_network([nn.Conv2d(1, 4, 5, padding="same"), nn.Conv2d(4, 3, 3, padding="same")]),
    "dilation": lambda: own_network([nn.Conv2d(1, 4, 5, dilation=2), nn.ReLU(), nn.Conv2d(4, 6, 3, dilation=(1, 2))]),
    "kernel not square": lambda: own_network([nn.Conv2d(1, 4, (5, 2)), nn.MaxPool2d((2, 3)), nn.Conv2d(4, 6, (1, 3))]),
    "overlapping pool": lambda: own_network([nn.Conv2d(1, 4, 5), nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU(),
                                             nn.Conv2d(4, 6, 3), nn.MaxPool2d(2, stride=1)]),
    "pool of another kind": lambda: own_network([nn.Conv2d(1, 4, 5), nn.MaxPool2d(5, ceil_mode=True),
                                                 nn.Conv2d(4, 6, 3), nn.MaxPool2d(2, dilation=2)]),
    "pool first": lambda: own_network([nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(1, 4, 5), nn.ReLU()]),
    "one convolution": lambda: own_network([nn.Conv2d(1, 1, 28)]),
    "three convolutions": lambda: own_network([nn.Conv2d(1, 3, 5), nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 2, 3)],
                                              nn.Linear(648, 30), nn.ReLU(), nn.Linear(30, 7)),
    "another activation": lambda: own_network([nn.Conv2d(1, 4, 5), nn.Sigmoid()], nn.Linear(2304, 20), nn.Tanh()),
    "AvgPool2d": lambda: own_network([nn.Conv2d(1, 4, 5), nn.AvgPool2d(2)]),
    "no convolution": lambda: own_network([]),
    "ReLU and pool alone": lambda: own_network([nn.ReLU(), nn.MaxPool2d(3)], nn.ReLU())}


@pytest.mark.parametrize("kind", OWN)
def test_networks_of_ones_own_give_the_logits_and_gradients_of_plain_ones(lth, kind):
    """Any stride, padding or pool, one network after the other as plain nn.Sequential, in double precision."""
    lth.use(build_network=lambda *_: OWN[kind]())
    lth.check_network(lth.build_network("", 0))                                 # is not refused
    torch.manual_seed(1)
    plains = [OWN[kind]().double() for _ in range(6)]                          # three arms of two trials
    images = torch.randn(2, 5, 1, 28, 28).double()

    def as_in_a_stack(name, tensor):
        layer = plains[0].get_submodule(name.rpartition(".")[0])
        return tensor.reshape(layer.out_features, -1).T if isinstance(layer, nn.Linear) else tensor

    singles = [{name: as_in_a_stack(name, tensor.detach()) for name, tensor in plain.named_parameters()}
               for plain in plains]
    weights = {name: torch.stack([single[name] for single in singles]).requires_grad_() for name in singles[0]}
    logits = lth.forward(plains[0], weights, images)
    logits.square().sum().backward()
    for n, plain in enumerate(plains):
        expected = plain(images[n % 2])
        torch.testing.assert_close(logits[n], expected, rtol=1e-10, atol=1e-10)
        expected.square().sum().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(weights[name].grad[n], as_in_a_stack(name, parameter.grad), rtol=1e-8, atol=1e-8)


REFUSED = {
    "groups": lambda: own_network([nn.Conv2d(1, 4, 5), nn.Conv2d(4, 4, 3, groups=2)]),
    "convolution without bias": lambda: own_network([nn.Conv2d(1, 4, 5, bias=False)]),
    "linear without bias": lambda: own_network([], nn.Linear(784, 20, bias=False), nn.ReLU()),
    "padding mode": lambda: own_network([nn.Conv2d(1, 4, 5, padding=2, padding_mode="reflect")]),
    "BatchNorm2d": lambda: own_network([nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4)]),
    "BatchNorm1d": lambda: own_network([], nn.Linear(784, 20), nn.BatchNorm1d(20)),
    "LayerNorm": lambda: own_network([], nn.Linear(784, 20), nn.LayerNorm(20)),
    "RReLU": lambda: own_network([nn.Conv2d(1, 4, 5), nn.RReLU()]),
    "Softmax over the images' dimension": lambda: own_network([], nn.Linear(784, 20), nn.Softmax(dim=1)),
    "Dropout of another rate": lambda: own_network([], nn.Linear(784, 20), nn.Dropout(0.3)),
    "Dropout2d": lambda: own_network([nn.Conv2d(1, 4, 5), nn.Dropout2d(0.2)]),
    "Dropout before Flatten": lambda: own_network([nn.Dropout(0.2)]),
    "AlphaDropout": lambda: own_network([], nn.Linear(784, 20), nn.AlphaDropout(0.2)),
    "ConvTranspose2d": lambda: own_network([nn.ConvTranspose2d(1, 4, 5)]),
    "in place": lambda: own_network([nn.ReLU(inplace=True)], nn.Linear(784, 20)),
    "Dropout before a linear layer": lambda: own_network([], nn.Dropout(0.2), nn.Linear(784, 20)),
    "two Flatten": lambda: own_network([], nn.Flatten(), nn.Linear(784, 20)),
    "block": lambda: own_network([nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU())])}


@pytest.mark.parametrize("layers", [
    {"fc1": nn.Linear(784, 10)}, {"flatten": nn.Flatten(), "fc1": nn.Linear(784, 10)},
    {"flatten": nn.Flatten(2), "output": nn.Linear(784, 10)},
    {"pool": nn.MaxPool2d(2, return_indices=True), "flatten": nn.Flatten(), "output": nn.Linear(196, 10)},
    {"flatten": nn.Flatten(), "output": nn.Linear(784, 10), "relu": nn.ReLU()}], ids=lambda layers: " ".join(layers))
def test_a_network_needs_one_flatten_and_an_output(lth, layers):
    with pytest.raises(lth.UserError):
        lth.check_network(nn.Sequential(OrderedDict(layers)))


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_a_stack_cannot_train_are_refused_before_any_work(lth, tmp_path, kind):
    """None of them is passed over, or taken for what it is not."""
    lth.use(build_network=lambda *_: REFUSED[kind]())
    with pytest.raises(lth.UserError, match=r"^the network in build_network cannot be trained in a stack: ") as caught:
        run_here(lth, tmp_path / "results", *TINY, "LEVELS=0", "DROPOUT=0.2")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("model", "level", "arms", "rewind_step"), [
    ("mlp", 0, ("dense",), 15), ("mlp", 5, ("rewind", "reinit"), 0), ("lenet", 5, ("rewind", "reinit"), 0),
    ("mlp", 5, ("rewind", "shuffle"), 15), ("mlp", 5, ("reinit",), 15), ("own", 5, ("rewind", "reinit"), 0),
    ("own", 5, ("oneshot", "transfer"), 15)])
def test_stack_trains_as_plain_networks_do(lth, model, level, arms, rewind_step, some_mnist):
    """40 steps of four networks, arm after arm of the same trials, against nn layers, unfused AdamW and
    clip_grad_norm_, one at a time. Those that are rewound to a step take the rest of the steps, with their batches."""
    steps, batch, trials = 40, 64, 4 // len(arms)
    clip = 1.0 if model == "mlp" else 0.5
    use_model(lth, model)
    lth.use(TRIALS=trials, DROPOUT=0, BATCH_SIZE=batch, EVAL_EVERY=25, SEED=3, CLIP_NORM=clip, REWIND_STEP=rewind_step,
            EPOCHS=1, steps_per_epoch=lambda: steps)
    begin = 0 if arms[-1] in ("dense", "reinit") else rewind_step
    weights, masks = starting_stack(lth, [1, 0.3, 2, 1])
    networks = list(itertools.product(arms, range(trials)))
    early, trained, evaluations = lth.train(weights, masks, some_mnist, networks, level, BAR)
    assert [evaluation[0] for evaluation in evaluations] == [begin, 25, 40]
    assert evaluations[0][1].isnan().all()                                      # no training loss yet

    images, labels = some_mnist["train"]
    clipped = []
    for n in range(4):
        plain = lth.as_plain_network(lth.build_network(model, 0).double(), lth.pick(weights, n))
        layers = lth.weighted_layers(plain)
        plain_masks = {name: mask.T if mask.dim() == 2 else mask for name, mask in lth.pick(masks, n).items()}

        def check(stack, n=n, layers=layers):
            for name, layer in layers.items():
                expected = layer.weight.T if isinstance(layer, nn.Linear) else layer.weight
                torch.testing.assert_close(stack[f"{name}.weight"][n], expected.detach(), rtol=1e-7, atol=1e-9)
                torch.testing.assert_close(stack[f"{name}.bias"][n].flatten(), layer.bias.detach(), rtol=1e-7,
                                           atol=1e-9)

        def check_evaluation(evaluation, n=n, plain=plain):
            _, _, val_loss, val_accuracy, test_accuracy = evaluation
            with torch.no_grad():
                validation, test = (plain(some_mnist[part][0]) for part in ("validation", "test"))
            expected_loss = F.cross_entropy(validation, some_mnist["validation"][1]).item()
            assert val_loss[n].item() == pytest.approx(expected_loss, rel=1e-5)
            for logits, part, accuracy in ((validation, "validation", val_accuracy), (test, "test", test_accuracy)):
                right = (logits.argmax(1) == some_mnist[part][1]).double().mean().item()
                assert accuracy[n].item() == pytest.approx(100 * right, abs=1e-4)

        check_evaluation(evaluations[0])
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1.2e-3, weight_decay=1e-2)
        order_generator, losses = draw(3, n % trials, level, 4), []             # trial n % trials, purpose "order"
        order = [torch.randperm(2_000, generator=order_generator)[:2_000 // batch * batch] for _ in range(2)]
        for step, pick in enumerate(torch.cat(order).split(batch)[:steps]):
            if step == rewind_step:                             # the weights after so many steps
                check(early)
            if step < begin:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(images[pick]), labels[pick])
            loss.backward()
            for name, layer in layers.items():
                layer.weight.grad *= plain_masks[f"{name}.weight"]
            clipped.append(bool(nn.utils.clip_grad_norm_(plain.parameters(), clip) > clip))
            optimizer.step()
            losses.append(loss.item())
        check(trained)
        assert len(losses) == steps - begin
        for (_, train_loss, *_), expected_loss in zip(evaluations[1:], (losses[:-15], losses[-15:]), strict=True):
            assert train_loss[n].item() == pytest.approx(np.mean(expected_loss), rel=1e-5)
        check_evaluation(evaluations[-1])
    assert 0 < sum(clipped) < len(clipped)                                      # both sides of the clipping were tried


def test_late_networks_take_the_batches_and_the_dropout_of_the_last_steps(lth, mnist):
    """Those rewound to step 7 of 20 see, step by step, what a network that starts at once sees from step 8 on."""
    data = {name: (images[:1_000], labels[:1_000]) for name, (images, labels) in mnist.items()}
    lth.use(TRIALS=2, BATCH_SIZE=128, EPOCHS=1, steps_per_epoch=lambda: 20, REWIND_STEP=7)
    weights = lth.stack([lth.initial_weights(lth.generator("init", trial)) for trial in range(2)])
    seen, forward = [], lth.forward

    def spy(network, weights, images, dropout=()):
        if dropout:                                             # else it evaluates
            seen.append((images.clone(), *(factor.clone() for factor in dropout)))
        return forward(network, weights, images, dropout)

    lth.use(forward=spy)
    for arm in ("reinit", "rewind"):
        lth.train(weights, lth.full_masks(weights), data, [(arm, 0), (arm, 1)], level=1, bar=BAR)
    whole, late = seen[:20], seen[20:]
    assert len(late) == 13
    assert all(torch.equal(a, b) for early, later in zip(whole[7:], late, strict=True)
               for a, b in zip(early, later, strict=True))
    assert len({step[0].sum().item() for step in whole}) == 20                  # no two steps are alike
    for factors in zip(*(step[1:] for step in whole), strict=True):             # of a layer
        dropped = torch.stack(factors)
        assert {*dropped.unique().tolist()} == {0, 1.25}
        assert (dropped == 0).double().mean() == pytest.approx(0.2, abs=0.01)
        assert len({factor.sum().item() for factor in factors}) > 15


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
    for factor in factors:
        factor.bernoulli_(0.7).div_(0.7)
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


def check_same_bits(one, other) -> None:
    """What `train` returned, to the bit."""
    for tensors, others in zip(one[:2], other[:2], strict=True):
        assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())
    for measures, others in zip(one[2], other[2], strict=True):
        assert measures[0] == others[0]
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(measures[1:], others[1:], strict=True))


@pytest.mark.parametrize(("model", "arms", "batch"), [
    ("mlp", ("dense",), 128), ("mlp", ("dense",), 10), ("mlp", ("rewind", "reinit"), 128), ("lenet", ("dense",), 128),
    ("lenet", ("dense",), 10), ("lenet", ("rewind", "reinit"), 128)])
def test_a_networks_training_does_not_depend_on_its_neighbours(lth, mnist, model, arms, batch):
    """To the bit, and with dropout: the same trials in a stack of one, of two and of five. With batches of 10, a lone
    matrix product is rounded otherwise than one of many."""
    data = {name: (images[:1_000], labels[:1_000]) for name, (images, labels) in mnist.items()}
    steps = 20 if model == "mlp" else 10
    lth.use(MODEL=model, BATCH_SIZE=batch, EVAL_EVERY=5, EPOCHS=1, steps_per_epoch=lambda: steps, TRIALS=5)
    results = {}
    for trials in ([1], [0, 3], [0, 1, 2, 3, 4]):
        networks = list(itertools.product(arms, trials))
        weights = lth.stack([lth.initial_weights(lth.generator("init", 7 * arms.index(arm) + trial))
                             for arm, trial in networks])
        early, trained, evaluations = lth.train(weights, lth.full_masks(weights), data, networks, level=0, bar=BAR)
        for n, network in enumerate(networks):
            found = (lth.pick(early, n), lth.pick(trained, n),
                     [(step, *(measure[n] for measure in measures)) for step, *measures in evaluations])
            check_same_bits(results.setdefault(network, found), found)
    assert len(results) == 5 * len(arms)


def test_an_mlps_training_does_not_depend_on_how_many_arms_there_are(lth, mnist):
    """To the bit: the same networks as one arm, and as the first of three."""
    data = {name: (images[:1_000], labels[:1_000]) for name, (images, labels) in mnist.items()}
    lth.use(BATCH_SIZE=128, EVAL_EVERY=10, EPOCHS=1, steps_per_epoch=lambda: 20, TRIALS=2)
    results = []
    for arms in (("rewind",), ("rewind", "reinit", "shuffle")):
        networks = list(itertools.product(arms, range(2)))
        weights = lth.stack([lth.initial_weights(lth.generator("init", n)) for n in range(len(networks))])
        *tensors, evaluations = lth.train(weights, lth.full_masks(weights), data, networks, level=1, bar=BAR)
        results.append([{name: tensor[:2] for name, tensor in stack.items()} for stack in tensors]
                        + [[(step, *(measure[:2] for measure in measures)) for step, *measures in evaluations]])
    check_same_bits(*results)


def test_no_stack_is_larger_than_stack_size_and_none_is_forgotten(lth):
    """50 trials of all arms, at once and late: stacks hold arm after arm of the same trials, and start together."""
    arms = tuple(arm for arm in lth.REGISTRY if arm != "dense")
    for chosen, rewind_step, level in itertools.product((("rewind",), ("reinit", "rewind"), arms), (0, 100), (0, 1)):
        lth.use(TRIALS=50, ARMS=chosen, REWIND_STEP=rewind_step)
        found = list(lth.stacks(level, torch.device("cpu")))
        expected = set(itertools.product(chosen if level else ("dense",), range(50)))
        assert {network for networks in found for network in networks} == expected
        assert sum(len(networks) for networks in found) == len(expected)
        for networks in found:
            assert 0 < len(networks) <= lth.STACK_SIZE
            in_stack = list(dict.fromkeys(arm for arm, _ in networks))
            assert networks == list(itertools.product(in_stack, [trial for arm, trial in networks
                                                                 if arm == in_stack[0]]))
            assert len({0 if arm in FROM_STEP_0 else rewind_step for arm in in_stack}) == 1


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


@pytest.fixture
def to_train(lth, mnist):
    """By model, a function that trains two arms of two trials for 20 steps, on few images."""
    data = {name: (images[:1_000], labels[:1_000]) for name, (images, labels) in mnist.items()}

    def of(model):
        lth.use(MODEL=model, TRIALS=2, BATCH_SIZE=50, EVAL_EVERY=8, EPOCHS=1, steps_per_epoch=lambda: 20)
        singles = [lth.initial_weights(lth.generator("init", trial)) for trial in (0, 1, 0, 1)]
        rates = lth.prune_rates(lth.build_network(model, 0))
        masks = lth.stack([lth.prune(single, lth.full_masks(single), rates, "layer") for single in singles])
        networks = list(itertools.product(("rewind", "reinit"), range(2)))
        return lambda: lth.train(lth.masked(lth.stack(singles), masks), masks, data, networks, level=1, bar=BAR)

    return of


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_a_captured_step_trains_as_the_step_itself(lth, to_train, monkeypatch, model):
    """To the bit, dropout, clipping and decay included: all that changes from step to step is in the same memory."""
    train, replays = to_train(model), []

    def captured(step, _device):
        tape, played = Tape(), []
        with tape:
            step()                                              # to record, the step is taken: the first replay

        def replay():
            if played:
                tape.play()
            played.append(True)

        replays.append(played)
        return replay

    expected = train()
    monkeypatch.setattr(lth, "captured", captured)
    check_same_bits(train(), expected)
    assert [len(played) for played in replays] == [17]          # steps 4 to 20


def test_where_graphs_cannot_be_captured_a_line_says_so_once_and_training_goes_on(lth, to_train, monkeypatch, capsys):
    def fail():
        raise RuntimeError("CUDA error: operation not permitted\nmore that nobody reads")

    lth.print_once.cache_clear()
    train, captured, taken = to_train("mlp"), lth.captured, []
    expected = train()
    assert capsys.readouterr().out == ""                        # on a CPU there is nothing to capture, nothing to say
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)

    def step():
        taken.append(True)

    assert captured(step, torch.device("cpu")) is step
    assert capsys.readouterr().out == ""
    assert captured(step, torch.device("cuda")) is step and captured(step, torch.device("cuda")) is step
    assert not taken
    said = "CUDA graphs do not work here (CUDA error: operation not permitted): steps are launched one by one\n"
    assert capsys.readouterr().out == said
    asked = []
    monkeypatch.setattr(lth, "captured", lambda step, _: asked.append(step) or captured(step, torch.device("cuda")))
    check_same_bits(train(), expected)
    assert len(asked) == 1 and capsys.readouterr().out == ""
    lth.print_once.cache_clear()
