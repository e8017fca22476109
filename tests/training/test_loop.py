import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_ray.data.augment import Crop
from gross_ray.data.image_set import ImageSet
from gross_ray.data.normalisation import Normalisation
from gross_ray.errors import DivergedError, InvalidValueError
from gross_ray.experiment import EngineOptions, Schedule
from gross_ray.seeds import derive_seed
from gross_ray.training import loop
from gross_ray.training.loop import EVALUATION_BATCH, EpochRecord, accuracy, count_correct, train

SCHEDULE = Schedule(
    epochs=4, lr=0.1, milestones=(1, 3), gamma=0.5, momentum=0.9, weight_decay=1e-2, batch_size=12, augment="crop"
)


class Slot:
    """A checkpoint slot in memory: keeps what was saved as it was, for training goes on in the same tensors."""

    def __init__(self) -> None:
        self.saved: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.saved[-1] if self.saved else None

    def save(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        # Contiguous, as a file keeps them: what is loaded has lost its memory format.
        kept = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        self.saved.append((kept, copy.deepcopy(description)))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(3, (40,), generator=generator))


@pytest.fixture
def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(4 * 36, 3),
        )
    return layers.to(memory_format=torch.channels_last)


def fit(network: nn.Module, images: ImageSet, schedule: Schedule = SCHEDULE, **options: Any) -> list[EpochRecord]:
    defaults: dict[str, Any] = {
        "parameters": dict(network.named_parameters()),
        "loss": lambda inputs, labels: F.cross_entropy(network(inputs), labels),
        "seed": 7,
        "set_mode": network.train,
    }
    return train(network, images, schedule, **defaults | options)


def timeless(records: list[EpochRecord]) -> list[EpochRecord]:
    return [replace(record, seconds=0.0, images_per_second=0.0) for record in records]


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def plain_sgd(
    network: nn.Module, images: ImageSet, schedule: Schedule, orders: list[Tensor]
) -> list[tuple[float, float]]:
    """Train with SGD as its definition says: v <- momentum v + (gradient + decay w), w <- w - lr v."""
    weights = list(network.parameters())
    velocities: list[Tensor | None] = [None] * len(weights)
    means, lr = [], schedule.lr
    for epoch, order in enumerate(orders):
        if epoch in schedule.milestones:
            lr *= schedule.gamma
        losses, norms = [], []
        for start in range(0, len(order), schedule.batch_size):
            batch = order[start : start + schedule.batch_size]
            inputs = (images.images[batch].float() / 255 - 0.5) / 0.225
            logits = network(inputs.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, images.labels[batch])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                    step = gradient.add(weight, alpha=schedule.weight_decay)
                    velocity = velocities[place]
                    velocities[place] = step if velocity is None else velocity * schedule.momentum + step
                    weight.add_(velocities[place], alpha=-lr)
            losses.append(loss.detach())
            norms.append(torch.cat([gradient.flatten() for gradient in gradients]).double().norm())
        means.append((float(torch.stack(losses).mean()), float(torch.stack(norms).mean())))
    return means


