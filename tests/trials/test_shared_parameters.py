"""Networks whose modules share parameters: what is shared stays shared, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from gross_ray.btd.options import BTDOptions
from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import InvalidValueError
from gross_ray.export import export_onnx, export_weights
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.space import SearchSpace
from gross_ray.supernet.build import build_supernet, decompose_model, empty_supernet
from gross_ray.supernet.configure import extract
from gross_ray.supernet.layers import choice_of, decomposable_layers
from gross_ray.training.options import Schedule
from gross_ray.training.stages import finetune, train_network
from gross_ray.weights import load_weights, restore_state

SHAPE = (3, 8, 8)
QUICK = BTDOptions(max_steps=2)


class Tied(nn.Module):
    """Two branches with one weight, the head of an autoencoder tied to a third, and one convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.right.weight = self.left.weight
        self.down, self.up = nn.Conv2d(8, 4, 3, padding=1), nn.ConvTranspose2d(4, 8, 3, padding=1)
        self.up.weight = self.down.weight
        self.own = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.norms[1].weight = self.norms[0].weight
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).relu()
        hidden = self.norms[0](self.left(hidden)).relu() + self.norms[1](self.right(hidden)).relu()
        return self.head(self.own(self.up(self.down(hidden).relu())).mean(dim=(2, 3)))


PAIRS = (("left.weight", "right.weight"), ("down.weight", "up.weight"), ("norms.0.weight", "norms.1.weight"))


def tied(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tied()


def still_shares(network: nn.Module) -> bool:
    return all(network.get_parameter(one) is network.get_parameter(other) for one, other in PAIRS)


@pytest.fixture
def splits() -> Splits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, *SHAPE), dtype=torch.uint8, generator=generator)
    each = ImageSet(images, torch.arange(12) % 4)
    return Splits("random", each, each, each, ("a", "b", "c", "d"))


def test_convolutions_that_share_a_weight_are_left_alone_and_the_reason_names_the_other() -> None:
    for shape in (None, SHAPE):
        choice = choice_of(tied(), input_shape=shape)
        assert list(choice.convs) == ["own"]
        assert choice.left_alone == {
            "stem": "the network's first convolution",
            "left": "shares its weight with right.weight",
            "right": "shares its weight with left.weight",
            "down": "shares its weight with up.weight",
            "up": "a transposed convolution",
        }


def test_they_are_refused_by_name() -> None:
    line = "layer 'left' shares its weight with right.weight, which a decomposition would end; leave it out"
    for refusing in (
        lambda: choice_of(tied(), ["left", "own"]),
        lambda: decompose_model(tied(), layers=["left"], input_shape=SHAPE),
        lambda: build_supernet(tied(), {"left": []}),
        lambda: empty_supernet(tied(), {"left": [1]}),
    ):
        with pytest.raises(InvalidValueError) as caught:
            refusing()
        assert str(caught.value) == line
    with pytest.raises(InvalidValueError, match=r"layers 'l\*': matches no convolution that can be decomposed"):
        choice_of(tied(), ["l*"])


def test_what_is_shared_stays_shared_from_the_training_to_the_file(splits: Splits, tmp_path: Path) -> None:
    network, schedule = tied(), Schedule(epochs=1, lr=0.05, batch_size=4)
    before = network.get_parameter("left.weight").detach().clone()
    train_network(network, splits, schedule, seed=0)
    assert still_shares(network) and not torch.equal(network.get_parameter("left.weight"), before)
    supernet = decompose_model(network, group_sizes=[1, 8], options=QUICK, input_shape=SHAPE)
    assert still_shares(supernet)
    finetune(supernet, splits, schedule, seed=0)
    stored = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    again = empty_supernet(tied(1), {"own": [1, 8]})
    restore_state(again, stored, "a run")
    assert still_shares(again)
    images = splits.test.as_inputs(splits.test.images)
    plain = extract(again.eval(), (8,))
    with torch.no_grad():
        torch.testing.assert_close(plain(images), supernet.eval()(images), rtol=1e-4, atol=1e-5)
    assert still_shares(plain)
    export_weights(plain, tmp_path / "plain.safetensors")
    written = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(written[one], written[other]) for one, other in PAIRS)
    fresh = extract(empty_supernet(tied(2), {"own": [1, 8]}), (8,))
    load_weights(fresh, tmp_path / "plain.safetensors")
    assert still_shares(fresh)
    assert all(torch.equal(tensor, written[name]) for name, tensor in fresh.state_dict().items())


