"""Scores: the statistics of several supernets, and how smoothing over the space improves them."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gross_ray.search import scores
from gross_ray.search.options import SCORES
from gross_ray.search.scores import Score, Scoreboard, Smoothing, by_supernet, group_sizes, scored
from gross_ray.search.surrogate import SUMS
from gross_ray.space import Configuration

SIZES = ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16))
SPACE = np.array(list(itertools.product(*SIZES)))
UNSMOOTHED = [name for name in SCORES if not name.startswith("smoothed-")]


def evaluations(values: np.ndarray, losses: np.ndarray, chosen: np.ndarray) -> pd.DataFrame:
    """Return rows of the table `configurations` for accuracies and losses in supernets, (N, K) each; NaN: no row."""
    rows = [
        {
            "configuration": str(Configuration(sizes.tolist())),
            **{f"layer {name}": int(size) for name, size in zip("abc", sizes, strict=False)},
            "seed": 3 * seed,
            "macs": 10 * number,
            "macs_paper": 9 * number,
            "parameters": 8 * number,
            "latency_ms": 0.5 * number,
            "val_accuracy": accuracy,
            "val_loss": loss,
        }
        for number, sizes in enumerate(chosen)
        for seed, (accuracy, loss) in enumerate(zip(values[number], losses[number], strict=True))
        if not math.isnan(accuracy)
    ]
    return pd.DataFrame(rows)


fractions = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.lists(fractions | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=6), st.randoms())
@settings(max_examples=60)
def test_a_score_is_the_statistic_of_the_supernets_that_have_the_configuration(found, random) -> None:
    found = [each for each in found if not all(map(math.isnan, each))] or [[0.5, math.nan, 0.25]]
    values = np.array(found)
    rows = evaluations(values, 2 - values, SPACE[: len(values)])
    rows = rows.iloc[random.sample(range(len(rows)), len(rows))]
    known = {
        str(Configuration(sizes.tolist())): [value for value in each if not math.isnan(value)]
        for sizes, each in zip(SPACE, found, strict=False)
    }
    for name in UNSMOOTHED:
        frame = scored(rows, Score(name)).set_index("configuration")
        assert set(frame.index) == set(known)
        for configuration, each in known.items():
            expected = {
                "mean": statistics.fmean(each),
                "median": statistics.median(each),
                "loss": statistics.fmean(each) - 2,
            }
            row = frame.loc[configuration]
            assert row["score"] == pytest.approx(expected[name])
            assert row["supernet_accuracy"] == pytest.approx(expected["median"])
            assert row["num_supernets"] == len(each) and math.isnan(row["standard_error"])


def test_costs_are_those_of_the_first_row_and_a_latency_counts_if_all_rows_have_it() -> None:
    values = np.array([[0.5, 0.9, 0.6], [0.1, 0.2, 0.6]])
    rows = evaluations(values, values, SPACE[:2])
    assert scored(rows, Score("median"))[list(scores.SCORED_COLUMNS)].to_dict("list") == {
        "configuration": ["1-1-1", "1-1-2"],
        "macs": [0, 10],
        "macs_paper": [0, 9],
        "parameters": [0, 8],
        "latency_ms": [0.0, 0.5],
        "supernet_accuracy": [0.6, 0.2],
        "num_supernets": [3, 3],
        "score": [0.6, 0.2],
        "standard_error": pytest.approx([math.nan, math.nan], nan_ok=True),
    }
    rows.loc[4, "latency_ms"] = math.nan
    assert scored(rows, Score("median"))["latency_ms"].isna().tolist() == [False, True]


def truth(generator: np.random.Generator, scale: float) -> np.ndarray:
    """Return a smooth function of SPACE: a random walk along each layer's group-sizes, (N,)."""
    indices = np.log2(SPACE).astype(int)
    return scale * sum(np.cumsum(generator.normal(size=5))[column] for column in indices.T)


def measured(generator: np.random.Generator, true: np.ndarray, between: float, noise: float, num: int) -> np.ndarray:
    """Return accuracies in supernets: each adds an offset, a smooth deviation and noise, (N, K)."""
    columns = [
        true + generator.normal() + truth(generator, between) + noise * generator.normal(size=len(true))
        for _ in range(num)
    ]
    return 0.7 + np.stack(columns, axis=1) / 100


def smoothed(values: np.ndarray, chosen: np.ndarray = SPACE, name: str = "smoothed-mean") -> Any:
    """Return the scores and standard errors of all configurations, fitted to all of them."""
    score = Score(name)
    return Smoothing.of(chosen, values, score).predict(chosen, score.of_supernets(values))


