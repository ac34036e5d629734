"""Numbers that device code repeats because it may not import them."""

from abft import checksum, faults, floating, ledger
from abft.backends import triton as backend
from abft.triton_kernels import gemm, judgement, panel, record, tiles


def test_device_code_and_ledger_agree():
    for name in ("HEADER", "HEAD", "STEP", "COUNTERS", "RING", "RECORD"):
        assert getattr(record, name).value == getattr(ledger, name), name
    for device, host in (("CHECKS", "checks"), ("PRODUCTS", "products"), ("EXECUTIONS", "executions"), ("REPEATED", "repeated_checks"), ("WORST", "worst")):
        assert getattr(record, device).value == ledger.COUNTER[host]
    assert record.VERDICTS.value == len(ledger.VERDICTS)
    for v, verdict in enumerate(ledger.VERDICTS):
        assert record.FIRST_VERDICT.value + v == ledger.COUNTER[ledger.COUNTER_OF[verdict]]
        if hasattr(record, verdict.name):
            assert getattr(record, verdict.name).value == v
    assert (record.TRANSIENT.value, record.PERSISTENT.value) == (ledger.CAUSES.index("transient"), ledger.CAUSES.index("persistent"))
    order = ("sequence", "site", "role", "verdict", "cause", "rows", "row", "col", "residual", "bound", "m", "n", "k", "dtype", "backend", "step")
    assert tuple(ledger.RECORD_NAMES[: len(order)]) == order


def test_the_summary_has_room():
    assert record.KEYS.value >= record.ROWS.value + record.VERDICTS.value
    assert gemm.SUMMARY.value >= record.KEYS.value + record.VERDICTS.value


def test_panels_and_places_agree():
    assert judgement.SKETCHES.value == checksum.SKETCHES
    assert panel.TARGET_EXPONENT.value == floating.FP16_TARGET_EXPONENT
    places = tuple(backend.KERNEL_PLACES)
    assert [places.index(p) for p in ("accumulator", "operand", "output")] == [tiles.ACCUMULATOR.value, tiles.OPERAND.value, tiles.OUTPUT.value]
    assert set(places) < set(faults.PLACES)
