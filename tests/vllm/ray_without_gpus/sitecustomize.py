"""Lets vLLM's Ray executor run on a CPU: Ray is told of GPUs that are not there, and vLLM that a CPU is what Ray calls a GPU.

On PYTHONPATH of one test, in every process of Ray and the engine.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

PLATFORM = "vllm.platforms.cpu"


class _Finder(importlib.abc.MetaPathFinder):
    """Amends the platform when it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with one more thing to do."""
        if fullname != PLATFORM:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            load(module)
            module.CpuPlatform.ray_device_key = "GPU"
            module.CpuPlatform.device_control_id_to_physical_device_id = classmethod(lambda _, name: int(name))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
