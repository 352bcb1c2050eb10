"""vitx: an executable atlas of Vision Transformer explainability.

``vitx.load("attention-rollout")`` gives the method's ``explain(model, images, target=None)``.
Importing vitx imports no torch.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

_here = Path(__file__).resolve().parent
# The repository root in a checkout; the bundled copy of catalogue and snippets in a wheel.
ATLAS = _here / "_atlas" if (_here / "_atlas").is_dir() else _here.parents[1]


def cache_dir() -> Path:
    """Folder for converted weights and executed notebooks: ``$VITX_CACHE``, or ``~/.cache/vitx``."""
    return Path(os.environ.get("VITX_CACHE") or Path.home() / ".cache" / "vitx")


def load_module(id: str) -> ModuleType:
    """The snippet of catalogue entry ``id`` as a module. Raises ``catalog.UnknownId`` naming the nearest ids."""
    name = "vitx_snippet_" + id.replace("-", "_")
    if name not in sys.modules:
        from vitx import catalog

        path = catalog.snippet_path(id)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load(id: str) -> Callable:
    """``explain`` of catalogue entry ``id``: ``explain(model, images, target=None, **options)``."""
    return load_module(id).explain
