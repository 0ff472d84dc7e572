"""How an operation becomes an operator of PyTorch.

An operator is a schema with three functions: `compute` calls the library on real tensors, `fake` says what it would
return (for torch.compile and the like), `backward` gives its gradient. They are registered from Python, with no
compiled part: an extension in C++ would tie a wheel to one release of PyTorch, and saves little, since most of a
call's time is PyTorch's dispatcher, which `direct` goes around where it has nothing to do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("metalloid", "DEF")

# An operator takes any strides, so that Inductor need not keep those that it saw while tracing.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_PLAIN = (Tensor, torch.nn.Parameter)


def define(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    updates: tuple[str, ...] = (),
    backends: tuple[str, ...] = ("CPU", "CUDA"),
) -> Any:
    """Registers torch.ops.metalloid.<name> and returns it. It writes the tensors `updates`; without `backward` it
    refuses to be differentiated."""
    library.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]
    operator = getattr(torch.ops.metalloid, name).default
    for backend in backends:
        library.impl(name, compute, backend)
    torch.library.register_fake(f"metalloid::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(f"metalloid::{name}", backward, setup_context=setup_context, lib=library)
        return operator

    # Without this PyTorch would return results that have no gradient, in silence.
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        tensors = [a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise NotImplementedError(f"torch.ops.metalloid.{name} cannot be differentiated")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments, **keywords)

    library.impl(name, refuse, "Autograd")
    if updates:
        names = [argument.name for argument in operator._schema.arguments]

        def count(keys: Any, *arguments: Any, **keywords: Any) -> Any:
            given = {**dict(zip(names, arguments, strict=False)), **keywords}
            torch.autograd.graph.increment_version([given[name] for name in updates])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments, **keywords)

        library.impl(name, count, "ADInplaceOrView", with_keyset=True)
    return operator


def lower_precision(operator: Any, *arguments: str, **like: str) -> None:
    """Under torch.autocast the floating tensors `arguments` come in its dtype, those named in `like` in that of
    another one."""
    name = operator.name().partition("::")[2]
    places = {argument.name: place for place, argument in enumerate(operator._schema.arguments)}

    def cast(value: Any, dtype: torch.dtype) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*given: Any, device: str = device, keys: Any = keys, **named: Any) -> Any:
            dtype, values = torch.get_autocast_dtype(device), list(given)
            for argument in (*arguments, *like):
                place = places[argument]
                holder: Any = values if place < len(values) else named
                at = place if place < len(values) else argument
                if holder is named and argument not in named:
                    continue
                model = like.get(argument)
                wanted = (
                    dtype
                    if model is None
                    else (values[places[model]] if places[model] < len(values) else named[model]).dtype
                )
                holder[at] = cast(holder[at], wanted)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(*values, **named)

        library.impl(name, kernel, key)


def direct(*tensors: Tensor | None) -> bool:
    """Whether a call may go straight to the library: plain tensors of a device it serves, no gradient to record, and
    no mode,
    transform, tracer, profiler or autocast that wants to see it."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or (recording and tensor.requires_grad):
            return False
        if not (tensor.is_cpu or tensor.is_cuda):
            return False
    return True


def promote(first: torch.dtype, *others: Tensor | None) -> torch.dtype:
    for other in others:
        if other is not None:
            first = torch.promote_types(first, other.dtype)
    return first


def wide(*tensors: Tensor | None) -> torch.dtype:
    """What a gradient is computed in."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def widen(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of what it is the gradient of."""
    return None if gradient is None or tensor is None else gradient.to(tensor.dtype)


def needs_gradient(ctx: Any, place: int) -> bool:
    """Of an argument; the dispatcher leaves out those that stand at the end and are the default."""
    return place < len(ctx.needs_input_grad) and ctx.needs_input_grad[place]
