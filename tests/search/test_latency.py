import math
import socket
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from networks import Twice
from torch import nn

from gross_ray.errors import InvalidValueError
from gross_ray.models import four_conv
from gross_ray.run.tables import TABLES
from gross_ray.search import latency, timing
from gross_ray.search.latency import LatencyModel, LatencyOptions, measure_latency, time_networks
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.configure import extract, get_configuration, series_layers, set_configuration
from gross_ray.supernet.series import SeriesConv2d

SIZES = {"conv2": (1, 4, 32), "conv3": (2, 16), "conv4": (1, 8, 16, 64)}
IMAGE = (3, 16, 16)
REST_MS = 3.0


class Idle(nn.Module):
    """A decomposed layer that never runs."""

    def __init__(self):
        super().__init__()
        self.stem, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images):
        return self.stem(images)


def part_ms(layer, size):
    """Made-up time of one call: no function of the group-size alone, nor of the layer alone."""
    return 0.3 * layer.in_channels**0.5 + 0.1 * size**0.7 + 0.02 * layer.out_channels


def is_bottleneck(module):
    return isinstance(module, nn.Sequential) and hasattr(module, "grouped")


def bottlenecks(module):
    return [m for m in module.modules() if is_bottleneck(m)]


def group_size(bottleneck):
    return bottleneck.grouped.in_channels // bottleneck.grouped.groups


class Timer:
    """In place of `timing._sample_ms`: parts take made-up times, a whole network what `whole` says of their sum."""

    def __init__(self, whole=lambda sum_ms, configuration: 2 + 1.5 * sum_ms, disturbance=lambda sample, place: 1.0):
        self.whole, self.disturbance = whole, disturbance
        self.seen, self.measured, self.samples = [], {}, 0

    def __call__(self, module, inputs, device):
        self.seen.append((module, inputs))
        self.samples += 1
        return self.undisturbed(module, inputs) * self.disturbance(self.samples - 1, module)

    def undisturbed(self, module, inputs):
        if is_bottleneck(module):
            return len(inputs) * self.bottleneck_ms(module)
        found = bottlenecks(module)
        if not found:
            return REST_MS
        configuration = Configuration([group_size(one) for one in found])
        ms = self.whole(REST_MS + sum(map(self.bottleneck_ms, found)), configuration)
        self.measured[configuration] = ms
        return ms

    @staticmethod
    def bottleneck_ms(module):
        like = SimpleNamespace(
            in_channels=module.pointwise_in.in_channels, out_channels=module.pointwise_out.out_channels
        )
        return part_ms(like, group_size(module))


@pytest.fixture
def supernet(random_supernet):
    return random_supernet(four_conv(image_size=16), SIZES)


@pytest.fixture
def use_timer(monkeypatch):
    def use(*args, **kwargs):
        timer = Timer(*args, **kwargs)
        monkeypatch.setattr(timing, "_sample_ms", timer)
        return timer

    return use


def measure(supernet, image=IMAGE, seed=0, *, on_part=None, device=None, **options):
    options = LatencyOptions(**{"repeats": 1, "num_sampled": 10} | options)
    generator = torch.Generator().manual_seed(seed)
    return measure_latency(supernet, image, options, generator=generator, on_part=on_part, device=device)


def expected_sum(supernet, configuration):
    layers = series_layers(supernet).values()
    return REST_MS + sum(part_ms(layer, size) for layer, size in zip(layers, configuration, strict=True))


def a_model(**changed):
    about = {
        "device": "AMD EPYC",
        "host": "somewhere",
        "batch_size": 4,
        "threads": 2,
        "rest_ms": 0.7,
        "layer_ms": {"rest": {1: 0.1, 2: 0.3}, "a.conv": {2: 0.2, 16: 0.9, 8: 0.4}},
        "offset_ms": -0.05,
        "slope": 1.1,
        "num_sampled": 6,
        "median_error": 0.02,
    }
    return LatencyModel(**about | changed)