def test_smoothing_is_the_mean_of_a_gaussian_process_of_the_greatest_evidence() -> None:
    """Oracle: the formulas of Rasmussen and Williams (2.25, 2.26, 2.30), with the kernel from pairs of indices."""
    generator = np.random.default_rng(0)
    values = measured(generator, truth(generator, 0.3), 0.1, 0.2, 3)
    smoothing = Smoothing.of(SPACE, values, Score("smoothed-mean"))
    indices = np.log2(SPACE)
    sums, products = np.zeros((2, len(SPACE), len(SPACE)))
    for one, other in itertools.product(range(len(SPACE)), repeat=2):
        squares = (indices[one] - indices[other]) ** 2
        sums[one, other] = np.mean(np.exp(-squares / 2))
        products[one, other] = np.exp(-squares.sum() / (2 * 1.5**2))
    mean = values.mean(axis=1)
    white, scale = (mean - mean.mean()) / mean.std(), mean.std()

    def evidence(kernel: np.ndarray) -> float:
        return float(-0.5 * white @ np.linalg.solve(kernel, white) - 0.5 * np.linalg.slogdet(kernel)[1])

    found = {}
    for noise, share in itertools.product(scores.NOISES, SUMS):
        kernel = share * sums + (1 - share) * products
        found[evidence(kernel + noise * np.eye(len(SPACE)))] = noise, kernel
    noise, kernel = found[max(found)]
    inverse = np.linalg.inv(kernel + noise * np.eye(len(SPACE)))
    expected = mean.mean() + scale * kernel @ inverse @ white
    variance = scale**2 * np.diag(kernel - kernel @ inverse @ kernel)
    deviations = values - mean[:, None] - (values - mean[:, None]).mean(axis=0)
    between = (kernel @ inverse @ deviations).var(axis=1, ddof=1).mean() / 3
    ours, errors = smoothing.predict(SPACE, mean)
    np.testing.assert_allclose(ours, expected, atol=1e-7)
    np.testing.assert_allclose(errors, np.sqrt(variance + between), rtol=1e-6, atol=1e-7)
    assert smoothing.between == pytest.approx(between) and between > 0