def test_the_search_evaluates_what_is_extracted(splits: Splits) -> None:
    supernet = decompose_model(tied().eval(), group_sizes=[1, 8], options=QUICK, input_shape=SHAPE)
    found = evaluate_configurations(supernet, splits.test.images, splits.test.labels)
    for row, configuration in zip(found.itertuples(), SearchSpace.of(supernet), strict=True):
        with torch.no_grad():
            logits = extract(supernet, configuration)(splits.test.as_inputs(splits.test.images))
        assert row.correct == int((logits.argmax(1) == splits.test.labels).sum())
        assert row.loss == pytest.approx(float(F.cross_entropy(logits, splits.test.labels)), rel=1e-4)


def _bias(network: nn.Sequential) -> None:
    network[1].bias = network[2].bias


def _memory_alone(network: nn.Sequential) -> None:
    network[1].weight.data = network[2].weight.data


def _view(network: nn.Sequential) -> None:
    network[1].weight = nn.Parameter(network[2].weight.detach().transpose(2, 3))


def _of_the_parent(network: nn.Sequential) -> None:
    network.register_parameter("kernel", network[1].weight)


def _parametrized(network: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(network[1])
    network.register_parameter("kernel", network[1].parametrizations.weight.original1)


@pytest.mark.parametrize(
    ("tie", "reason"),
    [
        (_bias, "shares its bias with 2.bias"),
        (_memory_alone, "shares its weight with 2.weight"),
        (_view, "shares its weight with 2.weight"),
        (_of_the_parent, "shares its weight with kernel"),
        (_parametrized, "shares its original1 with kernel"),
    ],
)
def test_other_ways_to_share(tie: Callable[[nn.Sequential], None], reason: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    assert list(decomposable_layers(network)) == ["1", "2", "3"]
    tie(network)
    choice = choice_of(network)
    assert choice.left_alone["1"] == reason
    assert "3" in choice.convs


def test_two_objects_over_the_same_memory_are_not_trained(splits: Splits) -> None:
    """torch itself separates them: after `.to(memory_format=...)` they are two tensors."""
    network = tied()
    train_network(network, splits, Schedule(epochs=1, lr=0.05, batch_size=4), seed=0)  # one object
    left, right = network.get_submodule("left"), network.get_submodule("right")
    right.weight = nn.Parameter(torch.zeros(8, 8, 3, 3))
    right.weight.data = left.weight.data
    line = (
        "the parameters left.weight and right.weight share their memory, but are two objects, which training would "
        "separate; make them one: right.weight = left.weight"
    )
    with pytest.raises(InvalidValueError, match=line):
        train_network(network, splits, Schedule(epochs=1, lr=0.05, batch_size=4), seed=0)
    assert left.weight.data_ptr() == right.weight.data_ptr()
    network.to(memory_format=torch.contiguous_format)
    assert left.weight.data_ptr() != right.weight.data_ptr()


def test_an_onnx_file_has_a_shared_weight_once(tmp_path: Path) -> None:
    export_onnx(tied().eval(), tmp_path / "tied.onnx", SHAPE)
    stored = [list(each.dims) for each in onnx.load(tmp_path / "tied.onnx").graph.initializer]
    assert stored.count([8, 8, 3, 3]) == 2  # that of left and right, and that of own


def test_a_module_under_several_names_shares_nothing_with_another() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    network.append(network[1])
    supernet = decompose_model(network, group_sizes=[1], options=QUICK)
    assert supernet[1] is supernet[2] and list(choice_of(network).convs) == ["1"]


def test_weights_that_differ_where_the_network_shares_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in tied().state_dict().items()}
    tensors["right.weight"] += 1
    torch.save(tensors, tmp_path / "untied.pt")
    line = r"1 that the network shares, but that differ \(left.weight and right.weight\); "
    with pytest.raises(InvalidValueError, match=f"untied.pt: belong to another network: {line}name the model that"):
        load_weights(tied(), tmp_path / "untied.pt")
    with pytest.raises(InvalidValueError, match=f"a run does not fit the network .*: {line}restore the code"):
        restore_state(tied(), tensors, "a run")
