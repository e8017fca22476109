import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gross_ray.errors import InvalidValueError
from gross_ray.search.selection import pareto_front, select, supernet_accuracies, uniform
from gross_ray.space import Configuration, SearchSpace

SPACE = list(SearchSpace({"a": (1, 2, 16), "b": (1, 4)}))


@st.composite
def tables(draw):
    """One row a configuration, in any order, with ties in both costs and accuracies."""
    configurations = draw(st.lists(st.sampled_from(SPACE), min_size=1, unique=True))
    size = len(configurations)
    return pd.DataFrame(
        {
            "configuration": [str(one) for one in configurations],
            "macs": draw(st.lists(st.integers(1, 4).map(lambda n: 100 * n), min_size=size, max_size=size)),
            "supernet_accuracy": draw(st.lists(st.sampled_from([0.5, 0.75, 0.8]), min_size=size, max_size=size)),
        }
    )


@given(tables(), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=150)
def test_selection_is_what_looking_at_every_row_gives(table, budget_row, top):
    rows = list(table.itertuples(index=False))
    budget = rows[budget_row % len(rows)]
    candidates = [row for row in rows if row.macs <= budget.macs and row.configuration != budget.configuration]
    if not candidates:
        smallest = min(row.macs for row in rows)
        with pytest.raises(InvalidValueError, match=f"{budget.configuration} .*{smallest / 1e6:.2f} M MACs at"):
            select(table, budget.configuration, top)
        return
    expected = []
    while candidates and len(expected) < top:  # take the best of what is left, one at a time
        best = candidates[0]
        for row in candidates[1:]:
            if row.supernet_accuracy != best.supernet_accuracy:
                better = row.supernet_accuracy > best.supernet_accuracy
            elif row.macs != best.macs:
                better = row.macs < best.macs
            else:
                better = Configuration.parse(row.configuration) < Configuration.parse(best.configuration)
            best = row if better else best
        expected.append(best)
        candidates.remove(best)
    chosen = select(table, budget.configuration, top)
    assert list(chosen.columns) == ["budget", "budget_macs", "rank", "configuration", "macs", "supernet_accuracy"]
    assert chosen["configuration"].tolist() == [row.configuration for row in expected]
    assert chosen["macs"].tolist() == [row.macs for row in expected]
    assert chosen["supernet_accuracy"].tolist() == [row.supernet_accuracy for row in expected]
    assert chosen["rank"].tolist() == list(range(1, len(expected) + 1))
    assert set(chosen["budget"]) == {budget.configuration} and set(chosen["budget_macs"]) == {budget.macs}


def test_ties_go_to_the_cheaper_then_to_the_smaller_group_sizes():
    table = pd.DataFrame(
        {
            "configuration": ["4-4", "16-1", "2-1", "1-4", "1-1"],
            "macs": [400, 300, 300, 350, 100],
            "supernet_accuracy": [0.9, 0.8, 0.8, 0.8, 0.7],
        }
    )
    # As text "16-1" comes before "2-1"; as group-sizes it does not.
    assert select(table, "4-4", 5)["configuration"].tolist() == ["2-1", "16-1", "1-4", "1-1"]


def test_a_budget_below_everything_names_the_smallest():
    table = pd.DataFrame(
        {"configuration": ["4-4", "1-1"], "macs": [4_000_000, 1_250_000], "supernet_accuracy": [0.9, 0.8]}
    )
    with pytest.raises(InvalidValueError, match=r"budget 1-1 \(1.25 M MACs\).*smallest is 1.25 M MACs at 1-1"):
        select(table, "1-1", 1)
    with pytest.raises(InvalidValueError, match="budget 2-2: .*not evaluated"):
        select(table, "2-2", 1)


@given(tables())
@settings(max_examples=150)
def test_the_pareto_front_is_what_no_row_dominates(table):
    rows = list(zip(table["macs"], table["supernet_accuracy"], strict=True))

    def dominated(row):
        return any(
            other[0] <= row[0] and other[1] >= row[1] and other != row  # as good in both, better in one
            for other in rows
        )

    expected = sorted({row for row in rows if not dominated(row)})  # equal rows count once
    front = pareto_front(table)
    assert list(zip(front["macs"], front["supernet_accuracy"], strict=True)) == expected
    assert set(front["configuration"]) <= set(table["configuration"])
    renamed = table.rename(columns={"macs": "seconds", "supernet_accuracy": "right"})
    assert pareto_front(renamed, cost="seconds", value="right")["configuration"].tolist() == list(
        front["configuration"]
    )


def test_supernets_are_joined_by_the_median():
    table = pd.DataFrame(
        {
            "configuration": ["2-1", "1-1"] * 3,
            "macs": [20, 10] * 3,
            "macs_paper": [19, 9] * 3,
            "parameters": [18, 8] * 3,
            "val_accuracy": [0.5, 0.1, 0.9, 0.2, 0.6, 0.6],
        }
    )
    assert supernet_accuracies(table).to_dict("list") == {
        "configuration": ["2-1", "1-1"],
        "macs": [20, 10],
        "macs_paper": [19, 9],
        "parameters": [18, 8],
        "supernet_accuracy": [0.6, 0.2],
    }


def test_a_uniform_configuration_has_one_size_everywhere():
    assert uniform([(1, 2, 4), (2, 4)], 2) == Configuration((2, 2))
    with pytest.raises(InvalidValueError, match="group-size 1 .* layer 2: 2, 4"):
        uniform([(1, 2, 4), (2, 4)], 1)