def test_what_a_supernet_adds_to_all_configurations_changes_neither_ranks_nor_errors() -> None:
    generator = np.random.default_rng(1)
    values = measured(generator, truth(generator, 0.3), 0.1, 0.1, 3)
    ours, errors = smoothed(values)
    shifted, same = smoothed(values + [0.03, 0, 0])
    np.testing.assert_allclose(shifted, ours + 0.01, atol=2e-7)
    np.testing.assert_allclose(same, errors, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize(("num", "between", "noise"), [(3, 0.1, 0.05), (3, 0.0, 0.2), (2, 0.1, 0.1), (5, 0.1, 0.3)])
def test_simulated_truths_lie_within_the_standard_errors_and_are_found_sooner(num, between, noise) -> None:
    """Two thirds of normal errors are within one standard deviation; smoothing must also choose better ones."""
    generator = np.random.default_rng(2)
    within, regrets, of_median = [], [], []
    for _ in range(20):
        true = truth(generator, 0.3)
        values = measured(generator, true, between, noise, num)
        ours, errors = smoothed(values)
        wrong = 100 * (ours - ours.mean()) - (true - true.mean())
        within.append(np.mean(np.abs(wrong) < 100 * errors))
        regrets.append(true.max() - true[ours.argmax()])
        of_median.append(true.max() - true[np.median(values, axis=1).argmax()])
    assert 0.6 < np.mean(within) < 0.95
    assert np.mean(regrets) < np.mean(of_median)


def test_one_supernet_does_not_tell_how_sure_its_scores_are() -> None:
    generator = np.random.default_rng(2)
    ours, errors = smoothed(measured(generator, truth(generator, 0.3), 0.1, 0.1, 1))
    assert np.isnan(errors).all() and not np.isnan(ours).any()


def test_of_many_configurations_some_are_fitted_and_the_others_count_with_their_own_values(monkeypatch) -> None:
    """Pairs of layers interact here, which the fitted third does not tell about the others."""
    generator = np.random.default_rng(3)
    pairs = generator.normal(size=(4, 4))
    indices = np.log2(SPACE).astype(int)
    true = truth(generator, 0.3) + pairs[indices[:, 0], indices[:, 1]]
    values = measured(generator, true, 0.0, 0.3, 2)
    mean = values.mean(axis=1)
    monkeypatch.setattr(scores, "MOST_FITTED", 27)
    monkeypatch.setattr(scores, "BLOCK", 10)
    one = Smoothing.of(SPACE, values, Score("smoothed-mean"))
    shuffled = generator.permutation(len(SPACE))
    other = Smoothing.of(SPACE[shuffled], values[shuffled], Score("smoothed-mean"))
    ours, errors = one.predict(SPACE, mean)
    np.testing.assert_array_equal(ours, other.predict(SPACE, mean)[0])
    assert len(one.fitted) == len(one.surrogate.indices) == 27
    predicted, deviations = one.surrogate.predict(indices, noise=False)
    noise = one.surrogate.noise_variance
    new = np.array([row.tobytes() not in one.fitted for row in indices.astype(np.uint8)])
    share = deviations**2 / (deviations**2 + noise)
    expected = np.where(new, (1 - share) * predicted + share * mean, predicted)
    np.testing.assert_allclose(ours, expected, atol=1e-7)
    variances = np.where(new, 1 / (1 / deviations**2 + 1 / noise), deviations**2)  # of two independent measurements
    np.testing.assert_allclose(errors, np.sqrt(variances + one.between), rtol=1e-6, atol=1e-7)

    def wrong(found: np.ndarray) -> float:
        return float(np.std(100 * found[new] - true[new]))

    assert wrong(ours) < wrong(predicted)


def test_the_dense_convolution_is_the_neighbour_of_the_largest_group_size() -> None:
    generator = np.random.default_rng(4)
    values = measured(generator, truth(generator, 0.3), 0.1, 0.1, 2)
    dense = np.where(SPACE == 16, 0, SPACE)
    ours, errors = smoothed(values, name="smoothed-loss")
    with_dense = smoothed(values, dense, "smoothed-loss")
    np.testing.assert_allclose(ours, with_dense[0], atol=2e-7)
    np.testing.assert_allclose(errors, with_dense[1], rtol=1e-6, atol=2e-7)
    np.testing.assert_allclose(ours, -smoothed(values)[0], atol=2e-7)


def test_a_configuration_that_one_supernet_lacks_is_predicted_from_the_others() -> None:
    generator = np.random.default_rng(5)
    values = measured(generator, truth(generator, 0.3), 0.1, 0.02, 2)
    lacking = values.copy()
    lacking[7, 1] = math.nan
    whole, partial = smoothed(values), Smoothing.of(SPACE, lacking, Score("smoothed-mean"))
    ours, errors = partial.predict(SPACE[[7]], values[[7]].mean(axis=1))
    assert len(partial.surrogate.indices) == len(SPACE) - 1
    assert ours == pytest.approx(whole[0][7], abs=0.002) and errors != whole[1][7]


def test_equally_accurate_configurations_have_equal_scores_and_no_error() -> None:
    ours, errors = smoothed(np.full((len(SPACE), 3), 0.75))
    assert set(ours) == {0.75} and not errors.any()


def test_rows_become_values_by_supernet_and_group_sizes() -> None:
    values = np.array([[0.5, 0.25], [math.nan, 0.75]])
    rows = evaluations(values, 1 - values, SPACE[:2])
    np.testing.assert_array_equal(by_supernet(rows, Score("mean"), np.array([0, 3])), values)
    np.testing.assert_array_equal(by_supernet(rows, Score("loss"), np.array([0, 3])), 1 - values)
    np.testing.assert_array_equal(group_sizes(rows.drop_duplicates("configuration")), SPACE[:2])


class Pupil:
    """A strategy that keeps what it learned last."""

    def __init__(self, smooths: bool, ranks: bool = True) -> None:
        self.smooths, self.ranks = smooths, ranks
        self.learned: dict[Configuration, float] = {}

    def learn(self, accuracies: dict[Configuration, float]) -> None:
        self.learned = dict(accuracies)


@pytest.mark.parametrize("name", SCORES)
def test_a_strategy_learns_the_scores_of_all_unless_it_smooths_on_its_own(name: str) -> None:
    generator = np.random.default_rng(6)
    values = measured(generator, truth(generator, 0.3), 0.1, 0.1, 3)
    score, space = Score(name), [Configuration(sizes.tolist()) for sizes in SPACE]
    board, plain, smoothing = Scoreboard(score), Pupil(False), Pupil(True)
    for part in (range(1), range(1, 30), range(30, len(SPACE))):
        statistics_ = board.add([space[index] for index in part], values[part])
        board.teach([plain, smoothing], statistics_)
        assert (
            smoothing.learned
            == statistics_
            == dict(zip([space[index] for index in part], score.of_supernets(values[part]), strict=True))
        )
    if score.smoothed:
        ours = smoothed(values, name=name)[0]
        assert plain.learned == board.scores() == dict(zip(space, ours, strict=True))
    else:
        assert plain.learned == statistics_ and board.scores().keys() == set(space)


def test_nothing_is_smoothed_for_a_strategy_that_ranks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    board, pupil = Scoreboard(Score("smoothed-mean")), Pupil(False, ranks=False)
    monkeypatch.setattr(Smoothing, "of", lambda *_: pytest.fail("it is smoothed"))
    statistics_ = board.add([Configuration(sizes.tolist()) for sizes in SPACE[:3]], np.array([[0.5], [0.25], [0.75]]))
    board.teach([pupil, Pupil(True)], statistics_)
    assert [*pupil.learned.values()] == [0.5, 0.25, 0.75]
