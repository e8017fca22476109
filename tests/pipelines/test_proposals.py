"""What Optuna proposes, without Ray: the trials' ends are played."""

from __future__ import annotations

import math
import statistics
import sys
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gross_ray.errors import InvalidValueError
from gross_ray.experiment import Experiment
from gross_ray.presets import preset
from gross_ray.run.store import RunStore
from pipelines.alpha_trials import OptunaOptions, grace_period, make_asha, num_epochs, store_end
from pipelines.proposals import SEARCH, STARTUP_TRIALS, Proposals
from pipelines.tuning import METRIC, TIME, Ended
from pipelines.units import Unit

OPTIONS = OptunaOptions(trials=12, alpha_low=0.0, alpha_high=8.0)
NUMBERS = count()


def new_store(folder: Path, *settings: str) -> RunStore:
    fields = ['sweep.scalings=["index","normalised"]', "sweep.seeds=2", *settings]
    return RunStore.create(folder / f"run{next(NUMBERS)}", preset("quickstart").override(fields))


def accuracy(unit: dict[str, Any]) -> float:
    """An accuracy that is highest at alpha = 3."""
    return 0.9 - 0.01 * (unit["alpha"] - 3) ** 2 - 0.05 * (unit["scaling"] == "index")


def play(store: RunStore, stop: int, *, first: int = 0, fail: frozenset[int] = frozenset()) -> list[dict[str, Any]]:
    """Do the trials from `first` on, one after the other, and return their units as proposed."""
    names = [f"trial={number}" for number in range(first, stop)]
    proposals = Proposals(store, OPTIONS, "none", names)
    units = []
    for number in range(first, stop):
        proposed = proposals.suggest(f"tune{number}")
        unit = proposed["unit"]
        assert proposed["trial"] == f"trial={number}"
        units.append(unit)
        end(store, number, unit, proposals, diverged=number in fail)
    return units


def end(store: RunStore, number: int, unit: dict[str, Any], proposals: Proposals, *, diverged: bool = False) -> None:
    result = {METRIC: math.nan if diverged else accuracy(unit), TIME: 3, "training_iteration": 3}
    failure = "the loss became nan" if diverged else None
    reported = result | ({"failed": failure} if diverged else {})
    proposals.on_trial_result(f"tune{number}", result)
    proposals.on_trial_complete(f"tune{number}", reported)
    arguments = {name: value for name, value in unit.items() if name != "name"}
    told = Ended(f"trial={number}", Unit(unit["name"], arguments), result, False, failure, diverged)
    store_end(store, SEARCH, number, told, "none")


class Undisturbed(NamedTuple):
    units: list[dict[str, Any]]
    rows: Any


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    store = new_store(tmp_path_factory.mktemp("undisturbed"))
    units = play(store, 12, fail=frozenset({2}))
    return Undisturbed(units, store.read_table("alpha_trials"))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 11), while_under_way=st.booleans())
def test_a_killed_search_goes_on_as_if_undisturbed(
    undisturbed: Undisturbed, tmp_path: Path, cut: int, while_under_way: bool
) -> None:
    store = new_store(tmp_path)
    play(store, cut, fail=frozenset({2}))
    if while_under_way:  # proposed and stored, then everything is gone
        lost = Proposals(store, OPTIONS, "none", [f"trial={number}" for number in range(cut, 12)]).suggest("tune")
        assert lost["unit"] == undisturbed.units[cut]
        assert store.read_table("alpha_trials")["status"].tolist()[-1] == "proposed"
    assert play(store, 12, first=cut, fail=frozenset({2})) == undisturbed.units[cut:]
    assert store.read_table("alpha_trials").equals(undisturbed.rows)


def test_the_rows_say_what_was_proposed_and_what_became_of_it(undisturbed: Undisturbed) -> None:
    rows = undisturbed.rows
    assert rows["unit"].tolist() == [unit["name"] for unit in undisturbed.units]
    assert rows["alpha"].tolist() == [unit["alpha"] for unit in undisturbed.units]
    assert rows["seed"].tolist() == [0, 1] * 6
    assert rows["status"].tolist() == ["completed"] * 2 + ["failed"] + ["completed"] * 9
    assert rows.loc[2, "reason"] == "the loss became nan"
    assert math.isnan(rows.loc[2, "supernet_accuracy"])
    expected = [accuracy(unit) for unit in undisturbed.units]
    assert rows["supernet_accuracy"].drop(2).tolist() == expected[:2] + expected[3:]


