"""The sequence table: what the host sets is what the device reads, as the sampling kernels take it."""

import torch

from engine.decoding.cuda.sequence_table import SequenceTable
from engine.sampling_params import SamplingParams, SequenceRequest

COLUMNS = ("seeds", "candidates", "positions", "top_k", "unconditional", "source", "prefixes", "filters")


def _table(num_slots: int = 5) -> SequenceTable:
    return SequenceTable(num_slots, idle_position=9, vocab_size=64, device=torch.device("cpu"))


def _columns_of(table: SequenceTable, slot: int) -> dict[str, float]:
    names = (*COLUMNS, "temperature", "top_p", "guidance")
    return {name: getattr(table, name)[slot].item() for name in names}


def test_columns_are_what_kernels_take() -> None:
    table = _table()
    for name in COLUMNS:
        column = getattr(table, name)
        assert (column.dtype, column.shape, column.is_contiguous()) == (torch.int64, (5,), True), name
        assert (column.data_ptr() - table.seeds.data_ptr()) % 16 == 0  # else each number of slots is compiled for anew
    for name in ("temperature", "top_p", "guidance"):
        column = getattr(table, name)
        assert (column.dtype, column.shape, column.is_contiguous()) == (torch.float32, (5,), True), name
        assert (column.data_ptr() - table.seeds.data_ptr()) % 16 == 0


def test_a_sequence_arrives_with_the_upload() -> None:
    table = _table()
    idle = _columns_of(table, 2)
    options = SamplingParams(temperature=0.75, top_k=12, top_p=0.5, guidance_scale=3.0)
    table.set_sequence(
        2,
        SequenceRequest(0, options.updated(seed=2**63 + 5), candidate=2**32 - 1),
        prefix_entry=4,
        unconditional_slot=3,
    )
    table.set_unconditional(3, source=2, prefix_entry=1)
    table.set_position(2, 6)
    table.set_position(3, 6)
    assert _columns_of(table, 2) == idle
    table.upload()
    assert _columns_of(table, 2) == {
        "seeds": 5 - 2**63, "candidates": 2**32 - 1, "positions": 6, "top_k": 12, "unconditional": 3, "source": 2,
        "prefixes": 4, "filters": 1, "temperature": 0.75, "top_p": 0.5, "guidance": 3.0,
    }  # fmt: skip
    assert _columns_of(table, 3) == {
        "seeds": 0, "candidates": 0, "positions": 6, "top_k": 0, "unconditional": 3, "source": 2, "prefixes": 1,
        "filters": 0, "temperature": 0.0, "top_p": 1.0, "guidance": 1.0,
    }  # fmt: skip


def test_idle_slots_filter_and_guide_nothing() -> None:
    table = _table()
    table.set_sequence(1, SequenceRequest(0, SamplingParams(seed=3)), prefix_entry=2, unconditional_slot=None)
    table.upload()
    table.set_idle(1)
    table.upload()
    for slot in range(5):
        assert _columns_of(table, slot) == {
            "seeds": 0, "candidates": 0, "positions": 9, "top_k": 0, "unconditional": slot, "source": slot, "prefixes": 0,
            "filters": 0, "temperature": 0.0, "top_p": 1.0, "guidance": 1.0,
        }  # fmt: skip


def test_columns_keep_their_address() -> None:
    table = _table()
    addresses = [getattr(table, name).data_ptr() for name in COLUMNS]
    table.set_sequence(0, SequenceRequest(0, SamplingParams(seed=3)), prefix_entry=2, unconditional_slot=None)
    table.upload()
    assert [getattr(table, name).data_ptr() for name in COLUMNS] == addresses
