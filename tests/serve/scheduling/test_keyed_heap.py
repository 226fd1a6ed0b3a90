import random

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scheduling.keyed_heap import KeyedHeap

_STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "discard"]), st.sampled_from("abcdef"), st.integers(0, 9)))


@settings(max_examples=200, deadline=None)
@given(_STEPS, st.integers(0, 10))
def test_it_equals_a_sorted_dictionary(steps: list[tuple[str, str, int]], limit: int) -> None:
    heap, model = KeyedHeap(), {}
    for kind, name, order in steps:
        if kind == "put":
            heap.put(name, (order,))
            model[name] = (order,)
        else:
            heap.discard(name)
            model.pop(name, None)
        assert len(heap) == len(model)
        assert heap.first() == min(model, key=lambda name: (model[name], name), default=None)
        before = heap.before((limit,))
        assert sorted(before) == sorted(name for name, order in model.items() if order < (limit,))
        assert all(heap.order(name) == model[name] for name in model)


def test_memory_is_proportional_to_the_members_and_not_to_the_calls() -> None:
    heap, rng = KeyedHeap(), random.Random(0)
    heap.put("first", (-1.0,))  # stays on top, so that no entry behind it is ever popped
    for index in range(20_000):
        heap.put(f"request {index}", (rng.random(),))
        heap.discard(f"request {index}")
    assert len(heap._entries) < 100
    assert heap.first() == "first"