def test_training_is_plain_sgd_bit_for_bit(network: nn.Sequential, images: ImageSet) -> None:
    network[5] = nn.Identity()
    by_hand = copy.deepcopy(network).train()
    schedule = replace(SCHEDULE, augment="none")
    history = fit(network, images, schedule)
    # The order of an epoch is the first draw of the generator that its seed gives.
    orders = [torch.randperm(40, generator=torch.Generator().manual_seed(derive_seed(7, epoch))) for epoch in range(4)]
    means = plain_sgd(by_hand, images, schedule, orders)
    assert_equal_weights(network, by_hand)
    assert [record.train_loss for record in history] == [loss for loss, _ in means]
    assert [record.gradient_norm for record in history] == pytest.approx([norm for _, norm in means], rel=1e-6)
    assert [record.epoch for record in history] == [1, 2, 3, 4]
    assert [record.lr for record in history] == pytest.approx([0.1, 0.05, 0.05, 0.025])
    assert all(record.val_accuracy is None and record.seconds > 0 for record in history)
    assert all(record.images_per_second == pytest.approx(40 / record.seconds) for record in history)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_every_image_is_seen_once_an_epoch_in_a_new_order(
    network: nn.Sequential, images: ImageSet, augment: str
) -> None:
    # Images of one colour each, so that an image is known by the pixel in its middle, which a crop of 2 never pads.
    colours = torch.arange(40, dtype=torch.uint8)
    plain = ImageSet(colours[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), colours.long() % 3)
    seen: list[int] = []
    padded = 0

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        nonlocal padded
        middle = ((inputs[:, 0, 4, 4] * 0.225 + 0.5) * 255).round().long()
        assert torch.equal(middle % 3, labels)
        padded += int((inputs != inputs[:, :, 4:5, 4:5]).any())
        seen.extend(middle.tolist())
        assert len(inputs) in (12, 40 % 12)
        return F.cross_entropy(network(inputs), labels)

    fit(network, plain, replace(SCHEDULE, augment=augment), loss=loss)
    epochs = [seen[start : start + 40] for start in range(0, 160, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (padded > 0) == (augment == "crop")


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_an_epoch_of_some_images_draws_them_anew(network: nn.Sequential, augment: str) -> None:
    colours = torch.arange(40, dtype=torch.uint8)
    plain = ImageSet(colours[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), colours.long() % 3)
    seen: list[int] = []

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        seen.extend(((inputs[:, 0, 4, 4] * 0.225 + 0.5) * 255).round().long().tolist())
        return F.cross_entropy(network(inputs), labels)

    schedule = replace(SCHEDULE, augment=augment, images=15)
    history = fit(network, plain, schedule, loss=loss)
    epochs = [seen[start : start + 15] for start in range(0, 60, 15)]
    assert len(seen) == 60 and all(len(set(epoch)) == 15 for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == 4
    assert all(record.images_per_second == pytest.approx(15 / record.seconds) for record in history)


def test_an_epoch_of_more_images_than_there_are_takes_all(network: nn.Sequential, images: ImageSet) -> None:
    other = copy.deepcopy(network)
    fit(network, images, replace(SCHEDULE, images=41))
    fit(other, images, SCHEDULE)
    assert_equal_weights(network, other)


def test_augmented_batches_come_from_the_epochs_generator(network: nn.Sequential, images: ImageSet) -> None:
    batches: list[Tensor] = []
    drawn: list[int] = []

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        batches.append(inputs.clone())
        return F.cross_entropy(network(inputs), labels)

    def before_step(generator: torch.Generator) -> None:
        drawn.append(int(torch.randint(1000, (), generator=generator)))

    fit(network, images, loss=loss, before_step=before_step)
    expected, expected_draws = [], []
    for epoch in range(4):
        generator = torch.Generator().manual_seed(derive_seed(7, epoch))
        order = torch.randperm(40, generator=generator)
        crop = Crop((8, 8), (8, 8))
        augmented = crop(images.images[order], crop.draw(40, generator))
        for batch in augmented.split(12):
            expected.append(Normalisation()(batch))
            expected_draws.append(int(torch.randint(1000, (), generator=generator)))
    assert len(batches) == len(expected) == 16
    assert all(torch.equal(one, other) for one, other in zip(batches, expected, strict=True))
    assert drawn == expected_draws


@pytest.mark.parametrize("done", range(5))
def test_resumed_training_equals_an_undisturbed_one(network: nn.Sequential, images: ImageSet, done: int) -> None:
    disturbed, undisturbed = copy.deepcopy(network), network
    whole = fit(undisturbed, images, measure=lambda: accuracy(undisturbed, images))
    slot = Slot()

    def interrupt(record: EpochRecord) -> None:
        if record.epoch == done:
            raise KeyboardInterrupt

    if done:
        with pytest.raises(KeyboardInterrupt):
            fit(disturbed, images, checkpoint=slot, on_epoch=interrupt, measure=lambda: accuracy(disturbed, images))
    assert len(slot.saved) == done
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        fresh = copy.deepcopy(disturbed)
        for parameter in fresh.parameters():
            if done:
                nn.init.normal_(parameter)
    reported: list[EpochRecord] = []
    resumed = fit(fresh, images, checkpoint=slot, on_epoch=reported.append, measure=lambda: accuracy(fresh, images))
    assert_equal_weights(fresh, undisturbed)
    assert timeless(resumed) == timeless(whole)
    assert reported == resumed[done:]
    assert len(slot.saved) == 4
    assert slot.saved[-1][1] == {"history": [asdict(record) for record in resumed]}
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_checkpoint_without_its_momentum_would_be_noticed(network: nn.Sequential, images: ImageSet) -> None:
    disturbed, slot = copy.deepcopy(network), Slot()
    fit(network, images)
    fit(disturbed, images, replace(SCHEDULE, epochs=2), checkpoint=slot)
    tensors, description = slot.saved[-1]
    momenta = [name for name in tensors if name.startswith("momentum.")]
    assert [name.removeprefix("momentum.") for name in momenta] == [name for name, _ in network.named_parameters()]
    slot.saved.append(({name: tensor for name, tensor in tensors.items() if name not in momenta}, description))
    fit(disturbed, images, checkpoint=slot)
    with pytest.raises(AssertionError):
        assert_equal_weights(disturbed, network)


def test_same_seed_twice_is_equal_and_another_is_not(network: nn.Sequential, images: ImageSet) -> None:
    again, other = copy.deepcopy(network), copy.deepcopy(network)
    first = fit(network, images)
    torch.rand(3)  # what others draw from the global generator changes nothing, dropout included
    second = fit(again, images)
    third = fit(other, images, seed=8)
    assert_equal_weights(network, again)
    assert timeless(first) == timeless(second)
    assert timeless(first) != timeless(third)
    assert not torch.equal(network[3].weight, other[3].weight)


def test_global_random_state_is_left_as_it_was(network: nn.Sequential, images: ImageSet) -> None:
    state = torch.get_rng_state()
    fit(network, images)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_differs_between_steps_and_epochs(network: nn.Sequential, images: ImageSet) -> None:
    masks: list[Tensor] = []
    network[5].register_forward_hook(lambda _module, _inputs, output: masks.append(output[0] == 0))
    fit(network, images)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 16


def test_only_the_given_parameters_are_trained(network: nn.Sequential, images: ImageSet) -> None:
    before = copy.deepcopy(network)
    fit(network, images, parameters={"6.weight": network[6].weight}, set_mode=network.eval)
    changed = {
        name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {"6.weight"}


def test_mode_is_set_again_after_each_measurement(network: nn.Sequential, images: ImageSet) -> None:
    modes: list[bool] = []

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        modes.append(network.training)
        return F.cross_entropy(network(inputs), labels)

    history = fit(network, images, loss=loss, measure=lambda: accuracy(network, images))
    assert modes == [True] * 16
    assert not network.training
    assert history[-1].val_accuracy == accuracy(network, images)


@pytest.mark.parametrize(("bad_step", "bad"), [(0, float("nan")), (6, float("inf")), (9, float("nan"))])
def test_divergence_names_step_epoch_and_learning_rate(
    network: nn.Sequential, images: ImageSet, bad_step: int, bad: float
) -> None:
    calls, slot = 0, Slot()

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = F.cross_entropy(network(inputs), labels)
        return value * bad if calls == bad_step + 1 else value

    with pytest.raises(DivergedError) as caught:
        fit(network, images, loss=loss, checkpoint=slot)
    epoch = bad_step // 4  # four steps an epoch
    lr = [0.1, 0.05, 0.05][epoch]
    where = f"became {bad} at step {bad_step % 4 + 1} of epoch {epoch + 1} with learning rate {lr:g}"
    assert where in str(caught.value)
    assert "lower the learning rate" in str(caught.value)
    assert len(slot.saved) == epoch  # what is broken is not kept


def test_a_gradient_that_is_not_finite_is_told_though_the_loss_is(network: nn.Sequential, images: ImageSet) -> None:
    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(network(inputs), labels)
        return value + (value - value.detach()).abs().sqrt()  # the root's slope at 0 is infinite

    with pytest.raises(DivergedError, match=r"the gradient's norm became (nan|inf) at step 1 of epoch 1 with learning"):
        fit(network, images, loss=loss)


@pytest.mark.parametrize("part", [1, 5, 12])
def test_a_batch_in_parts_takes_the_same_steps(
    network: nn.Sequential, images: ImageSet, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(loop, "PART", part)
    network.double()[1] = nn.Identity()
    inputs_of = ImageSet.as_inputs
    monkeypatch.setattr(ImageSet, "as_inputs", lambda self, images: inputs_of(self, images).double())
    sizes: set[int] = set()

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        sizes.add(len(inputs))
        return F.cross_entropy(in_parts(inputs), labels)

    network[5] = nn.Identity()  # its mask would be another
    in_parts = copy.deepcopy(network)
    whole = fit(network, images)
    parts = fit(in_parts, images, loss=loss, parameters=dict(in_parts.named_parameters()), in_parts=True)
    assert sizes == {size for batch in (12, 40 % 12) for size in (min(part, batch), batch % part or part) if size}
    for ours, theirs in zip(in_parts.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert [one.train_loss for one in parts] == pytest.approx([one.train_loss for one in whole], rel=1e-9)
    assert [one.gradient_norm for one in parts] == pytest.approx([one.gradient_norm for one in whole], rel=1e-9)


def test_a_compiled_loss_trains_alike(
    network: nn.Sequential, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compile_, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda loss: compiled.append(loss) or compile_(loss, backend="eager"))
    network[5] = nn.Identity()  # compiled, dropout draws other numbers
    other = copy.deepcopy(network)

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(other(inputs), labels)

    history = fit(network, images)
    again = fit(
        other,
        images,
        loss=loss,
        parameters=dict(other.named_parameters()),
        set_mode=other.train,
        engine=EngineOptions(compile=True),
    )
    assert compiled == [loss]
    assert timeless(again) == timeless(history)
    assert_equal_weights(other, network)


def test_bfloat16_is_another_precision(network: nn.Sequential, images: ImageSet) -> None:
    other = copy.deepcopy(network)
    dtypes = set()

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = other(inputs)
        dtypes.add(logits.dtype)
        return F.cross_entropy(logits, labels)

    history = fit(network, images, replace(SCHEDULE, epochs=1))
    rounded = fit(
        other,
        images,
        replace(SCHEDULE, epochs=1),
        loss=loss,
        parameters=dict(other.named_parameters()),
        set_mode=other.train,
        engine=EngineOptions(precision="bfloat16"),
    )
    assert dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in other.parameters())
    assert rounded[0].train_loss == pytest.approx(history[0].train_loss, rel=0.05)
    assert rounded[0].train_loss != history[0].train_loss


def test_tf32_on_a_cpu_is_refused(network: nn.Sequential, images: ImageSet) -> None:
    with pytest.raises(InvalidValueError, match="precision = 'tf32' on cpu: only CUDA has it; use float32 or bfloat16"):
        fit(network, images, engine=EngineOptions(precision="tf32"))


def test_batch_norm_in_training_sees_whole_batches(
    network: nn.Sequential, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PART", 5)
    other = copy.deepcopy(network)
    whole = fit(network, images)
    same = fit(
        other,
        images,
        parameters=dict(other.named_parameters()),
        in_parts=True,
        loss=lambda inputs, labels: F.cross_entropy(other(inputs), labels),
        set_mode=other.train,
    )
    assert timeless(whole) == timeless(same)


@pytest.mark.parametrize("num_images", [1, EVALUATION_BATCH, EVALUATION_BATCH + 1, 2 * EVALUATION_BATCH + 7])
def test_count_correct_is_the_number_of_right_argmaxes(
    make_images: Callable[[int], ImageSet], network: nn.Sequential, num_images: int
) -> None:
    some = make_images(num_images)
    correct = count_correct(network.train(), some)
    assert not network.training
    with torch.no_grad():
        logits = [network(Normalisation()(image[None]))[0].tolist() for image in some.images]
    right = [
        max(range(3), key=row.__getitem__) == label for row, label in zip(logits, some.labels.tolist(), strict=True)
    ]
    assert type(correct) is int
    assert correct == sum(right)
    assert accuracy(network, some) == sum(right) / num_images
    if num_images > 100:
        assert 0 < correct < num_images


@pytest.fixture(scope="module")
def make_images() -> Callable[[int], ImageSet]:
    def make(num_images: int) -> ImageSet:
        generator = torch.Generator().manual_seed(num_images)
        pixels = torch.randint(256, (num_images, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.randint(3, (num_images,), generator=generator))

    return make


def test_streamed_images_train_the_same_network(network: nn.Sequential, images: ImageSet) -> None:
    other = copy.deepcopy(network)
    residing = fit(network, images, measure=lambda: accuracy(network.eval(), images))
    streamed = images.stream_to("cpu")
    assert timeless(residing) == timeless(fit(other, streamed, measure=lambda: accuracy(other.eval(), streamed)))
    assert_equal_weights(network, other)


def test_a_normalisation_is_that_of_the_images(network: nn.Sequential, images: ImageSet) -> None:
    shown: list[Tensor] = []

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        shown.append(inputs)
        return F.cross_entropy(network(inputs), labels)

    own = Normalisation((0.0, 1.0, 0.5), (1.0, 2.0, 3.0))
    schedule = replace(SCHEDULE, epochs=1, augment="none", batch_size=40)
    fit(network, replace(images, normalisation=own), schedule, loss=loss)
    totals = sorted(own(images.images).flatten(1).sum(1).tolist())
    assert sorted(shown[0].flatten(1).sum(1).tolist()) == pytest.approx(totals, abs=1e-3)
    seen: list[Tensor] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    count_correct(network, replace(images, normalisation=own))
    handle.remove()
    assert torch.equal(seen[0], own(images.images))
