"""The objective's derivatives, moves and starts against independent oracles, and the laws of the descent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gross_ray.btd import descent
from gross_ray.btd.block_terms import BTDStatus
from gross_ray.btd.descent import descend
from gross_ray.btd.term_fit import Factors, TermFit, orthonormalised


@st.composite
def fits(draw):
    """A fit of two members, each with its own weight, their unknowns (a perturbed random start), and a generator."""
    group_size, groups, out_channels = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weights = torch.randn(2, out_channels, group_size * groups, *kernel, generator=generator, dtype=torch.float64)
    weights = weights / weights.flatten(1).norm(dim=1)[:, None, None, None, None]
    fit = TermFit(weights, group_size, [1, 0])
    factors = fit.random_start([generator, generator])
    shaken = Factors(
        *factors[:2], factors.core + 0.1 * torch.randn(factors.core.shape, generator=generator, dtype=torch.float64)
    )
    return fit, shaken, weights[[1, 0]], generator


def dense_objective(factors, weights, ridge):
    """J written out term by term."""
    members, groups, rank_in, _ = factors.factor_in.shape
    core = factors.core.reshape(members, groups, rank_in, -1, factors.core.shape[-1])
    terms = torch.einsum("nrakb,nrai,nrbo->nroik", core, factors.factor_in, factors.factor_out)
    rest = weights.flatten(3) - terms.sum(dim=1)
    return rest.square().sum(dim=(1, 2, 3)) + ridge * terms.square().sum(dim=(1, 2, 3, 4))


def random_direction(fit, point, generator):
    drawn = torch.randn(len(point.rest), fit.unknowns, generator=generator, dtype=torch.float64)
    return fit.direction(drawn, fit.scaling(point), point)


@given(fits(), st.sampled_from([0.0, 0.1]))
def test_the_objective_is_that_of_the_terms(case, ridge):
    fit, factors, weights, _ = case
    ours = fit.evaluate(factors).objective(torch.full((2,), ridge, dtype=torch.float64))
    torch.testing.assert_close(ours, dense_objective(factors, weights, ridge), rtol=1e-12, atol=1e-14)


@given(fits(), st.sampled_from([0.0, 0.1]))
def test_the_gradient_is_the_slope_along_every_move(case, ridge):
    fit, factors, weights, generator = case
    point = fit.evaluate(factors)
    direction = random_direction(fit, point, generator)
    ours = 2 * (fit.gradient(point, torch.full((2,), ridge, dtype=torch.float64)) * direction).sum(dim=1)
    step = torch.full((2,), 1e-5, dtype=torch.float64)
    ahead, back = (
        dense_objective(fit.move(point, direction, length).factors, weights, ridge) for length in (step, -step)
    )
    scale = float(direction.norm(dim=1).max()) ** 3 + 1
    torch.testing.assert_close(ours, (ahead - back) / 2e-5, rtol=1e-6, atol=1e-8 * scale)


@given(fits())
def test_a_move_keeps_the_factors_orthonormal_and_no_length_stays(case):
    fit, factors, _, generator = case
    point = fit.evaluate(factors)
    direction = random_direction(fit, point, generator)
    moved = fit.move(point, direction).factors
    for factor in moved[:2]:
        identity = torch.eye(factor.shape[2], dtype=torch.float64).expand(*factor.shape[:2], -1, -1)
        torch.testing.assert_close(factor @ factor.mT, identity, rtol=0, atol=1e-12)
    for ours, before in zip(fit.move(point, direction, torch.zeros(2)).factors, factors, strict=True):
        assert torch.equal(ours, before)


@given(fits())
def test_the_scaling_makes_each_terms_own_derivatives_orthonormal(case):
    fit, factors, _, generator = case
    point = fit.evaluate(factors)
    scaling = fit.scaling(point)
    # A step along a scaled unit vector changes its term by norm 1 per length (less for small terms).
    for unknown in torch.randint(fit.unknowns, (5,), generator=generator).tolist():
        unit = torch.zeros(2, fit.unknowns, dtype=torch.float64)
        unit[:, unknown] = 1
        direction = fit.direction(unit, scaling, point)
        moved = fit.move(point, direction, torch.full((2,), 1e-6, dtype=torch.float64))
        changed = (moved.rest - point.rest).flatten(1).norm(dim=1) / 1e-6
        assert (changed <= 1 + 1e-3).all()


@given(fits())
def test_orthonormalised_factors_give_the_same_terms(case):
    fit, factors, _, generator = case
    skewed = Factors(
        *(part + 0.1 * torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in factors)
    )
    ours = fit.evaluate(orthonormalised(skewed))
    torch.testing.assert_close(ours.rest, fit.evaluate(skewed).rest, rtol=0, atol=1e-11)
    for factor in ours.factors[:2]:
        identity = torch.eye(factor.shape[2], dtype=torch.float64).expand(*factor.shape[:2], -1, -1)
        torch.testing.assert_close(factor @ factor.mT, identity, rtol=0, atol=1e-12)


@given(fits())
def test_starts_are_orthonormal_and_below_the_weight(case):
    fit, _, _, generator = case
    for start in (fit.greedy_start, fit.random_start):
        point = fit.evaluate(start([generator, generator]))
        for factor in point.factors[:2]:
            identity = torch.eye(factor.shape[2], dtype=torch.float64).expand(*factor.shape[:2], -1, -1)
            torch.testing.assert_close(factor @ factor.mT, identity, rtol=0, atol=1e-12)
        assert (point.squared_error <= 1 + 1e-12).all()


def run(fit, factors, **options):
    defaults = {"ridge": 1e-3, "tolerance": 1e-5, "max_steps": 2000}
    return descend(fit, factors, **defaults | options)


@given(fits())
def test_members_converge_independently_and_keep_their_order(case):
    fit, factors, weights, _ = case
    outcomes = run(fit, factors)
    for i, outcome in enumerate(outcomes):
        found = dense_objective(outcome.factors, weights[i : i + 1], 0.0)
        assert outcome.squared_error == pytest.approx(float(found), abs=1e-12)
        assert outcome.status == BTDStatus.CONVERGED


def test_each_member_may_have_a_limit_of_its_own(trained_like_weight):
    weight = trained_like_weight(10, 8, 3, 3)[None]
    weight = weight / weight.norm()
    start = TermFit(weight, 2, [0] * 3).greedy_start([torch.Generator().manual_seed(seed) for seed in range(3)])
    limits = [5, 2000, 30]
    outcomes = run(TermFit(weight, 2, [0] * 3), start, max_steps=limits)
    for i, (outcome, limit) in enumerate(zip(outcomes, limits, strict=True)):
        alone = run(TermFit(weight, 2, [0]), start.select(slice(i, i + 1)), max_steps=limit)[0]
        assert (outcome.steps, outcome.status) == (alone.steps, alone.status)
        assert outcome.squared_error == pytest.approx(alone.squared_error, abs=1e-9)
    assert [outcome.steps for outcome in outcomes][::2] == [5, 30]
    assert outcomes[1].status == BTDStatus.CONVERGED


def test_a_line_search_does_not_depend_on_the_other_members():
    """One member uses up all halvings; the other, whose step is enough within the rounding of J, still takes it."""

    class Fit:
        """Along a positive direction J is 2 at every length; along a negative one it rises within its rounding."""

        def move(self, point, direction, length=None):
            at = torch.ones(len(direction), dtype=torch.float64) if length is None else length
            return FakePoint(1 + torch.where(direction[:, 0] > 0, 1.0, at * 3e-16))

    class FakePoint:
        def __init__(self, value):
            self.value = value

        def objective(self, ridge):
            return self.value

    def lengths(direction):
        count = len(direction)
        ones = torch.ones(count, dtype=torch.float64)
        return descent._search(Fit(), None, direction, ones, -1e-17 * ones, ones)[2].tolist()

    rising, flat = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    assert lengths(flat) == [1.0]
    assert lengths(torch.cat([rising, flat])) == [0.0, 1.0]


def test_a_converged_descent_is_a_stationary_point(trained_like_weight):
    weight = trained_like_weight(10, 8, 3, 3)[None]
    fit = TermFit(weight / weight.norm(), 2, [0])
    start = fit.greedy_start([torch.Generator().manual_seed(0)])
    size = {}
    for tolerance in (1e-3, 1e-10):
        found = run(fit, start, tolerance=tolerance)[0]
        fit = TermFit(weight / weight.norm(), 2, [0])
        ridge = torch.tensor([found.ridge], dtype=torch.float64)
        size[tolerance] = float(fit.gradient(fit.evaluate(found.factors), ridge).norm())
    assert size[1e-10] < 1e-4 < 10 * size[1e-3]


def test_warm_members_keep_their_ridge_and_the_others_start_with_a_higher_one(trained_like_weight):
    weight = trained_like_weight(10, 8, 3, 3)[None]
    norms = {}
    for warm in (True, False):
        fit = TermFit(weight / weight.norm(), 2, [0])
        start = fit.greedy_start([torch.Generator().manual_seed(0)])
        norms[warm] = float(run(fit, start, warm=[warm], ridge=0.0, max_steps=30)[0].factors.core.norm())
    assert norms[False] < 0.9 * norms[True]


def test_the_last_ridge_is_relative_to_the_squared_error(trained_like_weight):
    ridges = {}
    for noise in (0.0, 1.0):
        weight = trained_like_weight(10, 8, 3, 3)[None]
        weight = weight / weight.norm()
        generator = torch.Generator().manual_seed(1)
        weight = (
            weight + noise * torch.randn(weight.shape, generator=generator, dtype=torch.float64) / weight.numel() ** 0.5
        )
        fit = TermFit(weight / weight.norm(), 2, [0])
        found = run(fit, fit.greedy_start([generator]), ridge=0.02)[0]
        ridges[noise] = found.ridge
        assert 0.02 * found.squared_error <= found.ridge <= 0.03 * found.squared_error
    assert ridges[0.0] < ridges[1.0] / 2


def test_a_sinking_ridge_ends_with_a_lower_error_than_a_constant_one(trained_like_weight, monkeypatch):
    weight = trained_like_weight(16, 16, 3, 3)
    means = {}
    for stages in ((), descent.RIDGE_STAGES):
        monkeypatch.setattr(descent, "RIDGE_STAGES", stages)
        fit = TermFit((weight / weight.norm())[None], 4, [0] * 10)
        start = fit.greedy_start([torch.Generator().manual_seed(seed) for seed in range(10)])
        means[stages] = sum(outcome.squared_error for outcome in run(fit, start, ridge=0.0)) / 10
    assert means[descent.RIDGE_STAGES] < means[()]


@pytest.mark.parametrize(("channels", "group_size"), [(32, 16), (64, 16), (64, 32)])
def test_the_cost_of_a_step_does_not_grow_with_the_core(channels, group_size):
    def flops(size):
        weight = torch.randn(
            1, channels, channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        fit = TermFit(weight / weight.norm(), size, [0])
        start = fit.random_start([torch.Generator().manual_seed(0)])
        counter = FlopCounterMode(display=False)
        with counter:
            run(fit, start, max_steps=10, tolerance=0.0)
        return counter.get_total_flops() / 10

    # Three products of (C_in x C_in) with (C_in x C_out kH kW) a step, whatever the group-size.
    three_products = 3 * 2 * channels**2 * channels * 9
    assert flops(1) < 1.5 * three_products
    assert flops(group_size) < 4 * three_products
