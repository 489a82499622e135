"""Lets vLLM's V2 model runner run on a CPU: its Triton kernels in Triton's interpreter (`TRITON_INTERPRET=1`).

vLLM takes V2 on CPUs only where Triton has a CPU backend, which no package index has; the interpreter needs none, so its name is
enough; `torch.compile` would ask it for more, and is off. On PYTHONPATH for the second half of `make test-vllm`, in every process
of the engine.
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


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver)

# The interpreter refuses masks of integers, which Triton's compilers take.
_masked_load = triton.runtime.interpreter.InterpreterBuilder.create_masked_load


def _load(self, ptrs, mask, other, cache_policy, is_volatile):  # type: ignore[no-untyped-def]
    mask.data = mask.data.astype(bool)
    return _masked_load(self, ptrs, mask, other, cache_policy, is_volatile)


triton.runtime.interpreter.InterpreterBuilder.create_masked_load = _load
