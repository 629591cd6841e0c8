"""timm, and what else imports torchvision, imported also where torchvision lacks its C++ operators.

timm imports torchvision, and PyPI's torchvision does not import beside a CPU-only torch: its Python code registers
details of operators that only its C++ library defines. Naming these operators first is enough; none of them runs.
"""

import importlib
import importlib.util
from types import ModuleType

import torch

from histoscale.errors import ExportError

_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "deform_conv2d",
    "_roi_align_backward",
    "_roi_pool_backward",
    "_ps_roi_align_backward",
    "_ps_roi_pool_backward",
    "_deform_conv2d_backward",
)
# torch forgets a definition when its library object is collected.
_libraries: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """The `timm` package.

    Raises:
        ExportError: timm is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise ExportError(
            "timm is not installed", expected="timm 1.0.15 or newer", remedy="run pip install 'timm>=1.0.15'"
        )
    name_operators_of_torchvision()
    return importlib.import_module("timm")


def name_operators_of_torchvision() -> None:
    """Make torchvision importable, where it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _name_operators()


def _name_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor input) -> Tensor")  # type: ignore[no-untyped-call]
    _libraries.append(library)
