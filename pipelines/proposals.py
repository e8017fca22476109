"""Optuna's proposals as a searcher of Ray Tune, each stored before its trial starts: a killed search goes on with it.

A proposal depends on the experiment's seed, its number and the ends that Optuna knows of, so that trials done one after
the other are the same ones however often the search is killed in between.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from gross_ray.run.store import RunStore
from gross_ray.seeds import derive_seed
from pipelines.alpha_trials import OptunaOptions, rounded, store_proposal, stored_trials
from pipelines.supernet import supernet_unit
from pipelines.tuning import METRIC, trial_config

SEARCH = "optuna"
STARTUP_TRIALS = 5
"""Trials that are drawn at random before the estimates (TPE) decide: half of Optuna's, for a space of two numbers."""
ATTEMPTS = 100
"""How often an alpha is drawn that is not among the earlier ones."""
_STUDY = "alpha"


class Proposals(Searcher):
    """Proposes the trials called `names` (trial=NUMBER): first those stored already, then Optuna's new ones."""

    def __init__(self, store: RunStore, options: OptunaOptions, scheduler: str, names: Sequence[str]) -> None:
        """Tell Optuna of all trials within the range that are stored."""
        super().__init__(metric=METRIC, mode="max")
        self._store, self._scheduler, self._names = store, scheduler, deque(names)
        sweep = store.experiment.sweep
        self._seeds = sweep.seeds if sweep.alphas else store.experiment.supernet.seeds  # those that are decomposed
        space: dict[str, BaseDistribution] = {
            "alpha": FloatDistribution(options.alpha_low, options.alpha_high),
            "scaling": CategoricalDistribution(sweep.scalings),
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.InMemoryStorage()
        _tell(
            optuna.create_study(storage=storage, study_name=_STUDY, direction="maximize"), space, store, options, names
        )
        sampler = _Sampler(derive_seed(store.experiment.seed, "sweep-alpha", SEARCH))
        self._optuna = OptunaSearch(
            space, metric=METRIC, mode="max", sampler=sampler, storage=storage, study_name=_STUDY
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the configuration of the next trial, once it is stored."""
        point = self._optuna.suggest(trial_id)
        assert point is not None  # Optuna always has one
        name = self._names.popleft()
        number = int(name.removeprefix("trial="))
        unit = supernet_unit(point["alpha"], point["scaling"], number % self._seeds)
        store_proposal(self._store, SEARCH, number, unit, self._scheduler)
        return {"trial": name, "unit": trial_config(unit)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna of an epoch."""
        if not math.isnan(result[METRIC]):
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna of a trial's end. One that was stopped early counts with the accuracy that it had then."""
        failed = error or result is None or "failed" in result
        self._optuna.on_trial_complete(trial_id, None if failed else result, error=failed)


def within(store: RunStore, options: OptunaOptions) -> Any:
    """Return the rows of the stored trials that belong to a search of this range."""
    rows = stored_trials(store, SEARCH)
    return rows[rows["alpha"].between(options.alpha_low, options.alpha_high)]


def _tell(
    study: optuna.Study,
    space: dict[str, BaseDistribution],
    store: RunStore,
    options: OptunaOptions,
    names: Sequence[str],
) -> None:
    scalings = store.experiment.sweep.scalings
    for row in within(store, options).itertuples():
        # Without temperature the scalings are one, called index, which need not be among the experiment's.
        point = {"alpha": row.alpha, "scaling": row.scaling if row.scaling in scalings else scalings[0]}
        if row.status == "failed":
            study.add_trial(create_trial(state=TrialState.FAIL, params=point, distributions=space))
        elif row.status != "proposed":
            study.add_trial(create_trial(value=row.supernet_accuracy, params=point, distributions=space))
        elif f"trial={row.trial}" in names:
            study.enqueue_trial(point)


class _Sampler(BaseSampler):
    """Optuna's TPE, seeded anew for each trial, with alphas of few digits and none of them twice where possible."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        taken = {other.params.get(param_name) for other in others}
        for attempt in range(ATTEMPTS):
            seed = derive_seed(self._seed, trial.number, param_name, attempt) % 2**32
            tpe = TPESampler(n_startup_trials=STARTUP_TRIALS, constant_liar=True, seed=seed)
            value = tpe.sample_independent(study, trial, param_name, param_distribution)
            if isinstance(param_distribution, CategoricalDistribution):
                return value
            value = rounded(value)
            if value not in taken:
                break
        return value
