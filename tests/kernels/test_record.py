"""Numbers that device code repeats because it may not import them."""

from abft.triton_kernels import gemm, judgement, panel, record, tiles

from abft import checksum, faults, floating, ledger
from abft.backends import triton as backend


def test_device_code_and_ledger_agree():
    for name in ("HEADER", "HEAD", "STEP", "COUNTERS", "RING", "RECORD"):
        assert getattr(record, name).value == getattr(ledger, name), name
    counters = {"CHECKS": "checks", "PRODUCTS": "products", "EXECUTIONS": "executions", "REPEATED": "repeated_checks", "WORST": "worst"}
    for device, host in counters.items():
        assert getattr(record, device).value == ledger.COUNTER[host]
    assert record.VERDICTS.value == len(ledger.VERDICTS)
    for v, verdict in enumerate(ledger.VERDICTS):
        assert record.FIRST_VERDICT.value + v == ledger.COUNTER[ledger.COUNTER_OF[verdict]]
        if hasattr(record, verdict.name):
            assert getattr(record, verdict.name).value == v
    assert (record.TRANSIENT.value, record.PERSISTENT.value) == (ledger.CAUSES.index("transient"), ledger.CAUSES.index("persistent"))
    order = "sequence site role verdict cause rows row col residual bound m n k dtype backend step"
    assert list(ledger.RECORD_NAMES) == order.split()


def test_the_summary_has_room():
    assert record.KEYS.value >= record.ROWS.value + record.VERDICTS.value
    assert gemm.SUMMARY.value >= record.KEYS.value + record.VERDICTS.value


def test_panels_and_places_agree():
    assert judgement.SKETCHES.value == checksum.SKETCHES
    assert panel.TARGET_EXPONENT.value == floating.FP16_TARGET_EXPONENT
    places = tuple(backend.KERNEL_PLACES)
    for device, host in ((tiles.ACCUMULATOR, "accumulator"), (tiles.OPERAND, "operand"), (tiles.OUTPUT, "output")):
        assert places[device.value] == host
    assert set(places) < set(faults.PLACES)
