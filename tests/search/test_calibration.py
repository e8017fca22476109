"""Batch-norm statistics of each configuration's own."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_evaluator import CASES, Residual, build
from torch import nn

from gross_ray.nn import batch_norm
from gross_ray.nn.batch_norm import calibration_batches, recalibrate, recalibrated
from gross_ray.search import evaluator
from gross_ray.search.evaluator import Evaluator, NotTraceableWarning, evaluate_configurations
from gross_ray.space import SearchSpace
from gross_ray.supernet.configure import set_configuration


class UntraceableResidual(Residual):
    def forward(self, images):
        return super().forward(images if images.sum() > -1e9 else images)


@pytest.fixture(scope="module")
def case(random_supernet):
    return build(*CASES["residual"], random_supernet)


@pytest.fixture(scope="module")
def calibration():
    return 3 * torch.randn(24, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1


def one_by_one(supernet, images, labels, *batches):
    """Calibrate and evaluate each configuration by itself: training passes, then one in evaluation mode."""
    found = []
    for configuration in SearchSpace.of(supernet):
        network = copy.deepcopy(supernet)
        set_configuration(network, configuration)
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the mean over the batches
            if isinstance(module, nn.Dropout):
                module.eval()
        with torch.no_grad():
            for batch in batches:
                network(batch)
            logits = network.eval()(images)
        found.append((int((logits.argmax(1) == labels).sum()), float(F.cross_entropy(logits, labels))))
    return found


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("batch", [9, 24])
def test_each_configuration_has_the_statistics_of_its_own_responses(case, calibration, together, batch, monkeypatch):
    supernet, images, labels = case
    before = copy.deepcopy(supernet.state_dict())
    if not together:
        monkeypatch.setattr(evaluator.Evaluator, "_check", lambda self, *_: setattr(self, "_joined", False))
    monkeypatch.setattr(batch_norm, "CALIBRATION_BATCH", batch)
    found = evaluate_configurations(supernet, images, labels, calibration=calibration, batch_size=7)
    expected = one_by_one(supernet, images, labels, *calibration.split(8 if batch == 9 else 24))
    assert found["correct"].tolist() == [correct for correct, _ in expected]
    assert found["loss"].tolist() == pytest.approx([loss for _, loss in expected], rel=1e-9)
    without = evaluate_configurations(supernet, images, labels)
    assert not torch.allclose(torch.tensor(found["loss"].tolist()), torch.tensor(without["loss"].tolist()), rtol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


def test_a_network_that_cannot_be_traced_is_calibrated_too(random_supernet, calibration):
    supernet, images, labels = build(UntraceableResidual, CASES["residual"][1], random_supernet)
    before = dict(supernet.named_buffers())
    seen = 0

    def count(_module, inputs):
        nonlocal seen
        seen += len(inputs[0])

    handle = supernet.register_forward_pre_hook(count)
    with pytest.warns(NotTraceableWarning):
        found = evaluate_configurations(supernet, images, labels, calibration=calibration, batch_size=7)
    handle.remove()
    # Once for each configuration, however many batches there are; the rest is what preparing takes.
    num = len(SearchSpace.of(supernet))
    assert 0 <= seen - num * (len(calibration) + len(images)) < 10
    expected = one_by_one(supernet, images, labels, calibration)
    assert found["loss"].tolist() == pytest.approx([loss for _, loss in expected], rel=1e-9)
    assert all(buffer is before[name] for name, buffer in supernet.named_buffers()), "written to, and it may be shared"


def test_sixteen_bits_are_calibrated_in_thirty_two(random_supernet, calibration):
    supernet, images, labels = build(*CASES["residual"], random_supernet)
    supernet, images, some = supernet.float(), images.float(), calibration.float()
    exact = evaluate_configurations(supernet, images, labels, calibration=some)
    rounded = evaluate_configurations(supernet, images, labels, calibration=some, precision="bfloat16")
    assert rounded["loss"].tolist() == pytest.approx(exact["loss"].tolist(), rel=0.05)


def test_with_a_batch_norm_that_is_used_twice_each_configuration_is_calibrated_by_itself(random_supernet, calibration):
    class Twice(Residual):
        def forward(self, images):
            return super().forward(self.stem[1](images.repeat(1, 6, 1, 1)[:, : self.stem[1].num_features])[:, :3])

    supernet, images, labels = build(Twice, CASES["residual"][1], random_supernet)
    configurations = list(SearchSpace.of(supernet))
    evaluator = Evaluator(supernet)
    correct, loss = evaluator.evaluate(images, labels, configurations, calibration)
    expected = one_by_one(supernet, images, labels, calibration)
    assert correct.tolist() == [count for count, _ in expected]
    assert (loss / len(labels)).tolist() == pytest.approx([mean for _, mean in expected], rel=1e-9)
    assert evaluator.why_one_by_one(calibrated=True) == "batch-norm 'stem.1' is used more than once in a pass"
    assert evaluator.why_one_by_one(calibrated=False) is None


def test_recalibrated_lends_statistics(case, calibration):
    network = copy.deepcopy(case[0])
    before = dict(network.named_buffers())
    with pytest.raises(KeyError), recalibrated(network, calibration_batches(calibration)):
        assert not torch.equal(network.stem[1].running_mean, before["stem.1.running_mean"])
        raise KeyError
    assert all(buffer is before[name] for name, buffer in network.named_buffers())


def test_a_network_without_batch_norm_takes_no_notice(random_supernet, calibration):
    supernet, images, labels = build(*CASES["four-conv"], random_supernet)
    one, other = (
        evaluate_configurations(supernet, images, labels, calibration=some, form="dense")
        for some in (calibration, None)
    )
    assert one.equals(other)


def test_recalibrate_takes_the_mean_over_batches_and_leaves_all_else(case, calibration):
    network = copy.deepcopy(case[0]).train()
    network.dropout.eval()
    first = network.stem[1]
    before = copy.deepcopy(network.state_dict())
    recalibrate(network, calibration.split(8))
    inputs = [network.stem[0](batch) for batch in calibration.split(8)]
    means = torch.stack([each.mean(dim=(0, 2, 3)) for each in inputs]).mean(0)
    variances = torch.stack([each.var(dim=(0, 2, 3)) for each in inputs]).mean(0)
    torch.testing.assert_close(first.running_mean, means)
    torch.testing.assert_close(first.running_var, variances)
    assert network.training and not network.dropout.training and first.momentum == 0.1
    after = network.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.gpu
def test_statistics_are_of_float32_products_on_a_gpu(case, calibration):
    """Torch's own default for convolutions is tf32, which accuracies are not counted in."""
    found = set()
    network = copy.deepcopy(case[0]).cuda()
    network.register_forward_pre_hook(lambda *_: found.add(torch.backends.cudnn.conv.fp32_precision))
    recalibrate(network, calibration.cuda().split(8))
    assert found == {"ieee"}


def test_recalibrate_without_batch_norm_does_nothing():
    class Never(nn.Linear):
        def forward(self, _):
            raise AssertionError

    with warnings.catch_warnings():
        recalibrate(Never(2, 2), [torch.zeros(1, 2)])
