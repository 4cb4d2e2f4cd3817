"""Applies the patches when torchtitan is imported, whichever module imports it first.

Several of torchtitan's modules copy the device type at import, so on CPU it must be "cpu" by then. Nothing is imported
here until torchtitan is: what needs neither it nor torch (first_checks.py) starts at once.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _PatchingLoader(Loader):
    """Loads torchtitan with its own loader, and the patches around that."""

    def __init__(self, stock: Loader):
        self.stock = stock

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.stock.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from titan_attent.titan.patches.registry import patched_import  # imports torch

        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.stock  # resources and sources are read through it
        with patched_import():
            self.stock.exec_module(module)


class _PatchingFinder(MetaPathFinder):
    """Finds torchtitan where the other finders do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchtitan":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _PatchingLoader(spec.loader)
                return spec
        return None


def patch_at_import() -> None:
    """Apply the patches at the import of torchtitan; at once if it is imported already."""
    if "torchtitan" in sys.modules:
        from titan_attent.titan.patches.registry import apply_patches

        apply_patches()
    elif not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())
