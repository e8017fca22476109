"""The trainings of the paper: base network, response reconstruction (Eq. 9), fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from gross_ray.data.image_set import ImageSet, Splits
from gross_ray.errors import InvalidValueError
from gross_ray.nn.sharing import check_trainable
from gross_ray.supernet.configure import largest_decomposed, series_layers, set_configuration
from gross_ray.training.loop import (
    FLOAT32,
    CheckpointSlot,
    EpochRecord,
    accuracy,
    in_first_format,
    run_in_format_of,
    train,
)
from gross_ray.training.options import EngineOptions, Schedule
from gross_ray.training.sampling import ConfigurationSampler

OnEpoch = Callable[[EpochRecord], object]


def train_network(
    network: nn.Module,
    splits: Splits,
    schedule: Schedule,
    *,
    seed: int,
    engine: EngineOptions = FLOAT32,
    checkpoint: CheckpointSlot | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[EpochRecord]:
    """Train the parameters of `network` that require gradients, in place, on the classification task (section 4.2).

    Raises InvalidValueError if no parameter does, and if two are different objects over the same memory.
    """
    check_trainable(network)
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise InvalidValueError("no parameter of the network requires gradients: there is nothing to train")

    def run(images: ImageSet) -> list[EpochRecord]:
        network.to(memory_format=images.memory_format)
        return train(
            network,
            images,
            schedule,
            parameters=parameters,
            loss=lambda inputs, labels: F.cross_entropy(network(inputs), labels),
            seed=seed,
            set_mode=network.train,
            engine=engine,
            in_parts=True,
            measure=lambda: accuracy(network, splits.validation),
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )

    return run_in_format_of(network, in_first_format(splits.train, engine), run, trained=True)


def response_error(response: Tensor, target: Tensor) -> Tensor:
    """Return ||response - target|| / ||target||, a scalar: Frobenius norms over all elements (Eq. 9).

    16-bit responses are converted to float32 first.
    """
    if response.dtype in (torch.bfloat16, torch.float16):
        response, target = response.float(), target.float()
    return torch.linalg.vector_norm(response - target) / torch.linalg.vector_norm(target)


def total_response_error(responses: Mapping[str, Sequence[Tensor]], targets: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Return the sum of Eq. 9 over all calls of all layers, a scalar; both map a layer's name to its calls' outputs.

    Raises InvalidValueError for a layer without calls, or with different numbers of calls in the two networks.
    """
    for name, calls in targets.items():
        if not calls or len(responses[name]) != len(calls):
            raise InvalidValueError(
                f"layer {name!r} is called {len(responses[name])} times in the supernet and {len(calls)} times in the "
                "full network: its responses cannot be compared; leave it out (decomposition.layers, --layers)"
            )
    pairs = [pair for name, calls in targets.items() for pair in zip(responses[name], calls, strict=True)]
    return torch.stack([response_error(response, target) for response, target in pairs]).sum()


