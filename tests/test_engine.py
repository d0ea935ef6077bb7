"""The engine starts tasks as early as in-order queues allow, and slows those that run together."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import GraphError, ProfileError
from hwmodels.profile import COMPUTERS, RESOURCES, Contention, Move, Resource
from hwmodels.work import Work
from sim.cost import Prices, price
from sim.engine import Rates, execute, schedule
from sim.graph import GraphArrays, Task, TaskGraph, graph
from sim.heap import list_schedule, recur
from tests.unit_machine import CPU, D2H, GPU, H2D, UNIT, machine, peak, task, unit_graph

# -- without contention -------------------------------------------------------------------------------


def test_a_copy_hides_behind_compute() -> None:
    # H2D: |--w--|                  the CPU half takes longer than copy + GPU half
    # GPU:       |g|    |sum|
    # CPU: |------c-----|
    made = unit_graph(task("w", H2D, 2), task("c", CPU, 4), task("g", GPU, 1, "w"), task("sum", GPU, 1, "g", "c"))
    timeline = execute(*made)
    assert [(s.task, s.start_s, s.end_s) for s in timeline.spans] == [
        ("w", 0, 2),
        ("c", 0, 4),
        ("g", 2, 3),
        ("sum", 4, 5),
    ]
    assert timeline.makespan_s == 5
    assert timeline.busy_s == {"CPU": 4, "GPU": 2, "H2D": 2, "D2H": 0}


def test_queues_are_in_order_so_a_blocked_head_blocks_what_is_behind_it() -> None:
    # CPU: |----c----|
    # GPU:           |head||free|   free could have started at 0, but it was issued after head
    starts, _ = schedule(*unit_graph(task("c", CPU, 3), task("head", GPU, 1, "c"), task("free", GPU, 1)))
    assert starts == [0, 3, 4]


def test_a_hand_off_delays_the_start_and_holds_no_resource() -> None:
    # D2H: |d|                      0.5 from D2H to CPU, 0.25 from CPU to H2D
    # CPU:    |--c--|
    # H2D:            |u|
    made = graph([task("d", D2H, 1), task("c", CPU, 2, "d"), task("u", H2D, 1, "c")])
    prices = price(made, machine(handoff_s={"D2H>CPU": 0.5, "CPU>H2D": 0.25}))
    assert prices.lag_s == [(), (0.5,), (0.25,)]
    timeline = execute(made, prices)
    assert [s.start_s for s in timeline.spans] == [0, 1.5, 3.75]
    assert timeline.busy_s["CPU"] == 2


def test_the_slowest_hand_off_decides() -> None:
    made = graph([task("a", CPU, 1), task("b", H2D, 2), task("c", GPU, 1, "a", "b")])
    starts, _ = schedule(made, price(made, machine(handoff_s={"CPU>GPU": 5.0, "H2D>GPU": 1.0})))
    assert starts[2] == 6  # a ends at 1 and takes 5 to hand over, b at 2 and takes 1


def test_a_run_can_start_later() -> None:
    starts, ends = schedule(*unit_graph(task("a", CPU, 1), task("b", GPU, 2, "a")), start_s=100.0)
    assert (starts, ends) == ([100, 101], [101, 103])


def test_nothing_takes_no_time() -> None:
    assert execute(*unit_graph()).spans == ()
    assert execute(*unit_graph(Task("join", "join", GPU))).makespan_s == 0


# -- prices -------------------------------------------------------------------------------------------


def test_a_task_costs_the_sum_of_its_works_and_tells_what_that_rests_on() -> None:
    two = Task("cc", "cc", CPU, (Work("ffn", "float32", 1, 3.0, 0.0), Work("ffn", "float32", 1, 0.0, 4.0)))
    prices = price(graph([two, Task("join", "join", GPU)]), UNIT)
    assert prices.duration_s == [7, 0]
    assert prices.evidence == {"measured": 0, "interpolated": 0, "extrapolated": 0, "specified": 2}


def test_a_machine_without_the_resource_is_named() -> None:
    with pytest.raises(ProfileError, match="describes CPU, not GPU"):
        price(graph([task("g", GPU, 1)]), machine(peaks={"CPU": peak()}))


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_times_that_are_no_times_are_refused(bad: float) -> None:
    made = graph([task("a", CPU, 1), task("b", CPU, 1, "a")])
    for prices in (Prices([1.0, bad], [(), (0.0,)], {}), Prices([1.0, 1.0], [(), (bad,)], {})):
        with pytest.raises(GraphError, match="task 'b' takes"):
            schedule(made, prices)


def test_prices_of_another_graph_are_refused() -> None:
    with pytest.raises(GraphError, match="1 durations and 1 lags for 2 tasks"):
        schedule(graph([task("a", CPU, 1), task("b", CPU, 1)]), Prices([1.0], [()], {}))


def test_a_task_that_never_becomes_ready_is_named() -> None:
    # A TaskGraph cannot be built like this; whoever hands in such arrays is told which task hangs.
    made = graph([task("a", CPU, 1), task("b", GPU, 1)])
    made.__dict__["arrays"] = GraphArrays([0, 1], [(1,), (0,)])
    with pytest.raises(GraphError, match="2 tasks cannot run, the first is 'a'"):
        schedule(made, Prices([1.0, 1.0], [(0.0,), (0.0,)], {}))


# -- with contention ----------------------------------------------------------------------------------

HALF = machine(contention=[Contention(("CPU", "H2D"), {"CPU": 0.5, "H2D": 0.5}, "measured")])


def test_tasks_that_run_together_slow_each_other_and_recover() -> None:
    # H2D: |====w====|              at half rate together: w needs 4 s for its 2
    # CPU: |====c====|--c--|        c has 4 - 2 left at 4 s, and goes on at full rate
    made, prices = unit_graph(task("w", H2D, 2), task("c", CPU, 4))
    assert schedule(made, prices, HALF.rates)[1] == [4, 6]
    assert schedule(made, prices)[1] == [2, 4]


def test_a_task_in_flight_slows_down_when_another_joins() -> None:
    # GPU: |-g-|
    # H2D:     |====w====|          c runs 1 s alone, 2 s at half rate (1 done), then 2 s alone
    # CPU: |-c-|====c====|--c--|
    made, prices = unit_graph(task("c", CPU, 4), task("g", GPU, 1), task("w", H2D, 1, "g"))
    assert schedule(made, prices, HALF.rates)[1] == [5, 1, 3]


def test_resources_without_shared_rates_do_not_notice_each_other() -> None:
    made, prices = unit_graph(task("c", CPU, 4), task("g", GPU, 3), task("d", D2H, 2))
    assert schedule(made, prices, HALF.rates) == schedule(made, prices)


def test_a_task_without_work_slows_nobody() -> None:
    made, prices = unit_graph(task("c", CPU, 4), Task("w", "send", H2D))
    assert schedule(made, prices, HALF.rates)[1] == [4, 0]


def test_waiting_for_a_hand_off_slows_nobody() -> None:
    made = graph([task("g", GPU, 1), task("w", H2D, 1, "g"), task("c", CPU, 3)])
    lagged = Prices([1.0, 1.0, 3.0], [(), (2.0,), ()], {})
    assert schedule(made, lagged, HALF.rates)[1] == [1, 4, 3]


BOTH = machine(
    contention=[
        Contention(("CPU", "H2D"), {"CPU": 0.5, "H2D": 0.5}, "measured"),
        Contention(("CPU", "H2D"), {"CPU": 1.0, "H2D": 0.25}, "measured", computing=("CPU",)),
    ]
)


def test_work_that_computes_has_rates_of_its_own() -> None:
    # H2D: |=====w=====|--w--|      at a quarter beside c: 1 done in 4 s, the other alone
    # CPU: |=====c=====|            c computes: it has FLOPs and no bytes
    made = graph([task("w", H2D, 2), task("c", CPU, 4)])
    assert schedule(made, price(made, BOTH), BOTH.rates)[1] == [5, 4]


def test_work_that_reads_keeps_the_rates_of_reading() -> None:
    reads = Task("c", "cc", CPU, (Work("ffn", "float32", 1, 0.0, 4.0),))
    made = graph([task("w", H2D, 2), reads])
    assert (
        schedule(made, price(made, BOTH), BOTH.rates)[1] == schedule(made, price(made, HALF), HALF.rates)[1] == [4, 6]
    )


def test_rates_change_when_work_that_computes_follows_work_that_reads() -> None:
    # H2D: |==r==|====w====|-w-|    1 of 2.5 done beside r in 2 s, 1 of it beside c in 4 s, then 0.5 alone
    # CPU: |==r==|====c====|
    reads = Task("r", "cc", CPU, (Work("ffn", "float32", 1, 0.0, 1.0),))
    made = graph([task("w", H2D, 2.5), reads, task("c", CPU, 4)])
    assert schedule(made, price(made, BOTH), BOTH.rates)[1] == [6.5, 2, 6]


def test_work_between_reading_and_computing_has_rates_between() -> None:
    # 20 FLOPs and 8 bytes: 2.5 times as long, half way from once to four times. Beside r the link takes twice as long,
    # beside c four times, so three times beside half of each, and the CPU one and a half times.
    half = Task("c", "cc", CPU, (Work("ffn", "float32", 1, 20.0, 8.0),))
    made = graph([task("w", H2D, 2), half])
    assert schedule(made, price(made, BOTH), BOTH.rates)[1] == [pytest.approx(6.0), pytest.approx(22.0)]


def test_a_task_computes_by_all_its_work() -> None:
    few, many = (Work("ffn", "float32", n, float(n), 4.0) for n in (1, 23))
    tasks = [Task("few", "cc", CPU, (few,)), Task("both", "cc", CPU, (few, many)), task("c", CPU, 4)]
    assert price(graph(tasks), BOTH).computing == [0.0, 2 / 3, 1.0]  # 1 s and 4 s; 24 s and 8 s; 4 s and none


def test_no_task_is_told_to_compute_where_contention_knows_no_such_rates() -> None:
    made = graph([task("c", CPU, 4), task("g", GPU, 4)])
    assert price(made, HALF).computing == [0.0, 0.0]
    assert price(made, BOTH).computing == [1.0, 0.0]


def test_computing_of_other_tasks_is_refused() -> None:
    with pytest.raises(GraphError, match="computing says of 2 tasks how far they compute, not of 1"):
        schedule(graph([task("c", CPU, 1)]), Prices([1.0], [()], {}, [True, False]))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_stops_or_reverses_work_is_refused(bad: float) -> None:
    with pytest.raises(GraphError, match="CPU runs at a rate of"):
        schedule(*unit_graph(task("c", CPU, 1)), lambda active, computing: dict.fromkeys(active, bad))


# -- cold starts --------------------------------------------------------------------------------------

COLD = ((2.0, 0.5), (4.0, 1.0))


def cold_run(*tasks: Task) -> list[float]:
    """Ends with cold starts and nothing else that slows."""
    made, prices = unit_graph(*tasks)
    return schedule(made, replace(prices, cold=COLD), UNIT.rates)[1]


def attention(name: str, resource: Resource, flops: float, *deps: str) -> Task:
    return replace(task(name, resource, flops, *deps), kind="attn")


@pytest.mark.parametrize("flops", [1, 8])
@pytest.mark.parametrize(("waits_s", "cold_s"), [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1), (9, 1)])
def test_attention_takes_longer_the_longer_its_thread_waited(waits_s: float, cold_s: float, flops: float) -> None:
    # GPU: |a0|         |-a1-|      |a1| if it need not wait; as much longer for a prompt as for a token
    # CPU:     |---c---|
    ends = cold_run(attention("a0", GPU, 1), task("c", CPU, waits_s, "a0"), attention("a1", GPU, flops, "c"))
    assert ends[-1] == 1 + waits_s + flops + cold_s


def test_computing_an_mlp_part_is_no_wait_on_the_resource_where_attention_ran() -> None:
    # GPU: |a0||-g-|    |a1|        the wait is 2 of 5
    # CPU:     |---c---|
    ends = cold_run(
        attention("a0", GPU, 1), task("g", GPU, 3, "a0"), task("c", CPU, 5, "a0"), attention("a1", GPU, 2, "g", "c")
    )
    assert ends[-1] == 6 + 2.5
    # CPU: |a0||-c-|                its thread came straight from the CPU's layer
    # GPU:          |a1|
    assert cold_run(attention("a0", CPU, 1), task("c", CPU, 5, "a0"), attention("a1", GPU, 2, "c"))[-1] == 8


def test_mlp_parts_start_as_they_are_and_so_does_everything_without_contention() -> None:
    tasks = attention("a0", GPU, 1), task("c", CPU, 4, "a0"), task("g", GPU, 1, "c"), attention("a1", GPU, 1, "g")
    assert cold_run(*tasks)[:3] == [1, 5, 6]
    made, prices = unit_graph(*tasks)
    assert schedule(made, replace(prices, cold=COLD))[1] == [1, 5, 6, 7]


def test_what_runs_on_the_cpu_is_never_cold() -> None:
    # GPU: |a0|                     waits are measured of the device's thread
    # H2D:     |--w--|
    # CPU:            |a1|
    assert cold_run(attention("a0", GPU, 1), task("w", H2D, 4, "a0"), attention("a1", CPU, 1, "w"))[-1] == 6


# -- moves --------------------------------------------------------------------------------------------


def move(name: str, resource: Resource, *deps: str) -> Task:
    return replace(task(name, resource, 1, *deps), kind="hidden_h2d" if resource == H2D else "hidden_d2h")


MOVED = machine(handoff_s={"CPU>H2D": 0.5, "GPU>D2H": 0.5, "D2H>CPU": 0.5, "H2D>GPU": 0.5}).with_(
    moves=(Move("GPU", 4.0, 2.0, 3.0, "measured"),)
)
CROSSING = attention("a0", CPU, 1), move("up", H2D, "a0"), attention("a1", GPU, 1, "up"), attention("a2", GPU, 1, "a1")


def test_a_hidden_state_is_handed_on_later_than_what_a_layer_hands_on() -> None:
    # CPU: |a0|                    4 before the copy, 2 after it
    # H2D:         |up|
    # GPU:                 |a1||a2|
    made = graph(CROSSING)
    assert schedule(made, price(made, MOVED))[0] == [0, 5, 8, 9]
    # the copy of a partial result is no move, nor is one to a place of which nothing is known
    inner = graph([task("c", CPU, 1), task("up", H2D, 1, "c"), move("down", D2H, "up")])
    assert price(inner, MOVED).lag_s == [(), (0.5,), (0.0,)]


def test_what_follows_the_cpus_work_on_the_device_finds_it_cold() -> None:
    made = graph(CROSSING)
    prices = price(made, MOVED)
    assert schedule(made, prices, MOVED.rates)[1][2:] == [12, 13]  # 1 + 3, then 1
    warm = replace(prices, moved_s=0.0, cold=((6.0, 1.0),))
    assert schedule(made, warm, MOVED.rates)[1][2] == 10  # it waited for 7: one more
    assert schedule(made, replace(warm, moved_s=3.0), MOVED.rates)[1][2] == 12, "the longer of the two"


# -- laws, on random graphs ---------------------------------------------------------------------------

TIMES = st.just(0.0) | st.floats(0.0, 10.0)
ROWS = st.lists(
    st.tuples(st.sampled_from(RESOURCES), TIMES, st.lists(st.tuples(st.integers(1, 9), TIMES), max_size=3)),
    min_size=1,
    max_size=24,
)


@st.composite
def priced_graphs(draw: st.DrawFn) -> tuple[TaskGraph, Prices]:
    """Graphs with durations and lags of which many are zero or equal."""
    tasks, durations, lags, computing = [], [], [], []
    for i, (resource, duration_s, back) in enumerate(draw(ROWS)):
        deps = {f"t{i - k}": lag_s for k, lag_s in back if k <= i}
        tasks.append(Task(f"t{i}", "gg", resource, deps=tuple(deps)))
        durations.append(duration_s)
        lags.append(tuple(deps.values()))
        computing.append(resource in COMPUTERS and draw(st.booleans()))
    return graph(tasks), Prices(durations, lags, {}, computing)


def some_rates(seed: int) -> Rates:
    """For every set of active resources and those that compute some rates from 0.1 to 1, always the same."""

    def rates(active: frozenset[str], computing: frozenset[str]) -> Mapping[str, float]:
        draw = random.Random(f"{seed}{sorted(active)}{sorted(computing)}")
        return {name: draw.uniform(0.1, 1.0) for name in sorted(active)}

    return rates


@settings(max_examples=1000, deadline=None)
@given(priced_graphs(), st.just(0.0) | st.floats(0.0, 1e6))
def test_simpy_heap_and_recurrence_agree_to_the_last_bit(made: tuple[TaskGraph, Prices], start_s: float) -> None:
    tasks, prices = made
    by_recurrence = recur(tasks.arrays, prices.duration_s, prices.lag_s, start_s)
    assert schedule(tasks, prices, None, start_s) == by_recurrence
    assert list_schedule(tasks.arrays, prices.duration_s, prices.lag_s, start_s) == by_recurrence


@settings(max_examples=500, deadline=None)
@given(priced_graphs())
def test_contention_without_slowdown_is_no_contention(made: tuple[TaskGraph, Prices]) -> None:
    assert schedule(*made, lambda active, computing: dict.fromkeys(active, 1.0)) == schedule(*made)


@settings(max_examples=500, deadline=None)
@given(priced_graphs(), st.integers(0, 10**6))
def test_contention_never_helps_and_costs_no_more_than_the_lowest_rate(
    made: tuple[TaskGraph, Prices], seed: int
) -> None:
    tasks, prices = made
    starts, ends = schedule(tasks, prices, some_rates(seed))
    alone_starts, alone_ends = schedule(tasks, prices)
    for i, alone_s in enumerate(prices.duration_s):
        assert starts[i] >= alone_starts[i] - 1e-9
        assert ends[i] >= alone_ends[i] - 1e-9
        assert alone_s - 1e-9 <= ends[i] - starts[i] <= alone_s / 0.1 + 1e-9


@settings(max_examples=300, deadline=None)
@given(priced_graphs(), st.integers(0, 10**6))
def test_equal_rates_for_both_kinds_of_work_are_one_table(made: tuple[TaskGraph, Prices], seed: int) -> None:
    tasks, prices = made
    own = some_rates(seed)
    alike = schedule(tasks, prices, lambda active, computing: own(active, {}))
    assert alike == schedule(tasks, replace(prices, computing=()), own)


@settings(max_examples=300, deadline=None)
@given(priced_graphs(), st.none() | st.integers(0, 10**6))
def test_no_resource_runs_two_tasks_and_no_task_precedes_its_dependencies(
    made: tuple[TaskGraph, Prices], seed: int | None
) -> None:
    tasks, prices = made
    starts, ends = schedule(tasks, prices, None if seed is None else some_rates(seed))
    free = [0.0] * len(RESOURCES)
    for i, (r, deps) in enumerate(zip(tasks.arrays.resource, tasks.arrays.deps, strict=True)):
        ready = max([free[r], *(ends[j] + lag_s for j, lag_s in zip(deps, prices.lag_s[i], strict=True))])
        assert starts[i] == ready
        free[r] = ends[i]


@settings(max_examples=300, deadline=None)
@given(priced_graphs())
def test_no_run_beats_a_resources_work_or_the_longest_chain_nor_lasts_longer_than_all_in_a_row(
    made: tuple[TaskGraph, Prices],
) -> None:
    tasks, prices = made
    makespan_s = execute(tasks, prices).end_s
    for r in range(len(RESOURCES)):
        mine = [d for d, on in zip(prices.duration_s, tasks.arrays.resource, strict=True) if on == r]
        assert makespan_s >= sum(mine) - 1e-9
    assert makespan_s <= sum(prices.duration_s) + sum(map(sum, prices.lag_s)) + 1e-9


@settings(max_examples=300, deadline=None)
@given(priced_graphs(), st.data())
def test_a_faster_task_never_hurts_without_contention(made: tuple[TaskGraph, Prices], data: st.DataObject) -> None:
    tasks, prices = made
    i = data.draw(st.integers(0, len(tasks) - 1))
    faster = [d / 2 if k == i else d for k, d in enumerate(prices.duration_s)]
    assert max(recur(tasks.arrays, faster, prices.lag_s)[1]) <= max(
        recur(tasks.arrays, prices.duration_s, prices.lag_s)[1]
    )


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_pipeline_takes_its_first_pass_and_then_its_slowest_stage(n: int) -> None:
    # n items through H2D (2 s), GPU (3 s), D2H (1 s): 2 + 3 n + 1
    tasks = []
    for i in range(n):
        tasks += [task(f"in{i}", H2D, 2), task(f"run{i}", GPU, 3, f"in{i}"), task(f"out{i}", D2H, 1, f"run{i}")]
    assert execute(*unit_graph(*tasks)).makespan_s == 3 * n + 3