def tables(*models):
    """Return the tables of the models, as read back."""
    rows = [row for model in models for row in model.rows()]
    summaries = [model.summary() for model in models]
    return tuple(
        TABLES[name].to_arrow(each).to_pandas() for name, each in (("latencies", rows), ("latency_models", summaries))
    )


# The model


def test_an_exact_law_of_whole_networks_is_recovered(supernet, use_timer):
    use_timer()
    model = measure(supernet)
    assert model.rest_ms == pytest.approx(REST_MS)
    for name, layer in series_layers(supernet).items():
        assert model.layer_ms[name] == pytest.approx({size: part_ms(layer, size) for size in SIZES[name]})
    assert list(model.layer_ms) == list(SIZES)
    assert (model.offset_ms, model.slope) == pytest.approx((2, 1.5))
    assert model.median_error == pytest.approx(0, abs=1e-12)
    assert model.num_sampled == 10
    for configuration in SearchSpace.of(supernet):
        expected = 2 + 1.5 * expected_sum(supernet, configuration)
        assert model.predict(configuration) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_fit_and_error_are_those_of_least_squares_on_noisy_measurements(supernet, use_timer, seed):
    noise = np.random.default_rng(seed).uniform(0.96, 1.04, len(SearchSpace.of(supernet)))
    space = SearchSpace.of(supernet)
    timer = use_timer(lambda sum_ms, configuration: (1 + 1.5 * sum_ms) * noise[space.index(configuration)])
    model = measure(supernet, seed=seed, num_sampled=9 + seed)
    assert model.num_sampled == len(timer.measured) == 9 + seed
    x = np.array([expected_sum(supernet, one) for one in timer.measured])
    y = np.array(list(timer.measured.values()))
    assert [model.slope, model.offset_ms] == pytest.approx(np.polyfit(x, y, 1).tolist())
    errors = []
    for out in range(len(x)):
        others = np.arange(len(x)) != out
        errors.append(abs(np.polyval(np.polyfit(x[others], y[others], 1), x[out]) / y[out] - 1))
    assert model.median_error == pytest.approx(np.median(errors))
    assert model.slope > 0 and model.median_error > 0.005


def test_slope_is_never_negative(supernet, use_timer):
    timer = use_timer(lambda sum_ms, configuration: 50 - 1.5 * sum_ms)
    model = measure(supernet)
    assert model.slope == 0
    assert model.offset_ms == pytest.approx(np.mean(list(timer.measured.values())))


def test_two_configurations_predict_each_other_with_the_sum_as_it_is(random_supernet, use_timer):
    supernet = random_supernet(four_conv(image_size=16), {"conv2": (1, 32), "conv3": (2,)})
    use_timer()
    model = measure(supernet)
    assert (model.num_sampled, model.slope, model.offset_ms) == (2, pytest.approx(1.5), pytest.approx(2))
    small, large = (expected_sum(supernet, one) for one in ((1, 2), (32, 2)))
    errors = [0.5 * (large - small) / (2 + 1.5 * one) for one in (small, large)]  # off by half the difference
    assert model.median_error == pytest.approx(np.mean(errors))


def test_equal_sums_leave_the_slope_at_one(random_supernet, monkeypatch):
    supernet = random_supernet(four_conv(image_size=16), {"conv2": (1, 2, 32)})
    monkeypatch.setattr(timing, "_sample_ms", lambda module, *_: 0.1 if bottlenecks(module) else 0.2)
    model = measure(supernet)
    assert model.slope == 1
    assert model.predict((2,)) == pytest.approx(0.1)


def test_prediction_is_never_negative():
    model = a_model(offset_ms=-1.2)
    assert model.predict((1, 2)) == 0
    assert model.predict((2, 16)) == pytest.approx(-1.2 + 1.1 * (0.7 + 0.3 + 0.9))


