"""Every error this library raises on purpose: what was expected, what came, what to do."""

from __future__ import annotations


class AbftError(RuntimeError):
    """Base of all errors raised by abft."""


class FaultDetected(AbftError):
    """A result is wrong, and the policy said to stop for it."""


class UncorrectedFault(FaultDetected):
    """A result is wrong and could not be repaired on the device."""


class NotInjected(AbftError):
    """A fault specification left its scope without ever having fired."""


class ShapeError(AbftError, ValueError):
    """Operand shapes do not form a matrix product."""


class DtypeError(AbftError, TypeError):
    """Operand dtypes do not form a matrix product that torch would compute."""


class DeviceError(AbftError):
    """Operands lie on different devices, or the requested backend does not run on this one."""


class PolicyError(AbftError, ValueError):
    """A policy that cannot be met: an unknown value, or a floor that no backend reaches here."""


class CalibrationError(AbftError, ValueError):
    """A calibration that cannot be read, made, or used here: another model, dtype or device."""
