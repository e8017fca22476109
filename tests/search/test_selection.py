import math
import re
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gross_ray.errors import InvalidValueError
from gross_ray.search.budgets import (
    COSTS,
    RELATIVE,
    Budget,
    RelativeBudget,
    amounts,
    parse_budget,
    parse_budgets,
    readable_amount,
)
from gross_ray.search.selection import (
    _undominated,
    best_of_chunks,
    best_under,
    front_of_chunks,
    near_best,
    pareto_front,
    select,
    uniform,
)
from gross_ray.space import Configuration, SearchSpace

SPACE = list(SearchSpace({"a": (1, 2, 16), "b": (1, 4)}))
LARGE_SPACE = list(SearchSpace({"a": (1, 2, 16), "b": (1, 4, 8), "c": (2, 10)}))


@st.composite
def tables(draw):
    """One row a configuration, in any order, with ties in both costs and accuracies."""
    configurations = draw(st.lists(st.sampled_from(SPACE), min_size=1, unique=True))
    size = len(configurations)
    return pd.DataFrame(
        {
            "configuration": [str(one) for one in configurations],
            "macs": draw(st.lists(st.integers(1, 4).map(lambda n: 100 * n), min_size=size, max_size=size)),
            "score": draw(st.lists(st.sampled_from([0.5, 0.75, 0.8]), min_size=size, max_size=size)),
            "supernet_accuracy": draw(st.lists(st.sampled_from([0.25, 0.375]), min_size=size, max_size=size)),
            "standard_error": draw(st.sampled_from([math.nan, 0.0, 0.04, 0.05, 0.25])),
        }
    )