def test_alphas_are_within_the_range_short_and_each_a_new_one(undisturbed: Undisturbed) -> None:
    alphas = [unit["alpha"] for unit in undisturbed.units]
    assert all(0 <= alpha <= 8 and alpha == float(f"{alpha:.4g}") for alpha in alphas)
    assert len(set(alphas)) == len(alphas)
    assert {unit["scaling"] for unit in undisturbed.units} == {"index", "normalised"}


def test_optuna_learns_from_what_it_is_told(tmp_path: Path) -> None:
    searches = [[unit["alpha"] for unit in play(new_store(tmp_path, f"seed={seed}"), 30)] for seed in range(3)]
    late = statistics.mean(abs(alpha - 3) for alphas in searches for alpha in alphas[15:])
    assert late < 1.5  # 2.1 of random ones, 1.1 of Optuna left to itself
    assert len({alpha for alphas in searches for alpha in alphas[:STARTUP_TRIALS]}) == 3 * STARTUP_TRIALS


def test_a_proposal_on_hold_comes_before_new_ones(tmp_path: Path, undisturbed: Undisturbed) -> None:
    store = new_store(tmp_path)
    proposals = Proposals(store, OPTIONS, "none", ["trial=0", "trial=1", "trial=2"])
    first, second, third = (proposals.suggest(f"tune{number}")["unit"] for number in range(3))
    end(store, 1, second, proposals)  # of three at the same time one ends, then all is killed
    resumed = Proposals(store, OPTIONS, "none", ["trial=0", "trial=2", "trial=3"])
    again = [resumed.suggest(f"again{number}") for number in range(3)]
    assert [one["trial"] for one in again] == ["trial=0", "trial=2", "trial=3"]
    assert [one["unit"] for one in again[:2]] == [first, third]
    assert again[2]["unit"]["alpha"] not in {first["alpha"], second["alpha"], third["alpha"]}


def test_trials_outside_the_range_are_left_alone(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    play(store, 6)
    narrow = OptunaOptions(trials=3, alpha_low=0.5, alpha_high=1.0)
    proposals = Proposals(store, narrow, "none", [f"trial={number}" for number in range(6, 9)])
    alphas = [proposals.suggest(f"tune{number}")["unit"]["alpha"] for number in range(3)]
    assert all(0.5 <= alpha <= 1.0 for alpha in alphas)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"trials": 0}, ["trials = 0", "1 or more"]),
        ({"alpha_low": -1.0}, ["from -1 to 8", "0 or more"]),
        ({"alpha_low": 8.0}, ["from 8 to 8"]),
        ({"alpha_high": math.inf}, ["from 0 to inf"]),
        ({"alpha_high": math.nan}, ["nan"]),
        ({"alpha_high": 2.71828}, ["2.71828", "4 digits", "2.718"]),
    ],
)
def test_a_wrong_search_is_refused(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InvalidValueError) as found:
        OptunaOptions(**fields)
    for part in parts:
        assert part in str(found.value)


def test_a_missing_optuna_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InvalidValueError, match=r"^Optuna is not installed; .*pip install 'gross-ray\[optuna\]'$"):
        OptunaOptions()


class Trial:
    def __init__(self, name: str) -> None:
        self.trial_id = name


def experiment(reconstruction: int, finetuning: int) -> Experiment:
    return preset("quickstart").override([f"reconstruction.epochs={reconstruction}", f"finetuning.epochs={finetuning}"])


@given(reconstruction=st.integers(1, 40), finetuning=st.integers(2, 200))
def test_asha_stops_the_worse_of_two_at_its_first_rung_and_none_before_or_at_the_end(
    reconstruction: int, finetuning: int
) -> None:
    chosen = experiment(reconstruction, finetuning)
    scheduler, better, worse = make_asha(chosen), Trial("better"), Trial("worse")
    for trial in (better, worse):
        scheduler.on_trial_add(None, trial)
    last, grace = num_epochs(chosen), grace_period(chosen)
    assert reconstruction < grace < last == reconstruction + finetuning
    stopped = {}
    for epoch in range(1, last + 1):
        for trial, value in ((better, 0.8), (worse, 0.7)):
            if scheduler.on_trial_result(None, trial, {TIME: epoch, METRIC: value}) == "STOP":
                stopped.setdefault(trial.trial_id, epoch)
    assert stopped == {"worse": grace}
    late = Trial("late")
    scheduler.on_trial_add(None, late)
    before = [scheduler.on_trial_result(None, late, {TIME: epoch, METRIC: 0.0}) for epoch in range(1, grace)]
    assert set(before) <= {"CONTINUE"}


def test_asha_needs_an_epoch_to_spare() -> None:
    with pytest.raises(InvalidValueError, match="finetuning.epochs = 1: must be 2 or more"):
        grace_period(experiment(3, 1))
