"""Lets vLLM's V2 model runner run on a CPU: its Triton kernels in Triton's interpreter (`TRITON_INTERPRET=1`).

vLLM takes V2 on CPUs only where Triton has a CPU backend, which no package index has; the interpreter needs none, so its name is
enough, and for `torch.compile`, whose code for CPUs is C++, a hash. Small functions of vLLM's are not compiled, to save time: a
test that compiles sets `TORCHDYNAMO_DISABLE=0`. On PYTHONPATH for the second half of `make test-vllm`, in every process of the
engine.
"""

import os
import types

import triton.backends
import triton.runtime.interpreter

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class _Driver:
    """No device at all."""

    @staticmethod
    def is_active() -> bool:
        """Whether this is the machine's device."""
        return True

    @staticmethod
    def get_current_target() -> types.SimpleNamespace:
        """What would be compiled for."""
        return types.SimpleNamespace(backend="cpu")


class _Compiler:
    """A name in the keys of `torch.compile`'s caches."""

    def __init__(self, target: object) -> None:
        pass

    @staticmethod
    def supports_target(target: types.SimpleNamespace) -> bool:
        """Whether it compiles for that."""
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        """Its version."""
        return "interpreter"


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=_Compiler)

# The interpreter refuses masks of integers, which Triton's compilers take.
_masked_load = triton.runtime.interpreter.InterpreterBuilder.create_masked_load


def _load(self, ptrs, mask, other, cache_policy, is_volatile):  # type: ignore[no-untyped-def]
    mask.data = mask.data.astype(bool)
    return _masked_load(self, ptrs, mask, other, cache_policy, is_volatile)


triton.runtime.interpreter.InterpreterBuilder.create_masked_load = _load
