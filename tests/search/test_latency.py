"""The model of latency: what is timed, what is fitted, and what is predicted."""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import Twice
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.export import export_onnx
from gross_ray.models import four_conv
from gross_ray.run.tables import TABLES
from gross_ray.search import latency, timed_networks, timing
from gross_ray.search.latency import (
    LatencyModel,
    LatencyOptions,
    dominated,
    measure_latency,
    measure_relative,
    time_networks,
)
from gross_ray.search.runtimes import Torch
from gross_ray.search.variants import Forms
from gross_ray.space import DENSE, Configuration, SearchSpace
from gross_ray.supernet.build import empty_supernet
from gross_ray.supernet.configure import extract, get_configuration, series_layers, set_configuration

SIZES = {"conv2": (1, 4, 32), "conv3": (2, 16), "conv4": (1, 8, 16, 64)}
IMAGE = (3, 16, 16)
FULL_MS = 20.0
CONDITIONS = {"runtime": "torch", "version": "2.15", "device": "AMD EPYC", "host": "x", "batch_size": 4, "threads": 2}
Supernets = Callable[..., nn.Module]


def added_ms(layer: int, size: int) -> float:
    """Made-up time that a bottleneck adds: no function of the group-size alone, nor of the layer alone."""
    return 0.0 if size == DENSE else -3.0 + 0.5 * layer + 0.3 * size**0.5 + (layer + 1) * (size % 3) / 10


class MadeUp(Torch):
    """A runtime in which a network takes what `ms` says of its forms, in ms."""

    def __init__(self, ms: Callable[[Forms], float]) -> None:
        super().__init__(torch.device("cpu"), 1)
        self._ms = ms
        self.timed: list[Forms] = []
        self.shapes: set[tuple[int, ...]] = set()

    def variants(self, variants: Any, images: torch.Tensor) -> Callable[[Forms], Any]:
        self.shapes.add(tuple(images.shape))

        def load(forms: Forms) -> Callable[[], Any]:
            self.timed.append(forms)
            return lambda: self._ms(forms)

        return load

    def clock(self) -> Callable[[Callable[[], Any]], float]:
        return lambda work: work()


def law(forms: Forms) -> float:
    return FULL_MS + sum(added_ms(layer, size) for layer, size in enumerate(forms))


@pytest.fixture
def supernet(random_supernet: Supernets) -> nn.Module:
    return random_supernet(four_conv(image_size=16), SIZES)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MadeUp]:
    def begin(ms: Callable[[Forms], float] = law) -> MadeUp:
        runtime = MadeUp(ms)
        monkeypatch.setattr(latency, "runtime_of", lambda *_: runtime)
        return runtime

    return begin


def measure(supernet: nn.Module, seed: int = 0, *, image: Sequence[int] = IMAGE, **options: Any) -> LatencyModel:
    more = {key: options.pop(key) for key in ("on_part", "device") if key in options}
    asked = LatencyOptions(**{"runtime": "torch", "repeats": 2} | options)
    return measure_latency(supernet, image, asked, generator=torch.Generator().manual_seed(seed), **more)


def a_model(**changed: Any) -> LatencyModel:
    about = CONDITIONS | {
        "full_ms": 2.9,
        "added_ms": {"rest": {DENSE: 0.0, 1: -0.4, 2: 0.3}, "a.conv": {DENSE: 0.0, 2: -0.5, 16: 0.2, 8: -0.1}},
        "num_sampled": 6,
        "median_error": 0.02,
        "noise": 0.01,
    }
    return LatencyModel(**about | changed)


def tables(*models: LatencyModel) -> tuple[pd.DataFrame, ...]:
    """Return the tables of the models, as read back."""
    rows = [row for model in models for row in model.rows()]
    summaries = [model.summary() for model in models]
    return tuple(
        TABLES[name].to_arrow(each).to_pandas()
        for name, each in (("layer_latencies", rows), ("runtime_latencies", summaries))
    )


# The fit