def test_predict_many_is_predict_of_each():
    model = a_model()
    space = SearchSpace({"rest": (1, 2), "a.conv": (2, 8, 16)})
    for configuration in space:
        rest, conv = configuration
        by_hand = -0.05 + 1.1 * (0.7 + {1: 0.1, 2: 0.3}[rest] + {2: 0.2, 16: 0.9, 8: 0.4}[conv])
        assert model.predict(configuration) == pytest.approx(by_hand)
    rest, conv = np.array(list(space)).T
    for columns in ({"a.conv": conv, "rest": rest}, {"a.conv": pd.Series(conv, index=conv + 3), "rest": rest}):
        many = model.predict_many(columns)
        assert many.dtype == np.float64 and many.tolist() == [model.predict(one) for one in space]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rest": [1, 2]}, "a.conv is missing"),
        ({"rest": [1], "a.conv": [2], "other": [1]}, "other is missing or not of rest, a.conv"),
        ({"rest": [1, 2], "a.conv": [16, 4]}, "group-size 4 of layer 'a.conv': must be one of 2, 8, 16"),
        ({"rest": [1, 4], "a.conv": [16, 2]}, "group-size 4 of layer 'rest': must be one of 1, 2"),
    ],
)
def test_predict_many_refuses_what_was_not_timed(columns, message):
    with pytest.raises(InvalidValueError, match=message):
        a_model().predict_many({name: np.array(sizes) for name, sizes in columns.items()})


def test_predict_refuses_what_is_not_in_the_space():
    with pytest.raises(InvalidValueError, match="group-size 4 must be one of those of a.conv: 2, 8, 16"):
        a_model().predict((1, 4))
    with pytest.raises(InvalidValueError, match="has 1 group-sizes"):
        a_model().predict((1,))


# Tables


def test_model_is_the_same_when_read_from_its_tables():
    model, other = a_model(), a_model(batch_size=1, rest_ms=9.0, layer_ms={"b": {4: 1.0}})
    latencies, summary = tables(model, other)
    assert LatencyModel.from_tables(latencies, summary[:1]) == model
    assert LatencyModel.from_tables(latencies, summary[1:]) == other
    assert latencies["latency_ms"].tolist()[:6] == [0.7, 0.1, 0.3, 0.2, 0.9, 0.4]


@pytest.mark.parametrize("field", ["device", "host", "batch_size", "threads"])
def test_only_the_summary_s_own_measurement_is_read(field):
    other = a_model(**{field: "x" if field in ("device", "host") else 7}, rest_ms=5.0)
    latencies, summary = tables(other, a_model())
    assert LatencyModel.from_tables(latencies, summary[1:]) == a_model()


def test_tables_without_exactly_one_measurement_are_refused():
    latencies, summary = tables(a_model())
    from_tables = LatencyModel.from_tables
    for rows in (summary[:0], pd.concat([summary, summary])):
        with pytest.raises(InvalidValueError, match=f"has {len(rows)} rows: choose"):
            from_tables(latencies, rows)
    twice = pd.concat([latencies, latencies[1:2]])
    for rows in (latencies[1:], latencies[:1], latencies[:0], twice, pd.concat([latencies, latencies[:1]])):
        with pytest.raises(InvalidValueError, match=f"batch_size = 4, threads = 2: {len(rows)} rows.*measure it again"):
            from_tables(rows, summary)


def test_measured_model_fits_the_tables(supernet, use_timer):
    use_timer()
    model = measure(supernet)
    latencies, summary = tables(model)
    assert len(latencies) == 1 + sum(map(len, SIZES.values()))
    assert LatencyModel.from_tables(latencies, summary) == model


# What is timed


