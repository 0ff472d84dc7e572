"""How an operation becomes an operator of PyTorch.

An operator is a schema with three functions: `compute` calls the library on real tensors, `fake` says what it would
return (for torch.compile and the like), `backward` gives its gradient. All are registered from Python, with no compiled
part: an extension in C++ would tie a wheel to a release of PyTorch, or a user to a compiler, and saves little, since
most of a call's time is PyTorch's dispatcher, which a call goes around where it has nothing to do there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

library = torch.library.Library("metalloid", "DEF")

# An operator takes any strides, so that Inductor need not keep those that it saw while tracing.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_PLAIN = (Tensor, torch.nn.Parameter)


# What _nothing_watches asks is not public; a release without it gets every call through the dispatcher.
_KNOWN = hasattr(_functorch, "peek_interpreter_stack") and all(
    hasattr(torch._C, name)
    for name in (
        "_len_torch_dispatch_stack",
        "_is_torch_function_mode_enabled",
        "_is_any_autocast_enabled",
        "_get_tracing_state",
    )
)


class Operator:
    """torch.ops.metalloid.<name>, called in the shortest way that PyTorch would not notice."""

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.name = name
        self.compute = compute
        self.overload = getattr(torch.ops.metalloid, name).default
        self.recorded: Callable[..., Any] | None = None  # compute, as a torch.autograd.Function
        self.transformed: Callable[..., Any] | None = None  # the overload, as one that torch.func knows

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _KNOWN:
            return self.overload(*arguments)
        if _nothing_watches():
            plain, recorded = True, False
            for argument in arguments:
                if type(argument) in _PLAIN:
                    plain = plain and (argument.is_cpu or argument.is_cuda)
                    recorded = recorded or argument.requires_grad
                elif isinstance(argument, Tensor):
                    plain = False
            if plain and not (recorded and torch.is_grad_enabled()):
                return self.compute(*arguments)
            if plain and self.recorded is not None:
                return self.recorded(*arguments)
        elif self.transformed is not None and _transforms():
            return self.transformed(*arguments)
        return self.overload(*arguments)


def _transforms() -> bool:
    """Whether torch.func's vmap, grad or another is at work."""
    return _functorch.peek_interpreter_stack() is not None


def _nothing_watches() -> bool:
    """No mode, transform, tracer, profiler or autocast that wants to see a call."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or _transforms()
        or torch._C._get_tracing_state() is not None
        or getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
    )


def define(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    updates: tuple[str, ...] = (),
    backends: tuple[str, ...] = ("CPU", "CUDA"),
) -> Operator:
    """Registers torch.ops.metalloid.<name>. It writes the tensors `updates`. Without `backward` going back through it
    is an error, and where it writes tensors so is a call that records a gradient."""
    library.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]
    compute = _without_tangents(name, compute)
    operator = Operator(name, compute)
    for backend in backends:
        library.impl(name, compute, backend)
    torch.library.register_fake(f"metalloid::{name}", _of_one_kind(operator, fake), lib=library)
    if updates:
        _refuse_gradients(operator)
        _count_writes(operator, updates)
        return operator
    if backward is None:
        backward = _refusal(operator)
    _register_autograd(operator, backward, setup_context)
    operator.recorded = _recorded(name, compute, setup_context, backward)
    operator.transformed = _transformed(operator, setup_context, backward)
    return operator


def _of_one_kind(operator: Operator, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` is also what PyTorch calls where one tensor of several is on the meta device: real results of its would be
    memory that nobody has written."""

    def faked(*arguments: Any, **keywords: Any) -> Any:
        names = [argument.name for argument in operator.overload._schema.arguments]
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        meta = [key for key, value in tensors.items() if value.is_meta]
        if meta and len(meta) < len(tensors):
            raise ValueError(f"{operator.name}: {meta[0]} is on the device meta, other tensors are not")
        return fake(*arguments, **keywords)

    return faked


def _refuse_tangents(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Forward-mode differentiation: PyTorch would go on with tangents of zero, in silence."""
    if forward_ad._current_level < 0:
        return
    for a in (*arguments, *keywords.values()):
        if isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(f"torch.ops.metalloid.{name} has no forward-mode derivative")


def _without_tangents(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*arguments: Any, **keywords: Any) -> Any:
        _refuse_tangents(name, arguments, keywords)
        return compute(*arguments, **keywords)

    return computed


def _register_autograd(
    operator: Operator, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> None:
    """torch.library.register_autograd, and a refusal of the tangents of torch.func.jvp, which are gone further down."""
    try:
        from torch._library.autograd import Info, make_autograd_impl
    except ImportError:  # not public
        name = f"metalloid::{operator.name}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        return
    kernel = make_autograd_impl(operator.overload, Info(backward, setup_context))

    def guarded(keys: Any, *arguments: Any, **keywords: Any) -> Any:
        _refuse_tangents(operator.name, arguments, keywords)
        return kernel(keys, *arguments, **keywords)

    library.impl(operator.name, guarded, "Autograd", with_keyset=True)


def _refusal(operator: Operator) -> Callable[..., Any]:
    """Where PyTorch would return results that have no gradient, in silence."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"torch.ops.metalloid.{operator.name} cannot be differentiated")

    return backward


def _recorded(
    name: str, compute: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(ctx: Any, *arguments: Any) -> Any:  # with a setup_context of its own it would take twice the time
        result = compute(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, result)
        return result

    return _function(name, forward=forward, backward=backward)


def _transformed(
    operator: Operator, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*arguments: Any) -> Any:
        return operator.overload(*arguments)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return _function(operator.name, forward=forward, setup_context=keep, backward=backward, generate_vmap_rule=True)


def _function(name: str, **members: Any) -> Callable[..., Any]:
    members = {key: staticmethod(member) if callable(member) else member for key, member in members.items()}
    return type(name, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def _refuse_gradients(operator: Operator) -> None:
    """The call itself is refused, since what it writes would lose its gradient."""

    def kernel(*arguments: Any, **keywords: Any) -> Any:
        tensors = [a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise NotImplementedError(f"torch.ops.metalloid.{operator.name} cannot be differentiated")
        with torch._C._AutoDispatchBelowAutograd():
            return operator.overload(*arguments, **keywords)

    library.impl(operator.name, kernel, "Autograd")


def _count_writes(operator: Operator, updates: tuple[str, ...]) -> None:
    """By which autograd notices that a tensor which it has saved was written."""
    overload = operator.overload
    names = [argument.name for argument in overload._schema.arguments]
    compute = operator.compute

    def computed(*arguments: Any) -> Any:
        result = compute(*arguments)
        torch.autograd.graph.increment_version([arguments[names.index(name)] for name in updates])
        return result

    def count(keys: Any, *arguments: Any, **keywords: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        torch.autograd.graph.increment_version([given[name] for name in updates])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments, **keywords)

    operator.compute = computed
    library.impl(operator.name, count, "ADInplaceOrView", with_keyset=True)


def lower_precision(operator: Operator, *arguments: str, **like: str) -> None:
    """Under torch.autocast the floating tensors `arguments` come in its dtype, those named in `like` in that of
    another one."""
    places = {argument.name: place for place, argument in enumerate(operator.overload._schema.arguments)}

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
                return operator.overload(*values, **named)

        library.impl(operator.name, kernel, key)


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
