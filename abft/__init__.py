"""Matrix products that carry the evidence that they are right, and repair themselves.

In a checkout the Triton kernels lie beside this package, in ``triton_kernels/``; installed, inside it. Both are
``abft.triton_kernels``: the top-level name belongs to the Triton project.
"""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"

from abft import inject, policies, prediction
from abft.attend import scaled_dot_product_attention
from abft.calibrating import calibrate
from abft.calibration import Calibration
from abft.covering import Coverage, ModuleCoverage, coverage
from abft.errors import (
    AbftError,
    CalibrationError,
    DeviceError,
    DtypeError,
    FaultDetected,
    NotInjected,
    PolicyError,
    ShapeError,
    UncorrectedFault,
)
from abft.events import FaultEvent
from abft.functional import addmm, bmm, int_mm, linear, matmul
from abft.guarding import checkpoint_context, checkpoint_ops, context, protected
from abft.ledger import Verdict
from abft.nn import Linear, MultiheadAttention
from abft.ops import flops as _flops  # noqa: F401  (registers the formula)
from abft.paging import PagedCache, paged_attention
from abft.pending import flush as verify_deferred
from abft.policy import Policy
from abft.protection import protect, refresh, restore, unprotect
from abft.reporting import Report, report
from abft.statistics.peers import Peers
from abft.statistics.watches import Alarm, SiteStatistics
from abft.training import StepGuard
from abft.varlen import varlen_attention
from abft.verification import CheckResult, verify_attention, verify_matmul
from abft.watching import watch

__all__ = [
    "AbftError",
    "Alarm",
    "Calibration",
    "CalibrationError",
    "CheckResult",
    "Coverage",
    "DeviceError",
    "DtypeError",
    "FaultDetected",
    "FaultEvent",
    "Linear",
    "ModuleCoverage",
    "MultiheadAttention",
    "NotInjected",
    "PagedCache",
    "Peers",
    "Policy",
    "PolicyError",
    "Report",
    "ShapeError",
    "SiteStatistics",
    "StepGuard",
    "UncorrectedFault",
    "Verdict",
    "addmm",
    "bmm",
    "calibrate",
    "checkpoint_context",
    "checkpoint_ops",
    "context",
    "coverage",
    "inject",
    "int_mm",
    "linear",
    "matmul",
    "paged_attention",
    "policies",
    "prediction",
    "protect",
    "protected",
    "refresh",
    "report",
    "restore",
    "scaled_dot_product_attention",
    "unprotect",
    "varlen_attention",
    "verify_attention",
    "verify_deferred",
    "verify_matmul",
    "watch",
]