def test_parts_and_networks_are_the_extracted_ones_at_the_shapes_of_a_real_pass(supernet, use_timer):
    timer = use_timer()
    measure(supernet, batch_size=5)
    supernet, met = supernet.eval(), {}
    for name, layer in series_layers(supernet).items():
        layer.register_forward_hook(lambda _m, args, _o, name=name: met.update({name: args[0].shape}))
    supernet(torch.zeros(5, *IMAGE))
    one_round = timer.seen[: timer.samples // 3]
    rest, rest_inputs = one_round[0]
    assert rest_inputs[0].shape == (5, *IMAGE)
    assert not bottlenecks(rest) and not any(isinstance(m, SeriesConv2d) for m in rest.modules())
    assert [type(m) for m in rest.modules() if isinstance(m, nn.Conv2d)] == [nn.Conv2d]  # conv1 alone
    parts = iter(one_round[1:])
    with torch.inference_mode():
        assert rest(*rest_inputs).shape == (5, 10)
        for name, layer in series_layers(supernet).items():
            for size in SIZES[name]:
                part, inputs = next(parts)
                assert [images.shape for images in inputs] == [met[name]]
                assert torch.equal(part(inputs[0]), layer.to_modules(size)(inputs[0]))
        for network, inputs in parts:
            assert len(inputs) == 1 and inputs[0] is rest_inputs[0]
            configuration = [group_size(one) for one in bottlenecks(network)]
            assert torch.equal(network(*inputs), extract(supernet, configuration).eval()(*inputs))


def test_all_run_in_rounds_in_eval_and_inference_mode_with_the_threads_asked_for(supernet, monkeypatch):
    supernet.train()
    turns = []

    def look(module, inputs, device):
        modes = {m.training for m in module.modules()}
        turns.append((id(module), modes, torch.is_inference_mode_enabled(), torch.get_num_threads(), device.type))
        return 1.0

    monkeypatch.setattr(timing, "_sample_ms", look)
    measure(supernet, threads=2, repeats=3, num_sampled=4)
    works = 1 + sum(map(len, SIZES.values())) + 4
    assert len(turns) == works * (timing._WARM_UP_ROUNDS + 3)
    assert len({turn[0] for turn in turns}) == works
    assert all(turns[place] == turns[place % works] for place in range(len(turns)))
    assert all(turn[1:] == ({False}, True, 2, "cpu") for turn in turns)


def test_a_layer_that_is_called_twice_counts_both_calls(random_supernet, use_timer):
    supernet = random_supernet(Twice(), {"shared": (1, 2, 4)})
    timer = use_timer()
    model = measure(supernet, image=(3, 12, 11), batch_size=2)
    layer = series_layers(supernet)["shared"]
    assert model.layer_ms["shared"] == pytest.approx({size: 2 * part_ms(layer, size) for size in (1, 2, 4)})
    (rest, rest_inputs), (_, inputs) = timer.seen[:2]
    assert [tuple(images.shape) for images in inputs] == [(2, 4, 10, 9), (2, 4, 8, 7)]
    with torch.inference_mode():
        for _ in range(2):
            assert rest(*rest_inputs).shape == (2, 2)


def test_a_layer_that_never_runs_takes_no_time(random_supernet, use_timer):
    supernet = random_supernet(Idle(), {"idle": (1, 4)})
    use_timer(lambda sum_ms, configuration: 5.0)
    model = measure(supernet)
    assert model.layer_ms["idle"] == pytest.approx({1: 0, 4: 0}, abs=1e-5)
    assert model.predict((4,)) == pytest.approx(5.0)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_configurations_are_different_and_drawn_by_the_generator(supernet, use_timer, seed):
    def sampled(seed):
        timer = use_timer()
        assert measure(supernet, seed=seed, num_sampled=15).num_sampled == 15
        return list(timer.measured)

    assert len(set(sampled(seed))) == 15
    assert sampled(seed) == sampled(seed) != sampled(seed + 1)


def test_a_small_space_is_timed_whole(supernet, use_timer):
    timer = use_timer()
    assert measure(supernet, num_sampled=24).num_sampled == 24 == len(timer.measured)
    assert measure(supernet, num_sampled=1000).num_sampled == 24


def test_sampling_is_uniform_and_never_lists_a_vast_space(generator):
    vast = SearchSpace({f"conv{place}": (1, 2, 4, 8, 16, 32, 64) for place in range(40)})
    sampled = np.array(latency._sample(vast, 300, generator))
    assert sampled.shape == (300, 40)
    shares = [(sampled == size).mean() for size in (1, 2, 4, 8, 16, 32, 64)]
    assert shares == pytest.approx([1 / 7] * 7, abs=4 * math.sqrt(6 / 49 / sampled.size))


# How it is timed


def test_the_machine_s_changing_speed_and_single_disturbances_are_divided_out(supernet, use_timer):
    random = np.random.default_rng(0)
    works, rounds = 1 + sum(map(len, SIZES.values())) + 10, 21
    speeds = random.uniform(0.5, 2.0, timing._WARM_UP_ROUNDS + rounds)
    hit = random.random((len(speeds), works)) < 0.1

    def disturbance(sample, module):
        turn, place = divmod(sample, works)
        return speeds[turn] * (7.0 if hit[turn, place] else 1.0)

    use_timer(disturbance=disturbance)
    model = measure(supernet, repeats=rounds)
    usual = np.median(speeds[timing._WARM_UP_ROUNDS :])
    assert model.rest_ms == pytest.approx(REST_MS * usual)
    assert (model.offset_ms, model.slope) == pytest.approx((2 * usual, 1.5))
    assert model.median_error == pytest.approx(0, abs=1e-9)


def test_warm_up_rounds_do_not_count(supernet, use_timer):
    works = 1 + sum(map(len, SIZES.values())) + 10
    use_timer(disturbance=lambda sample, module: 1.0 if sample >= 2 * works else 50.0 + sample)
    assert measure(supernet).rest_ms == pytest.approx(REST_MS)


def test_a_sample_is_the_fastest_call_after_an_untimed_one(monkeypatch):
    clock = iter([1.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr(timing, "_cpu_ms", lambda *_: next(clock))
    assert timing._sample_ms(nn.Identity(), [], torch.device("cpu")) == 3.0
    assert not list(clock)


@pytest.mark.parametrize(("threads", "expected_ms"), [(1, 75), (2, 750)])
def test_one_thread_is_timed_by_its_cpu_time_and_more_by_wall_time(monkeypatch, two_threads, threads, expected_ms):
    now = SimpleNamespace(s=100.0)

    class Takes(nn.Module):
        def forward(self, seconds):
            now.s += seconds.item()

    clocks = SimpleNamespace(perf_counter=lambda: now.s, thread_time=lambda: now.s / 10)
    monkeypatch.setattr(timing, "time", clocks)
    torch.set_num_threads(threads)
    inputs = [torch.tensor(0.25), torch.tensor(0.5)]
    assert timing._cpu_ms(Takes(), inputs, torch.device("cpu")) == pytest.approx(expected_ms)


def test_progress_counts_every_timing(supernet, use_timer):
    timer, counts = use_timer(), []
    measure(supernet, repeats=2, on_part=lambda done, total: counts.append((done, total)))
    assert counts == [(done, timer.samples) for done in range(1, timer.samples + 1)]


def test_device_name_is_the_processor_s(monkeypatch, tmp_path):
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(timing, "Path", lambda path: listed)
    monkeypatch.setattr(timing.platform, "processor", lambda: "")
    monkeypatch.setattr(timing.platform, "machine", lambda: "riscv64")
    assert timing.device_name(torch.device("cpu")) == "riscv64"
    listed.write_text("processor\t: 0\n")
    assert timing.device_name(torch.device("cpu")) == "riscv64"
    listed.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    assert timing.device_name(torch.device("cpu")) == "Some CPU: 3 GHz"


# A real run


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_real_run_times_everything_and_leaves_all_as_it_was(supernet, two_threads):
    supernet.train()
    supernet.dropout.eval()
    set_configuration(supernet, (4, 2, 16))
    modes = [module.training for module in supernet.modules()]
    state = {name: value.clone() for name, value in supernet.state_dict().items()}
    model = measure(supernet, batch_size=2, threads=1, repeats=3, num_sampled=5)
    assert torch.get_num_threads() == 2
    assert [module.training for module in supernet.modules()] == modes
    assert get_configuration(supernet) == (4, 2, 16)
    assert all(torch.equal(value, state[name]) for name, value in supernet.state_dict().items())
    assert not any(module._forward_hooks for module in supernet.modules())
    assert {name: tuple(times) for name, times in model.layer_ms.items()} == SIZES
    assert model.rest_ms > 0 and all(ms > 0 for times in model.layer_ms.values() for ms in times.values())
    assert model.slope >= 0 and math.isfinite(model.median_error) and model.median_error >= 0
    assert (model.batch_size, model.threads, model.num_sampled) == (2, 1, 5)
    assert model.device and model.host == socket.gethostname()
    tables(model)


def test_whole_networks_are_timed_beside_one_another(supernet, use_timer, two_threads):
    timer, few, many = use_timer(), extract(supernet, (4, 2, 16)).train(), extract(supernet, (32, 16, 64)).train()
    options = LatencyOptions(batch_size=3, repeats=4)
    found = time_networks({"few": few, "many": many}, IMAGE, options)
    for name, network in (("few", few), ("many", many)):
        ms = found[name].latency_ms
        assert ms == pytest.approx(timer.measured[Configuration(map(group_size, bottlenecks(network)))])
        assert vars(found[name]) == {
            "latency_ms": ms, "device": timing.device_name(torch.device("cpu")), "host": socket.gethostname(),
            "batch_size": 3, "threads": 1,
        }  # fmt: skip
    assert few.training and torch.get_num_threads() == 2
    assert {module.training for module, _ in timer.seen} == {False}
    assert {tuple(images.shape) for _, (images,) in timer.seen} == {(3, *IMAGE)}
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 5x16x16"):
        time_networks({"few": few}, (5, 16, 16), options)


def test_threads_are_restored_when_the_timing_fails(supernet, two_threads):
    with pytest.raises(InvalidValueError, match="the network cannot run an image of 5x16x16: RuntimeError: "):
        measure(supernet, image=(5, 16, 16), threads=1)
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_times_a_supernet_that_lies_elsewhere(supernet):
    model = measure(supernet, device="cuda", repeats=3)
    assert model.device == torch.cuda.get_device_name()
    assert model.rest_ms > 0 and all(ms > 0 for times in model.layer_ms.values() for ms in times.values())
    assert not next(supernet.parameters()).is_cuda


# Errors


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("batch_size", 0, 1),
        ("threads", -1, 1),
        ("repeats", 0, 1),
        ("num_sampled", 1, 2),
        ("repeats", 2.0, 1),
        ("threads", True, 1),
        ("batch_size", "1", 1),
    ],
)
def test_options_out_of_range_are_refused(name, value, least):
    with pytest.raises(InvalidValueError, match=f"latency.{name} = {value!r}: must be a whole number, {least} or more"):
        LatencyOptions(**{name: value})


def test_a_space_of_one_configuration_is_refused(random_supernet):
    with pytest.raises(InvalidValueError, match="space of one configuration: needs two group-sizes"):
        measure(random_supernet(four_conv(), {"conv2": (4,), "conv3": (8,)}))


def test_a_network_without_decomposed_layers_is_refused():
    with pytest.raises(InvalidValueError, match="no decomposed layer"):
        measure(four_conv())


def test_other_devices_are_refused(supernet):
    with pytest.raises(InvalidValueError, match="device = 'meta': latency is measured on cpu or cuda"):
        measure(supernet, device="meta")