def reconstruct(
    supernet: nn.Module,
    original: nn.Module,
    splits: Splits,
    schedule: Schedule,
    *,
    seed: int,
    sampler: ConfigurationSampler | None = None,
    engine: EngineOptions = FLOAT32,
    checkpoint: CheckpointSlot | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[EpochRecord]:
    """Train the series of `supernet` in place to reproduce the responses of `original` (sections 3.3.2 and 4.3).

    The loss is the sum of Eq. 9 over all decomposed layers, and over all calls of a layer: the response in the
    decomposed network against that in the full network, to the same images. With `sampler`, each step draws a
    configuration; without, the active one is trained. Everything but the series is frozen. Raises InvalidValueError if
    the two networks call a layer different numbers of times.
    """
    parameters = freeze_all_but_series(supernet)
    names = list(series_layers(supernet))
    original.eval()

    def run(images: ImageSet) -> list[EpochRecord]:
        original.to(memory_format=images.memory_format)
        with Responses(supernet, names) as ours, Responses(original, names) as theirs:

            def loss(inputs: Tensor, _: Tensor) -> Tensor:
                ours.take()  # drop the responses of passes between two steps, like measurements after an epoch
                theirs.take()
                with torch.no_grad():
                    original(inputs)
                supernet(inputs)
                return total_response_error(ours.take(), theirs.take())

            return train(
                supernet,
                images,
                schedule,
                parameters=parameters,
                loss=loss,
                seed=seed,
                set_mode=supernet.eval,
                engine=engine,
                before_step=None if sampler is None else lambda g: set_configuration(supernet, sampler.draw(g)),
                checkpoint=checkpoint,
                on_epoch=on_epoch,
            )

    return run_in_format_of(supernet, in_first_format(splits.train, engine, supernet), run, trained=True)


def finetune(
    supernet: nn.Module,
    splits: Splits,
    schedule: Schedule,
    *,
    seed: int,
    sampler: ConfigurationSampler | None = None,
    trainable: str = "series",
    engine: EngineOptions = FLOAT32,
    checkpoint: CheckpointSlot | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[EpochRecord]:
    """Train the series of `supernet` in place on the classification task (section 4.4).

    With `sampler`, each step draws a configuration; without, the active one is trained. Everything but the series is
    frozen, including batch-norm statistics, unless `trainable` is all: then every parameter is trained, dense layers
    too, and batch-norm is in training mode. The records' validation accuracy is that of the active configuration, or
    with `sampler` that of the largest group-sizes.
    """
    whole = trainable == "all"
    parameters = all_parameters(supernet) if whole else freeze_all_but_series(supernet)

    def measure() -> float:
        if sampler is not None:
            set_configuration(supernet, largest_decomposed(supernet))
        return accuracy(supernet, splits.validation)

    def run(images: ImageSet) -> list[EpochRecord]:
        return train(
            supernet,
            images,
            schedule,
            parameters=parameters,
            loss=lambda inputs, labels: F.cross_entropy(supernet(inputs), labels),
            seed=seed,
            set_mode=supernet.train if whole else partial(train_with_fixed_statistics, supernet),
            engine=engine,
            in_parts=True,
            before_step=None if sampler is None else lambda g: set_configuration(supernet, sampler.draw(g)),
            measure=measure,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )

    return run_in_format_of(supernet, in_first_format(splits.train, engine, supernet), run, trained=True)


def freeze_all_but_series(supernet: nn.Module) -> Mapping[str, nn.Parameter]:
    """Make only the terms of the series trainable (biases frozen, section 4.3), and return them by name."""
    trainable = {id(p) for layer in series_layers(supernet).values() for p in layer.series_parameters()}
    for parameter in supernet.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    return {name: parameter for name, parameter in supernet.named_parameters() if parameter.requires_grad}


def all_parameters(supernet: nn.Module) -> Mapping[str, nn.Parameter]:
    """Make every parameter trainable, with the weights of dense layers, and return them by name.

    Raises InvalidValueError if two are different objects over the same memory.
    """
    for layer in series_layers(supernet).values():
        layer.train_dense()
    check_trainable(supernet)
    supernet.requires_grad_()
    return dict(supernet.named_parameters())


def train_with_fixed_statistics(network: nn.Module) -> None:
    """Set training mode, but keep batch-norm, and other norms with statistics, in eval mode."""
    network.train()
    for module in network.modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
            module.eval()


class Responses:
    """Records the outputs of each named layer, in the order of its calls, until `take` or the end of the block."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self.of: dict[str, list[Tensor]] = {name: [] for name in names}
        # An activation that works in place, behind a layer, would change the response that is kept.
        self._copies = any(getattr(module, "inplace", False) for module in network.modules())
        self._handles = [network.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def __enter__(self) -> Responses:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.take()

    def take(self) -> dict[str, list[Tensor]]:
        """Return the outputs since the last `take`, and forget them, so that a step's graph is freed with the step."""
        taken = {name: list(calls) for name, calls in self.of.items()}
        for calls in self.of.values():
            calls.clear()  # torch.compile would return tensors that are left in the list from the graph
        return taken

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.of[name].append(output.clone() if self._copies else output)

        return hook
