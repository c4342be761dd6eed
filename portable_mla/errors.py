"""The errors of this library that callers may want to tell apart; bad arguments are plain ValueError or TypeError."""

_WARM_UP = "Run plan(batch) and one call with these tensors before the capture"


class NoBackend(RuntimeError):
    """No backend can serve a request, or the device is not supported; the message lists every reason."""


class UnsupportedDevice(NoBackend):
    """The device, or the named architecture, is one this library has no kernels for."""


class BackendError(RuntimeError):
    """A vendor library failed in a call, or returned what its contract does not allow; its own error is the cause.

    Nothing is tried again: after an error on the device its memory cannot be trusted.
    """


class PlanMismatch(ValueError):
    """A call does not fit what was planned: names the field, the planned value and the one it got."""

    def __init__(self, field: str, planned: object, got: object, hint: str) -> None:
        super().__init__(f"{field}: planned {planned}, got {got}. {hint}")
        self.field, self.planned, self.got = field, planned, got


class CacheFull(RuntimeError):
    """The page pool has too few free pages; nothing was allocated."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"needs {needed} pages, {free} of {total} are free; free a request or build a larger cache")
        self.needed, self.free, self.total = needed, free, total


class GraphCaptureError(RuntimeError):
    """A CUDA or HIP graph capture asked for what a captured graph could not repeat; nothing was launched."""

    def __init__(self, why: str, *, hint: str = _WARM_UP) -> None:
        super().__init__(f"{why}. {hint}")
