"""The package of the folder above, for versions of `kernels` that look in this one."""

import importlib.util
import json
import sys
from pathlib import Path

# Not resolved: in a download every file is a link to elsewhere.
_above = Path(__file__).parent.parent
_name = json.loads((_above / "metadata.json").read_text())["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _above / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    try:
        _spec.loader.exec_module(sys.modules[_name])
    except BaseException:
        del sys.modules[_name]
        raise

__all__ = sys.modules[_name].__all__
globals().update({name: getattr(sys.modules[_name], name) for name in __all__})
