"""The order of a queue, against what fairness means."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from clear_dit.app.fair import FairQueue


@dataclass(eq=False)
class Asked:
    """A job as a queue sees it."""

    owner: str
    party: str
    number: int


def filled(parties):
    queue = FairQueue()
    for number, (party, owner) in enumerate(parties):
        queue.add(Asked(f"{party}{owner}", party, number))
    return queue


ASKED = st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("xyz")), max_size=20)


@given(ASKED)
def test_the_order_told_is_the_order_run(asked):
    queue = filled(asked)
    told = list(queue)
    assert [queue.pop() for _ in range(len(asked))] == told
    assert len(queue) == 0


@given(ASKED)
def test_an_owners_jobs_run_in_their_order(asked):
    order = list(filled(asked))
    for owner in {job.owner for job in order}:
        numbers = [job.number for job in order if job.owner == owner]
        assert numbers == sorted(numbers)


@given(ASKED)
def test_nobody_has_a_second_turn_before_all_who_wait_had_one(asked):
    order = list(filled(asked))
    for kind in ("party", "owner"):
        total = Counter(getattr(job, kind) for job in order)
        had = Counter()
        for place, job in enumerate(order):
            had[getattr(job, kind)] += 1
            if kind == "owner":
                others = {one.owner for one in order[place:] if one.party == job.party}
            else:
                others = set(total)
            waiting = {one for one in others if had[one] < total[one]}
            assert all(had[getattr(job, kind)] - had[one] <= 1 for one in waiting)


def test_who_had_a_turn_lets_others_go_first():
    queue = filled([("A", "x"), ("A", "x")])
    assert queue.pop().number == 0
    queue.add(Asked("By", "B", 2))
    assert [job.number for job in queue] == [2, 1]
    job = next(iter(queue))
    queue.remove(job)
    assert job not in queue
