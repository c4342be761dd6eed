"""doctor: what this machine has, what is in force, and what serves here. Every probe reports trouble, none crashes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from portable_mla.cli import explain
from portable_mla.cli.packages import PACKAGES, own_versions
from portable_mla.cli.report import Section
from portable_mla.core.arch import ARCHS, Arch, Vendor
from portable_mla.core.device import LocalDevice, local_devices, runtime
from portable_mla.dispatch.interface import Backend, LibraryBackend
from portable_mla.dispatch.registry import BACKENDS, ORDER
from portable_mla.dispatch.select import load
from portable_mla.models import MODELS
from portable_mla.runtime.packages import state_of
from portable_mla.settings import VARIABLES, Settings

SERVED_MODEL = "DeepSeek-V3 TP8 decode"


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor found, in the order in which it is shown."""

    versions: dict[str, str]
    packages: dict[str, str]
    runtime: str
    devices: tuple[LocalDevice, ...]
    backends: dict[str, str]
    settings: dict[str, str]
    settings_error: str | None
    serving: dict[str, dict[str, object]]

    @property
    def served(self) -> bool:
        """Whether some device of this machine is served."""
        return any(answer.get("chosen") for answer in self.serving.values())

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "versions": self.versions,
            "packages": self.packages,
            "runtime": self.runtime,
            "devices": [_device_values(device) for device in self.devices],
            "backends": self.backends,
            "settings": self.settings,
            "settings_error": self.settings_error,
            "serving": self.serving,
            "served": self.served,
            "models_not_served": _models_not_served(),
        }

    def sections(self) -> tuple[Section, ...]:
        """What a person reads."""
        settings = self.settings if self.settings_error is None else {"invalid": self.settings_error}
        devices = tuple(_device_cells(device) for device in self.devices)
        return (
            _pairs("Versions", ("name", "version"), self.versions),
            _pairs("Packages", ("package", "state"), self.packages),
            _pairs("Runtime", ("name", "value"), {"torch was built for": self.runtime}),
            Section("Devices", ("device", "product", "architecture", "units", "shared memory", "wave"), devices),
            _pairs("Backends", ("backend", "state"), self.backends),
            _pairs("Settings", ("variable", "value"), settings),
            *(_serving_section(device, answer) for device, answer in self.serving.items()),
            _pairs("Models whose own attention is not served", ("model", "reason"), _models_not_served()),
        )


def diagnose() -> Diagnosis:
    """Examine this machine."""
    settings, error = _settings()
    devices = local_devices()
    return Diagnosis(
        versions=own_versions(),
        packages={package.name: str(state_of(package)) for package in PACKAGES},
        runtime=runtime(),
        devices=devices,
        backends={name: _backend_state(name) for name in BACKENDS},
        settings={name: _in_force(name) for name in VARIABLES},
        settings_error=error,
        serving={d.device: _serving(d.arch, settings, error) for d in devices if d.arch is not None},
    )


def _settings() -> tuple[Settings, str | None]:
    try:
        return Settings.from_env(), None
    except ValueError as error:
        return Settings(), str(error)


def _in_force(name: str) -> str:
    return os.environ[name] if name in os.environ else f"{VARIABLES[name].default} (default)"


def _backend_state(name: str) -> str:
    vendors: set[Vendor] = {ARCHS[arch].vendor for arch, order in ORDER.items() if name in order} or {"cpu"}
    try:
        reasons = dict.fromkeys(reason for vendor in vendors for reason in _reasons_not_here(load(name, vendor)))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the doctor names a broken module, whatever it raises)
        return f"broken: {type(error).__name__}: {error}"
    return f"unavailable: {'; '.join(reasons)}" if reasons else "available"


def _reasons_not_here(backend: Backend) -> tuple[str, ...]:
    """Why this machine's software cannot run a backend; a vendor library is imported to find out."""
    reasons = backend.reasons_unavailable()
    return backend.reasons_not_loadable() if not reasons and isinstance(backend, LibraryBackend) else reasons


def _serving(arch: Arch, settings: Settings, settings_error: str | None) -> dict[str, object]:
    """What serves one device, or the error that every call would raise."""
    if settings_error is not None:
        return {"chosen": None, "error": settings_error}
    try:
        return explain.as_json(explain.answer(explain.Question().request_for(arch), settings))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a broken backend breaks dispatch, and this reports it)
        return {"chosen": None, "error": f"{type(error).__name__}: {error}"}


def _serving_section(device: str, answer: dict[str, object]) -> Section:
    title = f"What serves {SERVED_MODEL} on {device}"
    if "error" in answer:
        return Section(title, ("backend", "verdict"), (("none", f"broken: {answer['error']}"),))
    candidates = answer["candidates"]
    assert isinstance(candidates, list)
    return Section(title, ("backend", "verdict"), tuple((c["backend"], c["verdict"]) for c in candidates))


def _models_not_served() -> dict[str, str]:
    return {name: why for name, model in MODELS.items() if (why := model.why_not_served) is not None}


def _pairs(title: str, columns: tuple[str, str], pairs: dict[str, str]) -> Section:
    return Section(title, columns, tuple(pairs.items()))


def _device_cells(device: LocalDevice) -> tuple[str, ...]:
    arch = device.arch
    if arch is None:
        return (device.device, device.product, f"refused: {device.refusal}", "", "", "")
    shared_memory = f"{arch.shared_memory} bytes" if arch.shared_memory else ""
    return (device.device, device.product, arch.name, str(arch.units), shared_memory, str(arch.wave))


def _device_values(device: LocalDevice) -> dict[str, object]:
    values: dict[str, object] = {"device": device.device, "product": device.product}
    if device.arch is None:
        return values | {"arch": None, "refusal": device.refusal}
    arch = device.arch
    return values | {
        "arch": arch.name,
        "vendor": arch.vendor,
        "units": arch.units,
        "shared_memory": arch.shared_memory,
        "wave": arch.wave,
    }
