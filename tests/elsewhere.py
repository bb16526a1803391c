"""A device that is not there: tensors that say they lie on it, and refuse to meet those of the CPU.

What runs on a GPU must make, read and return its tensors on the right side. With this that is
checked on a machine without one: values are computed on the CPU, behind a wrapper whose device is
`ELSEWHERE`. As on a GPU, a CPU tensor may join an operation only where it is a single number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ELSEWHERE = torch.device("meta")  # the kind of device that torch lets one slice without a driver
CPU = torch.device("cpu")
COPIES = ("_to_copy", "copy_")
"""Operations that move tensors from one device to another."""


class Away(Tensor):
    """A tensor elsewhere."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Away:
        found: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device=ELSEWHERE, requires_grad=False,
        )  # fmt: skip
        found.inside = inside
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Away({self.inside!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        return dispatched(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it lasts, torch has one more device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, after checking where its tensors lie."""
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = any(isinstance(x, Away) for x in tensors)
    name = func.overloadpacket.__name__
    if away and name not in COPIES:
        strangers = [x for x in tensors if not isinstance(x, Away) and x.ndim]
        indexing = name.startswith(("index", "_index", "_unsafe_index"))
        if strangers and not (indexing and not any(isinstance(x, Away) for x in tensors[:1])):
            shapes = [tuple(x.shape) for x in strangers]
            raise AssertionError(f"{func} got tensors of the CPU {shapes} beside those elsewhere")
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == ELSEWHERE.type:
        kwargs = {**kwargs, "device": CPU}
    inner = tree_map(lambda x: x.inside if isinstance(x, Away) else x, (args, kwargs))
    result = func(*inner[0], **inner[1])
    goes_away = away if wanted is None else torch.device(wanted).type == ELSEWHERE.type
    if name == "copy_" or func._schema.is_mutable:
        known = {id(x.inside): x for x in tensors if isinstance(x, Away)}
        if not any(result is x for x in tensors):
            return tree_map(lambda x: known.get(id(x), x) if isinstance(x, Tensor) else x, result)
        return result
    if not goes_away:
        return result
    return tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, result)
