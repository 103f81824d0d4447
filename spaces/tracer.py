"""torch.fx's tracer, that knows one request: what hangs on its shape alone is decided by it.

The shape of a request is fixed, but for how many there are in one batch. So ``if x.shape[1] > 5``,
``assert``s, loops over steps and ``*x.shape`` are what they are for the example; what would be
another for several requests in one batch, or hangs on values, is refused as torch.fx refuses it.

What a shape hangs on runs on the meta device, which knows shapes alone: all that a segmentation
network makes of a batch took 14 GB. Where that cannot tell (a mask picks elements) it really runs.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

META = torch.device("meta")
# Of SHAPES, what would be another on the meta device.
PLACES = {"device", "is_cuda", "is_cpu", "is_mps", "get_device"}
# What says something of a tensor whatever values are in it: attributes and methods.
SHAPES = {
    "shape", "ndim", "dtype", "device", "is_cuda", "is_cpu", "is_mps", "layout", "requires_grad",
    "is_sparse", "is_quantized", "is_nested", "size", "dim", "ndimension", "numel", "nelement",
    "element_size", "is_floating_point", "is_complex", "stride", "is_contiguous", "get_device",
}  # fmt: skip

NEW = ("new_zeros", "new_ones", "new_full")  # of a tensor's type, from numbers


class Tracer(fx.Tracer):
    """requests: what the model's forward is given, for one request and for several in one batch.
    buffers: whether the model's buffers are noted where they are read, and not taken as they are.
    """

    def __init__(self, requests: Sequence[Sequence[Any]], buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self._requests = requests
        # What nodes give, for each of the requests: on the meta device, and really.
        self._known: dict[bool, dict[fx.Node, list[Any]]] = {True: {}, False: {}}
        self._of_shapes: set[fx.Node] = set()  # whose values hang on no tensor's values
        self._running = False  # on values, and not on what stands for them

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if _says_shape(node) or (
            node.op in ("call_function", "call_method")
            and node.all_input_nodes
            and self._of_shapes.issuperset(node.all_input_nodes)
        ):
            self._of_shapes.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        count = self.length(obj)
        if count is None:
            return super().iter(obj)
        parts: Any = obj
        return (parts[i] for i in range(count))

    def to_bool(self, obj: fx.Proxy) -> bool:
        found = self.constant(obj)
        return super().to_bool(obj) if found is None else bool(found)

    def length(self, obj: fx.Proxy) -> int | None:
        """How many parts ``obj`` has, if several requests in one batch have as many."""
        try:
            counts = {len(value) for value in self._values(obj.node)}
        except Exception:  # whatever the model says; it will say so again when it runs
            return None
        return counts.pop() if len(counts) == 1 else None

    def constant(self, obj: fx.Proxy) -> Any:
        """What ``obj`` is for every request, if that hangs on their shapes alone; else None."""
        if obj.node not in self._of_shapes:
            return None
        try:
            first, *others = self._values(obj.node)
        except Exception:  # as above
            return None
        return first if all(value == first for value in others) else None

    def made(self, asked: "_Attribute", args: Any, kwargs: Any) -> Tensor | None:
        """The tensor that ``asked``, one of NEW, makes, if it is the same for every request: a mask
        in which parts are then set."""
        try:
            args, kwargs = fx.node.map_aggregate((args, kwargs), self._certain)
            like = torch.empty(0, dtype=self._certain(asked.root.dtype))
            return getattr(like, asked.attr)(*args, **kwargs)  # type: ignore[no-any-return]
        except fx.proxy.TraceError:
            return None

    def _certain(self, value: Any) -> Any:
        if not isinstance(value, fx.Proxy):
            return value
        if (found := self.constant(value)) is None:
            raise fx.proxy.TraceError
        return found

    def _values(self, node: fx.Node) -> list[Any]:
        """What ``node`` gives, for each of the requests; of tensors only the shape is certain."""
        try:
            return self._worked_out(node, meta=True)
        except Exception:  # whatever meta tensors cannot do
            return self._worked_out(node, meta=False)

    def _worked_out(self, node: fx.Node, meta: bool) -> list[Any]:
        known, ahead = self._known[meta], [node]
        while ahead:  # a network may be deeper than Python's stack
            now = ahead[-1]
            unknown = [n for n in now.all_input_nodes if n not in known]
            ahead += unknown
            if not unknown:
                ahead.pop()
                if now not in known:
                    known[now] = [self._value(now, i, meta) for i in range(len(self._requests))]
        return known[node]

    def _value(self, node: fx.Node, request: int, meta: bool) -> Any:
        # What hangs on shapes alone is a number or made from numbers: it has its values on both.
        place = _on_meta if meta and node not in self._of_shapes else _own
        if node.op == "placeholder":
            holders = [n for n in self.graph.nodes if n.op == "placeholder"]
            return place(self._requests[request][holders.index(node)])
        if node.op == "get_attr":
            return place(self._attribute(str(node.target)))
        known = self._known[meta]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n][request])
        if place is _on_meta:
            args, kwargs = fx.node.map_aggregate((args, kwargs), _on_meta)
        elif meta and _says_shape(node) and _asked(node) in PLACES:
            args = (torch.empty(0), *args[1:])
        call: Any = node.target
        if node.op == "call_module":
            call = self._attribute(str(node.target))
            if place is _on_meta:
                weights = {**dict(call.named_parameters()), **dict(call.named_buffers())}
                weights = {name: _on_meta(tensor) for name, tensor in weights.items()}
                return self._run(functional_call, call, weights, args, kwargs)
        elif node.op == "call_method":
            call, args = getattr(args[0], str(node.target)), args[1:]
        result = self._run(call, *args, **kwargs)
        return _on_meta(result) if place is _on_meta else result

    def _attribute(self, name: str) -> Any:
        return self._run(operator.attrgetter(name), self.root)

    def _run(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        self._running = True
        try:
            with torch.no_grad():
                return call(*args, **kwargs)
        finally:
            self._running = False


def _says_shape(node: fx.Node) -> bool:
    """Whether ``node`` asks a value for its shape or its type."""
    if node.op not in ("call_function", "call_method"):
        return False
    return _asked(node) in SHAPES


def _asked(node: fx.Node) -> Any:
    """The name of the attribute, method or function that ``node`` reads or calls."""
    name = node.args[1] if node.target is getattr else node.target
    return getattr(name, "__name__", name)


def _on_meta(value: Any) -> Any:
    return value.detach().to(META) if isinstance(value, Tensor) else value


def _own(value: Any) -> Any:
    """A copy: what is changed in place must not be the user's."""
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Known(fx.Proxy):
    """A value of the trace that Python may ask for its number or its length."""

    tracer: Tracer

    def __getattr__(self, k: str) -> Any:
        asked = _Attribute(self, k)
        # As a number itself: it may be the key of a dict, in which its stand-in would not be found.
        known = self.tracer.constant(asked) if k == "ndim" else None
        return asked if known is None else known

    def __index__(self) -> int:
        return operator.index(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __len__(self) -> int:
        if (count := self.tracer.length(self)) is None:
            raise fx.proxy.TraceError("its length hangs on the number of requests")
        return count

    def _number(self) -> Any:
        if (found := self.tracer.constant(self)) is None:
            raise fx.proxy.TraceError("its value is known only when a request comes")
        return found


class _Proxy(_Known):
    """Any value but an attribute of another."""


class _Attribute(_Known, fx.proxy.Attribute):
    """An attribute of a value, noted once it is used."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.tracer.made(self, args, kwargs) if self.attr in NEW else None
        return super().__call__(*args, **kwargs) if made is None else made


PROXIES = (_Proxy, _Attribute)  # what stands for a tensor while a model is traced
