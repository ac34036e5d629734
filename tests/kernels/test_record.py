"""Numbers that device code repeats because it may not import them."""

from abft.triton_kernels import arbitration, judgement, panel, record, summary, tiles

from abft import checksum, faults, floating, ledger
from abft.backends import arbitration as on_the_host
from abft.backends import triton as backend


def test_device_code_and_ledger_agree():
    for name in ("HEADER", "HEAD", "STEP", "COUNTERS", "RING", "RECORD"):
        assert getattr(record, name).value == getattr(ledger, name), name
    counters = {"CHECKS": "checks", "PRODUCTS": "products", "EXECUTIONS": "executions", "REPEATED": "repeated_checks", "WORST": "worst"}
    for device, host in counters.items():
        assert getattr(record, device).value == ledger.COUNTER[host]
    assert ledger.VERDICTS[record.VERDICTS.value :] == (ledger.Verdict.TOLERATED,)  # which only hosts give
    for v, verdict in enumerate(ledger.VERDICTS[: record.VERDICTS.value]):
        assert record.FIRST_VERDICT.value + v == ledger.COUNTER[ledger.COUNTER_OF[verdict]]
        if hasattr(record, verdict.name):
            assert getattr(record, verdict.name).value == v
    assert record.STALE_WEIGHT.value == ledger.VERDICTS.index(ledger.Verdict.STALE)
    assert record.WEIGHT_FAULTS.value == ledger.COUNTER["weight_faults"]
    causes = (record.TRANSIENT, record.PERSISTENT, record.BY_WEIGHT, record.BY_PANEL)
    assert tuple(c.value for c in causes) == tuple(map(ledger.CAUSES.index, ("transient", "persistent", "weight", "panel")))
    order = "sequence site role verdict cause rows row col residual bound m n k dtype backend step element_row element_col unit repaired_on"
    assert list(ledger.RECORD_NAMES) == order.split()


def test_the_summary_has_room():
    assert summary.KEYS.value >= summary.ROWS.value + record.VERDICTS.value
    assert summary.CLAIMED.value >= summary.KEYS.value + record.VERDICTS.value
    assert summary.SUMMARY.value > summary.TAKEN.value and summary.CASE.value > summary.DIGEST.value


def test_a_memory_fault_is_as_large_here_as_on_the_host():
    assert (arbitration.FRAGMENT_ROWS.value, arbitration.FRAGMENT_COLUMNS.value) == (on_the_host.FRAGMENT_ROWS, on_the_host.FRAGMENT_COLUMNS)
    assert tiles.PATCHED.value >= on_the_host.FRAGMENT_ROWS * on_the_host.FRAGMENT_COLUMNS


def test_panels_and_places_agree():
    assert judgement.SKETCHES.value == checksum.SKETCHES
    assert panel.TARGET_EXPONENT.value == floating.FP16_TARGET_EXPONENT
    places = tuple(backend.KERNEL_PLACES)
    for device, host in ((tiles.ACCUMULATOR, "accumulator"), (tiles.OPERAND, "operand"), (tiles.OUTPUT, "output"), (tiles.CHECKSUM, "checksum")):
        assert places[device.value] == host
    assert set(places) < set(faults.PLACES)
