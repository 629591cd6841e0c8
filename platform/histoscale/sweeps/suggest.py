"""Optuna at the edge: the next suggestions of a search, from the rows of those that have ended.

Optuna keeps no state of its own between calls: the same rows give the same suggestions.
"""

import json
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from histoscale.sweeps.rows import TrialRow
from histoscale.sweeps.search import Suggestion
from histoscale.sweeps.spec import SearchSpec


def suggest(search: SearchSpec, rows: Sequence[TrialRow], target: str, count: int, seed: int) -> list[Suggestion]:
    """So many suggestions by a tree-structured Parzen estimator.

    Args:
        search: What is drawn from.
        rows: Of all trials; those of role `search` are what is known.
        target: The task whose error is to be low.
        count: How many.
        seed: Of the estimator.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = distributions(search)
    known = sorted((row for row in rows if row.role == "search"), key=lambda row: row.name)
    sampler = optuna.samplers.TPESampler(seed=seed + len(known), constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for row in known:
        values = {field: _plain(space[field], json.loads(value)) for field, value in row.settings.items()}
        failed = bool(row.reason) or target not in row.scores
        study.add_trial(
            optuna.trial.create_trial(
                params=values,
                distributions=space,
                value=None if failed else row.error(target),
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
            )
        )
    asked = [study.ask(space).params for _ in range(count)]
    return [{field: _value(space[field], value) for field, value in params.items()} for params in asked]


def distributions(search: SearchSpec) -> dict[str, BaseDistribution]:
    """What each field is drawn from."""
    space: dict[str, BaseDistribution] = {}
    for field, each in search.ranges.items():
        if each.whole:
            space[field] = IntDistribution(round(each.low), round(each.high), log=each.log)
        else:
            space[field] = FloatDistribution(each.low, each.high, log=each.log)
    for field, values in search.choices.items():
        space[field] = CategoricalDistribution([json.dumps(value) for value in values])
    return space


def _plain(distribution: BaseDistribution, value: object) -> object:
    """A value of a recipe as Optuna has it: choices may be lists, which it does not take."""
    return json.dumps(value) if isinstance(distribution, CategoricalDistribution) else value


def _value(distribution: BaseDistribution, value: object) -> object:
    return json.loads(str(value)) if isinstance(distribution, CategoricalDistribution) else value
