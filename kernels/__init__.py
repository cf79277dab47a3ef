"""Device code and launchers; imported as ``stn_triton.kernels``, never on its own.

Importing this package imports no triton: ``dispatch``, and with it the modules that need it, are imported at
the first launch.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "dispatch":
        return importlib.import_module(".dispatch", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