@st.composite
def accuracy_tables(draw, min_size=1):
    """Like `scored`, with every cost, more rows than are asked for, and ties in all of them."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(LARGE_SPACE),
                *(st.integers(1, 3).map(lambda n: 1000 * n) for _ in range(3)),
                st.sampled_from([0.5, 1.0, 2.5]),
                st.sampled_from([0.5, 0.75]),
            ),
            min_size=min_size,
            unique_by=lambda row: row[0],
        )
    )
    table = pd.DataFrame(rows, columns=["configuration", *COSTS, "score"])
    numbers = dict.fromkeys(COSTS[:3], "int64") | {"latency_ms": "float64", "score": "float64"}
    return table.assign(configuration=[str(row[0]) for row in rows]).astype(numbers)


BUDGETS = st.lists(
    st.sampled_from(COSTS).flatmap(
        lambda cost: st.sampled_from([0.7, 2.5] if cost == "latency_ms" else [1000, 2500, 3000]).map(
            lambda limit: Budget(cost, limit)
        )
    ),
    max_size=3,
)


def first_of(rows, before, count):
    """Take the first of what is left, one at a time, by asking for each pair which comes before the other."""
    left, taken = list(rows), []
    while left and len(taken) < count:
        first = left[0]
        for row in left[1:]:
            first = row if before(row, first) else first
        taken.append(first)
        left.remove(first)
    return taken


@given(accuracy_tables(), BUDGETS, st.integers(1, 4))
@settings(max_examples=80)
def test_the_best_are_what_looking_at_every_row_gives(table, budgets, top):
    def before(row, other):
        if row.score != other.score:
            return row.score > other.score
        for cost in [budget.cost for budget in budgets] or ["macs"]:
            if getattr(row, cost) != getattr(other, cost):
                return getattr(row, cost) < getattr(other, cost)
        return Configuration.parse(row.configuration) < Configuration.parse(other.configuration)

    rows = list(table.itertuples(index=False))
    fitting = [row for row in rows if all(getattr(row, budget.cost) <= budget.limit for budget in budgets)]
    if not fitting:
        with pytest.raises(InvalidValueError, match="nothing fits") as raised:
            best_under(table, budgets, top)
        for budget in budgets:
            least = min(getattr(row, budget.cost) for row in rows)
            assert f"{Budget(budget.cost, least)} at " in str(raised.value)
            assert str(budget) in str(raised.value)
        return
    best = best_under(table, budgets, top)
    assert list(best.columns) == list(table.columns)
    assert list(best.itertuples(index=False)) == first_of(fitting, before, top)


@given(accuracy_tables(), BUDGETS, st.integers(1, 4), st.lists(st.integers(0, 18), max_size=3))
@settings(max_examples=80)
def test_the_best_of_the_chunks_best_are_the_best_of_all(table, budgets, top, cuts):
    edges = [0, *sorted(cuts), len(table)]
    chunks = [table.iloc[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    try:
        whole = best_under(table, budgets, top)
    except InvalidValueError as error:
        with pytest.raises(InvalidValueError) as raised:
            best_of_chunks(iter(chunks), budgets, top)
        assert str(raised.value).partition(":")[0] == str(error).partition(":")[0]
        return
    pd.testing.assert_frame_equal(best_of_chunks(iter(chunks), budgets, top), whole)
    parts = []
    for chunk in chunks:
        try:
            parts.append(best_under(chunk, budgets, top))
        except InvalidValueError:  # nothing of this chunk fits
            continue
    pd.testing.assert_frame_equal(best_under(pd.concat(parts), budgets, top), whole)


@given(accuracy_tables(), st.sampled_from(COSTS), st.lists(st.integers(0, 18), max_size=3))
@settings(max_examples=80)
def test_the_front_of_the_chunks_fronts_is_the_front_of_all(table, cost, cuts):
    edges = [0, *sorted(cuts), len(table)]
    chunks = [table.iloc[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    whole = pareto_front(table, cost=cost)
    pd.testing.assert_frame_equal(front_of_chunks(iter(chunks), cost=cost), whole)
    pd.testing.assert_frame_equal(
        pareto_front(pd.concat([pareto_front(chunk, cost=cost) for chunk in chunks]), cost=cost), whole
    )
    assert list(whole.columns) == list(table.columns)
    for row in whole.itertuples():  # of equals, the smallest group-sizes
        equals = table[(table[cost] == getattr(row, cost)) & (table["score"] == row.score)]
        assert row.configuration == str(min(map(Configuration.parse, equals["configuration"])))


def test_many_equal_rows_are_decided_by_the_group_sizes():
    space = list(SearchSpace({layer: (1, 2, 16, 128) for layer in "abcdef"}))
    shuffled = np.random.default_rng(0).permutation(len(space))
    table = pd.DataFrame({"configuration": [str(space[place]) for place in shuffled], "macs": 10, "score": 0.5})
    assert best_under(table, [], 7)["configuration"].tolist() == [str(one) for one in space[:7]]
    assert pareto_front(table)["configuration"].tolist() == ["1-1-1-1-1-1"]


def test_a_cost_that_is_not_measured_names_the_command_to_run():
    table = pd.DataFrame(
        {"configuration": ["1-1", "2-1"], "macs": [1, 2], "latency_ms": [0.5, None], "score": [0.5, 0.6]}
    )
    for choose in (
        lambda: best_under(table, [Budget("latency_ms", 1.0)], 1),
        lambda: pareto_front(table, cost="latency_ms"),
    ):
        with pytest.raises(InvalidValueError, match="latency_ms is not measured .*`gross latency RUN`"):
            choose()
    assert best_under(table, [Budget("macs", 2)], 1)["configuration"].tolist() == ["2-1"]
    assert best_under(table.head(1), [Budget("latency_ms", 1.0)], 1)["configuration"].tolist() == ["1-1"]


def test_nothing_evaluated_is_told():
    table = pd.DataFrame({"configuration": [], "macs": [], "score": []})
    for chunks in ([], [table], [table, table]):
        with pytest.raises(InvalidValueError, match="no configuration is evaluated"):
            best_of_chunks(chunks, [Budget("macs", 1)], 1)
    assert len(pareto_front(table)) == 0


@pytest.mark.parametrize(
    ("text", "cost", "limit"),
    [
        ("macs=2.66M", "macs", 2_660_000),
        ("macs=0.57M", "macs", 570_000),
        ("macs_paper=1.5G", "macs_paper", 1_500_000_000),
        ("parameters=12k", "parameters", 12_000),
        ("parameters=12.K", "parameters", 12_000),
        (" parameters = 120000 ", "parameters", 120_000),
        ("latency_ms=1.5", "latency_ms", 1.5),
        ("latency_ms=.25", "latency_ms", 0.25),
    ],
)
def test_budgets_are_read(text, cost, limit):
    assert parse_budget(text) == Budget(cost, limit)


@given(st.integers(1, 10**6), st.integers(0, 4), st.sampled_from("kKMG"), st.sampled_from(COSTS))
def test_a_suffix_loses_nothing(digits, places, suffix, cost):
    exact = Fraction(digits, 10**places) * {"k": 10**3, "M": 10**6, "G": 10**9}[suffix.replace("K", "k")]
    text = f"{digits // 10**places}.{digits % 10**places:0{places}d}" if places else str(digits)
    assert parse_budget(f"{cost}={text}{suffix}").limit == float(exact)


@given(st.sampled_from(COSTS), st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
@settings(max_examples=80)
def test_a_budget_is_read_as_it_is_written(cost, limit):
    assert parse_budget(str(Budget(cost, limit))) == Budget(cost, limit)


@given(st.sampled_from(RELATIVE), st.integers(1, 10**4), st.integers(1, 10**10))
def test_a_share_of_the_full_network_is_exact(cost, hundredths, full):
    written = f"{cost}={hundredths // 100}.{hundredths % 100:02}%"
    budget = parse_budget(written)
    assert budget == parse_budget(str(budget)) == RelativeBudget(cost, hundredths / 100)
    (amount,) = amounts([budget], {cost: full})
    assert amount == Budget(cost, float(Fraction(hundredths, 10**4) * full))
    assert amounts([amount], {}) == [amount]
    assert str(amount).endswith(f", {hundredths / 100:g} % of the full network's")


def test_budgets_are_written_short():
    assert [str(Budget("macs", limit)) for limit in (2_660_000, 999, 1000, 1.5, 2_000_000_000, np.float64(0.5))] == [
        "macs=2.66M",
        "macs=999",
        "macs=1k",
        "macs=1.5",
        "macs=2G",
        "macs=0.5",
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("macs", ["'macs'", "COST=LIMIT", "macs=2.66M"]),
        ("macs=2.66m", ["'macs=2.66m'", "k, M, G or %"]),
        ("macs=%", ["'macs=%'", "macs=40%"]),
        ("macs=0%", ["macs=0%", "above 0", "macs=40%"]),
        ("macs=2k%", ["'macs=2k%'"]),
        ("macs_paper=60%", ["macs_paper=60%", "only macs, parameters, latency_ms", "give macs_paper as a number"]),
        ("flops=60%", ["'flops'", ", ".join(COSTS)]),
        ("macs=2,66M", ["'macs=2,66M'", "a number"]),
        ("macs=-1", ["'macs=-1'", "above 0"]),
        ("macs=1e6", ["'macs=1e6'"]),
        ("macs=", ["'macs='"]),
        ("macs=.", ["'macs=.'"]),
        ("macs=nan", ["'macs=nan'"]),
        ("macs=\u0663M", ["COST=LIMIT"]),
        ("macs=0", ["macs=0", "above 0"]),
        ("macs=" + "9" * 400, ["macs=inf", "finite"]),
        ("flops=2M", ["'flops'", ", ".join(COSTS)]),
        ("accuracy=1", ["'accuracy'"]),
    ],
)
def test_what_is_no_budget_is_told(text, parts):
    with pytest.raises(InvalidValueError) as raised:
        parse_budget(text)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


@given(tables(), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=80)
def test_selection_is_what_looking_at_every_row_gives(table, budget_row, top):
    rows = list(table.itertuples(index=False))
    budget = rows[budget_row % len(rows)]
    candidates = [row for row in rows if row.macs <= budget.macs and row.configuration != budget.configuration]
    if not candidates:
        smallest = min(row.macs for row in rows)
        with pytest.raises(InvalidValueError, match=f"{budget.configuration} .*{smallest / 1e6:.2f} M MACs at"):
            select(table, budget.configuration, top)
        return

    def before(row, other):
        if row.score != other.score:
            return row.score > other.score
        if row.macs != other.macs:
            return row.macs < other.macs
        return Configuration.parse(row.configuration) < Configuration.parse(other.configuration)

    expected = first_of(candidates, before, top)
    best = expected[0]
    if not math.isnan(best.standard_error):
        near = [row for row in candidates if row.score >= best.score - best.standard_error]
        cheapest = first_of([row for row in near if row.macs == min(row.macs for row in near)], before, 1)
        expected += [row for row in cheapest if row not in expected]
    chosen = select(table, budget.configuration, top)
    columns = ["configuration", "macs", "supernet_accuracy"]
    assert list(chosen.columns) == ["budget", "budget_macs", "rank", *columns]
    for column in columns:
        assert chosen[column].tolist() == [getattr(row, column) for row in expected]
    assert chosen["rank"].tolist() == list(range(1, len(expected) + 1))
    assert set(chosen["budget"]) == {budget.configuration} and set(chosen["budget_macs"]) == {budget.macs}


@given(accuracy_tables(), BUDGETS, st.sampled_from([0.0, 0.25]), st.lists(st.integers(0, 18), max_size=3))
@settings(max_examples=80)
def test_the_near_best_are_counted_and_the_cheapest_found_whatever_the_chunks(table, budgets, error, cuts):
    table = table.assign(standard_error=error)
    rows = list(table.itertuples(index=False))
    fitting = [row for row in rows if all(getattr(row, budget.cost) <= budget.limit for budget in budgets)]
    if not fitting:
        return
    best = best_under(table, budgets, 1).iloc[0]
    edges = [0, *sorted(cuts), len(table)]
    chunks = [table.iloc[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    near = near_best(iter(chunks), budgets, best)
    expected = [row for row in fitting if row.score >= best.score - error]
    costs = list(dict.fromkeys(budget.cost for budget in budgets)) or ["macs"]

    def place(row):
        first, *others = (getattr(row, cost) for cost in costs)
        return first, -row.score, *others, Configuration.parse(row.configuration)

    assert near.count == len(expected)
    assert near.cheapest["configuration"].tolist() == [min(expected, key=place).configuration]


def test_ties_go_to_the_cheaper_then_to_the_smaller_group_sizes():
    table = pd.DataFrame(
        {
            "configuration": ["4-4", "16-1", "2-1", "1-4", "1-1"],
            "macs": [400, 300, 300, 350, 100],
            "score": [0.9, 0.8, 0.8, 0.8, 0.7],
            "supernet_accuracy": 0.5,
            "standard_error": math.nan,
        }
    )
    # As text "16-1" comes before "2-1"; as group-sizes it does not.
    assert select(table, "4-4", 5)["configuration"].tolist() == ["2-1", "16-1", "1-4", "1-1"]


def test_a_budget_below_everything_names_the_smallest():
    table = pd.DataFrame({"configuration": ["4-4", "1-1"], "macs": [4_000_000, 1_250_000], "score": [0.9, 0.8]})
    with pytest.raises(InvalidValueError, match=r"budget 1-1 \(1.25 M MACs\).*smallest is 1.25 M MACs at 1-1"):
        select(table, "1-1", 1)
    with pytest.raises(InvalidValueError, match="budget 2-2: .*not evaluated"):
        select(table, "2-2", 1)


@given(tables())
@settings(max_examples=80)
def test_the_pareto_front_is_what_no_row_dominates(table):
    rows = list(zip(table["macs"], table["score"], strict=True))

    def dominated(row):
        return any(
            other[0] <= row[0] and other[1] >= row[1] and other != row  # as good in both, better in one
            for other in rows
        )

    expected = sorted({row for row in rows if not dominated(row)})  # equal rows count once
    front = pareto_front(table)
    assert list(zip(front["macs"], front["score"], strict=True)) == expected
    assert set(front["configuration"]) <= set(table["configuration"])
    renamed = table.rename(columns={"macs": "seconds", "score": "right"})
    assert pareto_front(renamed, cost="seconds", value="right")["configuration"].tolist() == list(
        front["configuration"]
    )


@given(accuracy_tables(min_size=0), st.sampled_from([COSTS[:2], COSTS[2:], COSTS[:3]]), st.integers(1, 4))
@settings(max_examples=80)
def test_the_front_of_several_costs_is_what_no_row_dominates(table, costs, size):
    rows = [tuple(row) for row in table[[*costs, "score"]].itertuples(index=False)]

    def dominated(row):
        return any(
            all(ours <= theirs for ours, theirs in zip(other[:-1], row[:-1], strict=True))
            and other[-1] >= row[-1]
            and other != row
            for other in rows
        )

    front = pareto_front(table, cost=costs)
    found = [tuple(row) for row in front[[*costs, "score"]].itertuples(index=False)]
    assert found == sorted({row for row in rows if not dominated(row)})
    for row, configuration in zip(found, front["configuration"], strict=True):
        equals = [name for other, name in zip(rows, table["configuration"], strict=True) if other == row]
        assert configuration == str(min(map(Configuration.parse, equals)))
    if len(table):
        chunks = [table.iloc[start : start + size] for start in range(0, len(table), size)]
        pd.testing.assert_frame_equal(front_of_chunks(chunks, cost=costs), front)


def test_blocks_change_no_front():
    points = np.random.default_rng(0).normal(size=(2000, 3)).round(1)
    whole = _undominated(points, block=len(points))
    assert 3 < whole.sum() < 200
    assert (_undominated(points, block=7) == whole).all()


def test_a_uniform_configuration_has_one_size_everywhere():
    space = SearchSpace({"conv2": (1, 2, 4), "conv3": (2, 4)})
    assert uniform(space, 2) == Configuration((2, 2))
    with pytest.raises(InvalidValueError, match="group-size 1 .* those of conv3: 2, 4"):
        uniform(space, 1)


def test_several_budgets_are_read_from_one_text():
    assert parse_budgets("macs=2.66M, latency_ms=1.5") == [Budget("macs", 2.66e6), Budget("latency_ms", 1.5)]
    assert parse_budgets("macs=1k") == [Budget("macs", 1000.0)]
    with pytest.raises(InvalidValueError, match="'macs=1k,macs=2k': limits a cost twice; name each once"):
        parse_budgets("macs=1k,macs=2k")
    with pytest.raises(InvalidValueError, match="write COST=LIMIT"):
        parse_budgets("macs=1k,")


@given(st.floats(1e-6, 1e6))
def test_a_time_is_written_with_four_digits_within_which_it_fits(ms: float) -> None:
    written = readable_amount("latency_ms", ms)
    budget = parse_budget(f"latency_ms={written}")
    assert isinstance(budget, Budget) and ms <= budget.limit <= ms * 1.0011
    assert len(re.sub("[^0-9]", "", written).strip("0")) <= 4
    assert readable_amount("macs", 1234567) == "1.234567M"
