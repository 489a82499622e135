"""Lets vLLM's offloading connectors run without a GPU: streams and events of nothing, and copies by the CPU.

Both connectors copy blocks by lists of addresses and sizes; here `memmove` does, at once and in order. All else of them is
vLLM's: keys, lookups, evictions, jobs. A worker that takes its extension from this file (`worker_extension_cls`) imports it
before its caches are made, and is patched by that; nothing else may import it.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.cpu import gpu_worker
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.simple_kv_offload import cuda_mem_ops


class _Stream:
    """Work that is done when it is given."""

    cuda_stream = 0

    def __init__(self, priority: int = 0) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    """Something that has happened."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _move(targets: Any, sources: Any, sizes: Any) -> None:
    for target, source, size in zip(targets, sources, sizes, strict=True):
        ctypes.memmove(int(target), int(source), int(size))


def _swap_blocks_batch(sources: Any, targets: Any, sizes: Any, is_src_access_order_any: bool = False) -> None:
    _move(targets.tolist(), sources.tolist(), sizes.tolist())


def _batch_memcpy(targets: int, sources: int, sizes: int, count: int, *rest: Any) -> int:
    _move(*((ctypes.c_uint64 * count).from_address(at) for at in (targets, sources, sizes)))
    return 0


class _Claimed(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def _claiming(original: Any) -> Any:
    def begin(self: Any, *, gpu_tensors: Any, **keywords: Any) -> None:
        original(self, gpu_tensors=[one.as_subclass(_Claimed) for one in gpu_tensors], **keywords)

    return begin


class Extension:
    """Nothing more for the worker to answer."""


torch.Event = _Event  # type: ignore[misc,assignment]
torch.cuda.Stream = _Stream  # type: ignore[misc,assignment]
torch.cuda.current_stream = _Stream  # type: ignore[assignment]
for name, stand_in in {
    "Stream": _Stream,
    "current_stream": lambda: _Stream(),
    "stream": lambda _: contextlib.nullcontext(),
    "set_device": lambda _: None,
}.items():
    setattr(type(current_platform), name, staticmethod(stand_in))
_Handler = gpu_worker.SingleDirectionOffloadingHandler
_Handler.__init__ = _claiming(_Handler.__init__)  # type: ignore[method-assign]
gpu_worker.ops.swap_blocks_batch = _swap_blocks_batch
CPUOffloadingSpec.get_worker = CPUOffloadingSpec.create_worker
cuda_mem_ops._resolve_batch_memcpy = lambda: (_batch_memcpy, 1)
