"""Lets vLLM's V2 model runner run on a CPU: its Triton kernels in Triton's interpreter (`TRITON_INTERPRET=1`).

vLLM takes V2 on CPUs only where Triton has a CPU backend, which no package index has; the interpreter needs none, so its name is
enough. On PYTHONPATH for the second half of `make test-vllm`, in every process of the engine.
"""

import types

import triton.backends

_driver = types.SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_driver)
