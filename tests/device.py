"""A device that is not there: tensors that say they are elsewhere, hold no float64, and are computed on the CPU.

Tensors of the two sides do not mix, as on a real device, and one of float64 cannot be made, as on Apple silicon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from safesteer.models import LoadedModel

DEVICE = torch.device("privateuseone", 0)
ABSENT = {torch.float64, torch.complex128}
aten = torch.ops.aten
# What may take tensors of both sides: copies, and indices.
CROSSING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
}


class Away(torch.Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # which would call everything that comes of one so

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Away:
        if inner.dtype in ABSENT:
            raise TypeError(f"the device has no {inner.dtype}; use float32")
        with torch.inference_mode(False):
            made: Away = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=DEVICE,
            )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Away({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __deepcopy__(self, memory: Any) -> Away:
        return Away(self.inner.clone())

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return run(function, arguments, keywords or {})


def run(function: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    """An operation, on the side where its tensors are or that it names."""
    away: dict[int, Away] = {}  # by what they hold, for operations in place
    here = named = False
    there = False

    def on_cpu(one: Any) -> Any:
        nonlocal here, named, there
        if isinstance(one, Away):
            away[id(one.inner)] = one
            return one.inner
        if isinstance(one, torch.Tensor):
            here |= one.dim() > 0
        elif isinstance(one, list | tuple):
            return type(one)(map(on_cpu, one))
        elif isinstance(one, torch.device):
            named, there = True, one.type == DEVICE.type
            return torch.device("cpu")
        return one

    def back(one: Any) -> Any:
        if isinstance(one, torch.Tensor):
            return away[id(one)] if id(one) in away else Away(one)
        return type(one)(map(back, one)) if isinstance(one, list | tuple) else one

    given = [on_cpu(one) for one in arguments], {name: on_cpu(one) for name, one in keywords.items()}
    if away and here and function not in CROSSING:
        raise RuntimeError(f"{function}: tensors are expected on one device, but some are on the CPU")
    result = function(*given[0], **given[1])
    return back(result) if there or (away and not named) else result


class _NoDevices(_DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(backend_module=_NoDevices(), hook=_Hook())
# `torch.tensor` and the like pass modes by.
LIBRARY = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, **keywords: Any) -> torch.Tensor:
    return run(aten.empty_strided.default, (size, stride), {**keywords, "device": DEVICE})


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return run(aten.copy_.default, (target, source), {})


LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


class Device(TorchDispatchMode):
    """Within it, tensors can be made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return run(function, arguments, keywords or {})


class Generator(torch.Generator):
    """One for the device, which draws on the CPU."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls)


def moved(loaded: LoadedModel) -> LoadedModel:
    """The model, on the device."""
    loaded.model.set_attn_implementation("eager")
    for module in loaded.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(Away(parameter.detach()), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = Away(buffer)
    return LoadedModel.wrap(loaded.model, loaded.tokenizer, loaded.name)