def test_an_exact_law_of_whole_networks_is_recovered(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    use()
    model = measure(supernet)
    assert model.full_ms == pytest.approx(FULL_MS)
    for layer, (name, sizes) in enumerate(SIZES.items()):
        expected = {DENSE: 0.0} | {size: added_ms(layer, size) for size in sizes}
        assert model.added_ms[name] == pytest.approx(expected, abs=0.02)
    assert list(model.added_ms) == list(SIZES)
    assert model.median_error < 1e-3 and model.noise == 0
    for configuration in SearchSpace.of(supernet):
        faster = FULL_MS + sum(min(0.0, added_ms(layer, size)) for layer, size in enumerate(configuration))
        assert model.predict(configuration) == pytest.approx(faster, rel=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_errors_are_those_of_networks_left_out_of_the_fit(seed: int) -> None:
    random = np.random.default_rng(seed)
    forms = {"a": (DENSE, 1, 4), "b": (DENSE, 2)}
    networks = [*itertools.product(*forms.values()), (1, 2), (4, DENSE), (DENSE, DENSE)]
    times = np.array([law(one) / FULL_MS for one in networks]) * random.uniform(0.9, 1.1, len(networks))
    times[-1] = 1.0
    added, errors = timed_networks.fit(forms, networks, times)
    best = None
    for ridge in timed_networks.RIDGES:
        found = ridge_by_hand(forms, networks, times, ridge)
        if best is None or np.median(found[1]) < np.median(best[1]):
            best = found
    assert best is not None
    assert added == {name: pytest.approx(each) for name, each in best[0].items()}
    assert errors == pytest.approx(best[1])
    assert np.median(errors) > 0.005


def ridge_by_hand(
    forms: Mapping[str, Forms], networks: Sequence[Forms], times: np.ndarray, ridge: float
) -> tuple[dict[str, dict[int, float]], np.ndarray]:
    """Minimise the squared relative errors plus the penalty by augmented least squares; refit without each network."""
    columns = [(layer, size) for layer, sizes in enumerate(forms.values()) for size in sizes]
    weight = np.array([1.0] * (len(times) - 1) + [1000.0]) ** 0.5 / times
    penalty = ridge * np.mean(1 / times**2)

    def solved(kept: Sequence[int]) -> np.ndarray:
        rows = [[1.0, *(float(networks[one][layer] == size) for layer, size in columns)] for one in kept]
        left = np.array(rows) * weight[kept][:, None]
        ridges = np.hstack([np.zeros((len(columns), 1)), np.eye(len(columns)) * penalty**0.5])
        right = np.concatenate([weight[kept] * times[kept], np.zeros(len(columns))])
        return np.linalg.lstsq(np.vstack([left, ridges]), right, rcond=None)[0]

    def predicted(coefficients: np.ndarray, one: Forms) -> float:
        return coefficients[0] + sum(coefficients[1 + columns.index(each)] for each in enumerate(one))

    everything = np.arange(len(times))
    whole = solved(everything)
    effects = dict(zip(columns, whole[1:], strict=True))
    errors = [
        abs(predicted(solved(np.delete(everything, out)), networks[out]) / times[out] - 1) for out in everything[:-1]
    ]
    added = {
        name: {size: effects[layer, size] - effects[layer, DENSE] for size in sizes}
        for layer, (name, sizes) in enumerate(forms.items())
    }
    return added, np.array(errors)


def test_noise_is_how_far_two_halves_of_the_rounds_differ(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    calls = itertools.count()
    full = (DENSE,) * 3
    use(lambda forms: law(forms) * (1.0 if forms == full or next(calls) // 4 % 2 else 1.04))
    assert measure(supernet, repeats=2, num_sampled=5).noise == pytest.approx(0.02, abs=0.015)
    use()
    assert measure(supernet, repeats=4).noise == 0


# What is timed


def test_networks_are_different_and_timed_beside_the_full_one(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    runtime, counts = use(), list[tuple[int, int]]()
    model = measure(supernet, batch_size=3, on_part=lambda done, total: counts.append((done, total)))
    forms = sum(len(sizes) + 1 for sizes in SIZES.values())
    full, groups = (DENSE,) * 3, math.ceil(model.num_sampled / timed_networks.BESIDE)
    assert model.num_sampled == max(20, math.ceil(2.5 * forms)) == len(runtime.timed) - groups
    assert runtime.timed[:: timed_networks.BESIDE + 1] == [full] * groups
    assert len(set(runtime.timed)) == len(runtime.timed) - groups + 1
    assert runtime.shapes == {(3, *IMAGE)}
    groups = range(timed_networks.BESIDE, model.num_sampled + timed_networks.BESIDE, timed_networks.BESIDE)
    at_most = latency._PASSES * model.num_sampled
    expected = [(min(done, model.num_sampled), at_most) for done in groups]
    assert counts == [*expected, (model.num_sampled, model.num_sampled)]
    assert model.batch_size == 3


def test_more_networks_are_timed_while_the_error_is_large(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    random, full = np.random.default_rng(0), (DENSE,) * 3
    noisy = {
        forms: random.uniform(0.7, 1.3) for forms in itertools.product(*((DENSE, *each) for each in SIZES.values()))
    }
    runtime = use(lambda forms: law(forms) * (1.0 if forms == full else noisy[forms]))
    model = measure(supernet)
    one_pass = 30
    assert one_pass < model.num_sampled <= 4 * 3 * 5 - 1, "more than one pass"
    others = [forms for forms in runtime.timed if forms != full]
    assert len(set(others)) == len(others) and model.median_error > latency._EXACT
    by_layer = {name: (DENSE, *each) for name, each in SIZES.items()}
    first = others[:one_pass]
    relative = np.array([*(law(forms) * noisy[forms] / law(full) for forms in first), 1.0])
    added, _ = timed_networks.fit(by_layer, [*first, full], relative)
    slower = {(place, size) for place, each in enumerate(added.values()) for size, more in each.items() if more > 0}
    second = others[one_pass : one_pass + 5]
    assert slower and not any((place, size) in slower for forms in second for place, size in enumerate(forms))
    assert measure(supernet, num_sampled=20).num_sampled == 20, "asked for"


def test_a_group_is_timed_again_if_the_machine_was_disturbed(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    full, calls = (DENSE,) * 3, itertools.count()
    of_a_group = (timed_networks.BESIDE + 1) * (timing._WARM_UP_ROUNDS + 2) * 4
    busy = range(2 * of_a_group, 3 * of_a_group)  # the third group, in which small networks suffer most

    def ms(forms: Forms) -> float:
        disturbed = next(calls) in busy
        return law(forms) * ((1.3 if forms == full else 1.6) if disturbed else 1.0)

    runtime = use(ms)
    model = measure(supernet, num_sampled=30)
    groups = [
        runtime.timed[first : first + timed_networks.BESIDE + 1] for first in range(0, 42, timed_networks.BESIDE + 1)
    ]
    assert len(runtime.timed) == 42 and groups[6] == groups[2], "one group more"
    assert model.full_ms == pytest.approx(FULL_MS) and model.median_error < 1e-3


def test_the_generator_draws_them(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    def timed(seed: int) -> list[Forms]:
        runtime = use()
        assert measure(supernet, seed, num_sampled=11).num_sampled == 11
        return runtime.timed

    assert timed(0) == timed(0) != timed(1)


def test_a_small_space_is_timed_whole(supernet: nn.Module, use: Callable[..., MadeUp]) -> None:
    runtime = use()
    assert measure(supernet, num_sampled=1000).num_sampled == 4 * 3 * 5 - 1
    assert len(set(runtime.timed)) == 4 * 3 * 5, "each, and the full one in each group"


# A real run


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_real_run_times_everything_and_leaves_all_as_it_was(
    supernet: nn.Module, two_threads: None, runtime: str
) -> None:
    supernet.train()
    supernet.dropout.eval()
    set_configuration(supernet, (4, 2, 16))
    modes = [module.training for module in supernet.modules()]
    state = {name: value.clone() for name, value in supernet.state_dict().items()}
    model = measure(supernet, batch_size=2, threads=1, repeats=3, num_sampled=15, runtime=runtime)
    assert torch.get_num_threads() == 2
    assert [module.training for module in supernet.modules()] == modes
    assert get_configuration(supernet) == (4, 2, 16)
    assert all(torch.equal(value, state[name]) for name, value in supernet.state_dict().items())
    assert not any(module._forward_hooks for module in supernet.modules())
    assert {name: tuple(times) for name, times in model.added_ms.items()} == {
        name: (DENSE, *sizes) for name, sizes in SIZES.items()
    }
    assert model.full_ms > 0 and math.isfinite(model.median_error) and model.median_error >= 0
    assert (model.runtime, model.batch_size, model.threads, model.num_sampled) == (runtime, 2, 1, 15)
    assert model.device and model.host == socket.gethostname()
    assert model.timed_here() == torch.device("cpu")
    tables(model)


def test_a_layer_that_is_called_twice_is_one_layer(random_supernet: Supernets) -> None:
    supernet = random_supernet(Twice(), {"shared": (1, 2, 4)})
    model = measure(supernet, image=(3, 12, 11), batch_size=2, runtime="onnxruntime")
    assert set(model.added_ms["shared"]) == {DENSE, 1, 2, 4} and model.num_sampled == 3


def test_whole_networks_are_timed_beside_one_another(
    supernet: nn.Module, two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = extract(supernet, (4, 2, 16)).train(), extract(supernet, (32, 16, 64)).train()
    options = LatencyOptions(runtime="torch", batch_size=3, repeats=2)
    found = time_networks({"few": few, "many": many}, IMAGE, options)
    assert list(found) == ["few", "many"]
    for one in found.values():
        assert one.latency_ms > 0
        assert {name: value for name, value in vars(one).items() if name != "latency_ms"} == {
            "runtime": "torch", "version": torch.__version__, "device": timing.device_name(torch.device("cpu")),
            "host": socket.gethostname(), "batch_size": 3, "threads": 1,
        }  # fmt: skip
    assert few.training and torch.get_num_threads() == 2
    file = tmp_path / "many.onnx"
    export_onnx(many, file, IMAGE)
    timed = time_networks({"few": few, "file": file}, IMAGE, LatencyOptions(repeats=2))
    assert timed["file"].latency_ms > 0 and timed["file"].runtime == "onnxruntime"
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 5x16x16"):
        time_networks({"few": few}, (5, 16, 16), options)


def test_threads_are_restored_when_the_timing_fails(supernet: nn.Module, two_threads: None) -> None:
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 5x16x16: RuntimeError: "):
        measure(supernet, image=(5, 16, 16), threads=1)
    assert torch.get_num_threads() == 2


@pytest.mark.gpu
def test_a_gpu_times_a_supernet_that_lies_elsewhere(supernet: nn.Module) -> None:
    model = measure(supernet, device="cuda", repeats=3)
    assert model.device == torch.cuda.get_device_name()
    assert model.full_ms > 0 and not next(supernet.parameters()).is_cuda


# Predictions


def test_prediction_is_never_negative() -> None:
    assert a_model(full_ms=0.6).predict((1, 2)) == 0


def test_a_layer_counts_in_its_faster_form() -> None:
    model = a_model()
    assert model.predict((2, 16)) == pytest.approx(2.9)
    assert model.predict((1, 8)) == pytest.approx(2.9 - 0.4 - 0.1)
    assert [model.folded("rest", size) for size in (DENSE, 1, 2)] == [False, False, True]
    assert model.costs.maximum <= model.full_ms  # never slower than all layers dense


def test_a_network_is_folded_into_the_form_that_was_predicted(supernet: nn.Module) -> None:
    added = {name: {DENSE: 0.0} | {size: (-1.0) ** size for size in sizes} for name, sizes in SIZES.items()}
    plain = extract(supernet, (32, 2, 1)).eval()
    folded, foldings = a_model(added_ms=added).fold(plain)
    assert foldings == {"conv2": 1.0, "conv3": 1.0, "conv4": -1.0}
    assert [isinstance(folded.get_submodule(name), nn.Conv2d) for name in SIZES] == [True, True, False]
    images = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(images), plain(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidValueError, match="group-size 32 of layer 'conv2': must be one of"):
        a_model(added_ms=added | {"conv2": {DENSE: 0.0, 1: 1.0}}).fold(plain)
    with pytest.raises(InvalidValueError, match="layers conv2: missing or unknown; the timed layers are conv3, conv4"):
        a_model(added_ms={name: added[name] for name in ("conv3", "conv4")}).fold(plain)
    with pytest.raises(InvalidValueError, match="fold needs a plain network"):
        a_model(added_ms=added).fold(supernet)


def test_predict_many_is_predict_of_each() -> None:
    model = a_model()
    space = SearchSpace({"rest": (1, 2), "a.conv": (2, 8, 16)})
    rest, conv = np.array(list(space)).T
    for columns in ({"a.conv": conv, "rest": rest}, {"a.conv": pd.Series(conv, index=conv + 3), "rest": rest}):
        many = model.predict_many(columns)
        assert many.dtype == np.float64 and many.tolist() == [model.predict(one) for one in space]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rest": [1, 2]}, "layers a.conv: missing or unknown; the timed layers are rest, a.conv"),
        ({"rest": [1], "a.conv": [2], "other": [1]}, "layers other: missing or unknown; the timed"),
        ({"rest": [1, 2], "a.conv": [16, 4]}, "group-size 4 of layer 'a.conv': must be one of 2, 8, 16"),
        ({"rest": [1, 4], "a.conv": [16, 2]}, "group-size 4 of layer 'rest': must be one of 1, 2"),
    ],
)
def test_predict_many_refuses_what_was_not_timed(columns: dict[str, list[int]], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        a_model().predict_many({name: np.array(sizes) for name, sizes in columns.items()})


def test_predict_refuses_what_is_not_in_the_space() -> None:
    with pytest.raises(InvalidValueError, match="group-size 4 must be one of those of a.conv: 2, 8, 16"):
        a_model().predict((1, 4))
    with pytest.raises(InvalidValueError, match="has 1 group-sizes"):
        a_model().predict((1,))


def test_group_sizes_that_a_larger_choice_beats() -> None:
    added = {
        "a": {DENSE: 0.0, 1: -5.0, 4: -1.0, 16: -2.0},
        "b": {DENSE: 0.0, 1: -5.0, 4: 0.5, 16: -0.1},
        "c": {DENSE: 0.0, 1: -5.0, 4: -1.5, 16: 0.3},
        "d": {DENSE: 0.0, 1: -5.0},
    }
    assert dominated(a_model(added_ms=added)) == {4: (16, 2, 3), 16: (DENSE, 1, 3)}
    noisy = a_model(added_ms=added, full_ms=100.0, noise=0.0055)  # a difference of 0.55 ms says nothing
    assert dominated(noisy) == {4: (16, 1, 3)}
    both_dense = {"a": {DENSE: 0.0, 4: 0.5, 16: 0.3}}  # both cost what the dense layer costs
    assert dominated(a_model(added_ms=both_dense)) == {4: (DENSE, 1, 1), 16: (DENSE, 1, 1)}
    assert dominated(a_model(added_ms={"d": {DENSE: 0.0, 1: -5.0}})) == {}


def test_a_network_in_named_forms_is_predicted_as_it_is() -> None:
    model = a_model()
    assert model.predict_forms({"rest": 2, "a.conv": 16}) == pytest.approx(2.9 + 0.3 + 0.2)
    assert model.predict_forms({"a.conv": DENSE, "rest": 1}) == pytest.approx(2.9 - 0.4)
    with pytest.raises(InvalidValueError, match="layers a.conv: missing or unknown; the timed layers are rest, a.conv"):
        model.predict_forms({"rest": 2})
    with pytest.raises(InvalidValueError, match="group-size 4 must be one of those of rest"):
        model.predict_forms({"rest": 4, "a.conv": 16})


# Tables


def test_model_is_the_same_when_read_from_its_tables(tmp_path: Path) -> None:
    model, other = a_model(), a_model(batch_size=1, full_ms=9.0, added_ms={"b": {DENSE: 0.0, 4: 1.0}})
    latencies, summary = tables(model, other)
    assert LatencyModel.from_tables(latencies, summary[:1]) == model
    assert LatencyModel.from_tables(latencies, summary[1:]) == other
    assert latencies["added_ms"].tolist()[:4] == [0.0, -0.4, 0.3, 0.0]
    model.save(tmp_path / "times.parquet")
    assert LatencyModel.load(tmp_path / "times.parquet") == model


def test_a_file_of_an_earlier_version_is_reported(tmp_path: Path) -> None:
    old = {"device": ["a"], "part": ["rest"], "latency_ms": [1.0], "offset_ms": [0.1], "slope": [1.0]}
    pd.DataFrame(old).to_parquet(tmp_path / "old.parquet")
    with pytest.raises(InvalidValueError, match="old.parquet: was written by an earlier gross_ray, .*; measure again"):
        LatencyModel.load(tmp_path / "old.parquet")


@pytest.mark.parametrize("field", list(CONDITIONS))
def test_only_the_summary_s_own_measurement_is_read(field: str) -> None:
    other = a_model(**{field: 7 if field in ("batch_size", "threads") else "y"}, full_ms=5.0)
    latencies, summary = tables(other, a_model())
    assert LatencyModel.from_tables(latencies, summary[1:]) == a_model()


def test_tables_without_exactly_one_measurement_are_refused() -> None:
    latencies, summary = tables(a_model())
    from_tables = LatencyModel.from_tables
    for rows in (summary[:0], pd.concat([summary, summary])):
        with pytest.raises(InvalidValueError, match=f"has {len(rows)} rows: choose"):
            from_tables(latencies, rows)
    for rows in (latencies[:0], pd.concat([latencies, latencies[1:2]])):
        with pytest.raises(InvalidValueError, match=f"batch_size = 4, threads = 2: {len(rows)} rows.*measure it again"):
            from_tables(rows, summary)
    with pytest.raises(InvalidValueError, match="not all are finite numbers"):
        from_tables(latencies.assign(added_ms=math.nan), summary)


# Errors


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("batch_size", 0, "must be a whole number, 1 or more"),
        ("threads", -1, "must be a whole number, 1 or more"),
        ("repeats", 1, "must be a whole number, 2 or more"),
        ("num_sampled", 1, "must be a whole number, 2 or more, or 0: as many as the layers need"),
        ("num_sampled", False, "must be a whole number, 2 or more, or 0"),
        ("repeats", 2.0, "must be a whole number, 2 or more"),
        ("threads", True, "must be a whole number, 1 or more"),
        ("batch_size", "1", "must be a whole number, 1 or more"),
        ("runtime", "tflite", "must be one of onnxruntime, openvino, torch, compiled"),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: object, rule: str) -> None:
    with pytest.raises(InvalidValueError, match=f"latency.{name} = {value!r}: {rule}"):
        LatencyOptions(**{name: value})  # type: ignore[arg-type]


def test_a_file_of_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    a_model(runtime="tflite").save(tmp_path / "times.parquet")
    with pytest.raises(InvalidValueError, match="times.parquet: was measured in tflite, which this gross_ray does"):
        LatencyModel.load(tmp_path / "times.parquet")
    rows = a_model().rows()
    pd.DataFrame(rows).assign(**a_model().summary(), added_ms="fast").to_parquet(tmp_path / "text.parquet")
    with pytest.raises(InvalidValueError, match="text.parquet: not a table of latencies"):
        LatencyModel.load(tmp_path / "text.parquet")


def test_layers_that_only_stay_dense_leave_nothing_to_choose() -> None:
    supernet = empty_supernet(four_conv(image_size=16), {"conv2": (DENSE,)})
    with pytest.raises(InvalidValueError, match="each decomposed layer may only stay dense: there is no latency"):
        measure(supernet)


def test_a_network_without_decomposed_layers_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="no decomposed layer"):
        measure(four_conv(image_size=16))


def test_other_devices_are_refused(supernet: nn.Module) -> None:
    with pytest.raises(InvalidValueError, match="device = 'meta': latency is measured on cpu or cuda"):
        measure(supernet, device="meta")


def test_the_layers_of_the_supernet_are_the_layers_of_the_model(supernet: nn.Module) -> None:
    model = measure(supernet, num_sampled=2)
    assert list(model.added_ms) == list(series_layers(supernet))
    assert model.num_sampled == 5, "each form of conv4 is timed"
    assert str(Configuration([DENSE])) == "d"


def test_equal_networks_are_each_timed(supernet: nn.Module) -> None:
    full, other = (DENSE,) * 3, (1, 2, DENSE)
    options = LatencyOptions(runtime="torch", repeats=2)
    relative = measure_relative(supernet, IMAGE, options, [full, other, full, full, other, other, full])
    assert relative.shape == (7,) and (relative > 0).all()
