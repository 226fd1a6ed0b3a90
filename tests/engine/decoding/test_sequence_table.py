"""The table of rows: what the host sets is what the device reads, as the sampling kernels take it."""

import torch

from engine.decoding.cuda.sequence_table import SequenceTable
from engine.sampling_params import SamplingParams, SequenceRequest

COLUMNS = ("seeds", "candidates", "positions", "top_k", "partner", "source", "captions", "filters")


def _table(num_slots: int = 5) -> SequenceTable:
    return SequenceTable(num_slots, parked=9, device=torch.device("cpu"))


def _row(table: SequenceTable, slot: int) -> dict[str, float]:
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


def test_a_seated_row_arrives_with_the_upload() -> None:
    table = _table()
    parked = _row(table, 2)
    options = SamplingParams(temperature=0.75, top_k=12, top_p=0.5, guidance_scale=3.0)
    table.seat(
        2, SequenceRequest(0, options.updated(seed=2**63 + 5), candidate=2**32 - 1), caption=4, partner=3, filters=True
    )
    table.seat_partner(3, drawn=2, caption=1)
    table.place(2, 6)
    table.place(3, 6)
    assert _row(table, 2) == parked
    table.upload()
    assert _row(table, 2) == {
        "seeds": 5 - 2**63, "candidates": 2**32 - 1, "positions": 6, "top_k": 12, "partner": 3, "source": 2,
        "captions": 4, "filters": 1, "temperature": 0.75, "top_p": 0.5, "guidance": 3.0,
    }  # fmt: skip
    assert _row(table, 3) == {
        "seeds": 0, "candidates": 0, "positions": 6, "top_k": 0, "partner": 3, "source": 2, "captions": 1,
        "filters": 0, "temperature": 0.0, "top_p": 1.0, "guidance": 1.0,
    }  # fmt: skip


def test_parked_slots_ask_for_nothing() -> None:
    table = _table()
    table.seat(1, SequenceRequest(0, SamplingParams(seed=3)), caption=2, partner=None, filters=False)
    table.upload()
    table.park(1)
    table.upload()
    for slot in range(5):
        assert _row(table, slot) == {
            "seeds": 0, "candidates": 0, "positions": 9, "top_k": 0, "partner": slot, "source": slot, "captions": 0,
            "filters": 0, "temperature": 0.0, "top_p": 1.0, "guidance": 1.0,
        }  # fmt: skip


def test_columns_keep_their_address() -> None:
    table = _table()
    addresses = [getattr(table, name).data_ptr() for name in COLUMNS]
    table.seat(0, SequenceRequest(0, SamplingParams(seed=3)), caption=2, partner=None, filters=False)
    table.upload()
    assert [getattr(table, name).data_ptr() for name in COLUMNS] == addresses
