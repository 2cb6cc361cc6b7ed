"""Runs a folder's offline models on an Ascend NPU: through pyACL, or through ais_bench."""

from __future__ import annotations

import importlib
from typing import Any, Final, Literal

from trianglemix.runtime.backends import om_ais_bench
from trianglemix.runtime.backends.om_acl import AclDevice
from trianglemix.runtime.backends.om_ais_bench import AisBenchDevice
from trianglemix.runtime.backends.static_cache import StaticBackend, StaticDevice
from trianglemix.runtime.errors import MissingPackageError
from trianglemix.runtime.model_folder import ModelFolder

Interface = Literal["auto", "pyacl", "ais_bench"]
_ACL: Final = "acl"
_GET: Final = (
    "install CANN's toolkit (pyACL comes with it) and NPU driver (hiascend.com) and source its "
    "set_env.sh; or install the wheels aclruntime and ais_bench of the Ascend tools repository"
)


def open_om_backend(
    folder: ModelFolder, device_id: int = 0, interface: Interface = "auto"
) -> StaticBackend:
    """The folder's offline models on an NPU; see `StaticBackend`.

    "auto" takes pyACL where it is installed, because it keeps the cache on the device; else
    ais_bench, which carries the cache there and back in every call.

    Raises:
        MissingPackageError: what was asked for, or either of them, is not installed.
    """
    return StaticBackend(_open_device(folder, device_id, interface), folder.manifest)


def _open_device(folder: ModelFolder, device_id: int, interface: Interface) -> StaticDevice:
    reasons = []
    if interface != "ais_bench":
        try:
            return AclDevice(_import_acl(), folder, device_id)
        except ImportError as error:
            reasons.append(f"pyACL: {error}")
    if interface != "pyacl":
        try:
            module = importlib.import_module(om_ais_bench.MODULE)
            return AisBenchDevice(module, folder, device_id)
        except ImportError as error:
            reasons.append(f"ais_bench: {error}")
    wanted = {"auto": "pyACL or ais_bench", "pyacl": "pyACL", "ais_bench": "ais_bench"}[interface]
    raise MissingPackageError(
        f"the provider npu needs {wanted}, which is not usable here ({'; '.join(reasons)}); {_GET}"
    )


def _import_acl() -> Any:
    module = importlib.import_module(_ACL)
    if not hasattr(module, "mdl") or not hasattr(module, "rt"):
        raise ImportError(f"the module acl at {getattr(module, '__file__', '?')} is not CANN's")
    return module
