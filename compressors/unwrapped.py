"""A user's module without what wraps it or its weights: the same function, ready to be traced."""

import copy
import re
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..spaces import BadInput

WRAPPERS: dict[type[nn.Module], str] = {  # by type the attribute that holds the module itself
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    OptimizedModule: "_orig_mod",  # what torch.compile gives
}

QUANTIZED = re.compile(r"torch\.ao\.(nn\.(.*\.)?(quantized|qat)\b|quantization\.fake_quantize)")


def unwrapped(model: nn.Module, whose: str) -> nn.Module:
    """A copy of ``model`` in eval mode in which modules that share a parameter have equal ones of
    their own, weights are what their norm, mask or parametrization makes of them, and nothing
    is compiled or spread over devices. It computes the same.

    Raises BadInput for a module whose source is gone, or that is quantized already, and for
    weights that are not float32.
    """
    for name, module in model.named_modules():
        which, kind = f"{whose}'s {name!r}" if name else whose, type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise BadInput(
                f"task: {which} is a TorchScript module, which cannot be changed; give the "
                "torch.nn.Module that it was made from, with its state_dict"
            )
        if QUANTIZED.match(kind.__module__):
            raise BadInput(
                f"task: {which} is quantized already, or prepared for that ({kind.__module__}."
                f"{kind.__name__}); give the model in float that it was made from"
            )
    model = untied(bare(model)).eval()
    _make_weights_plain_(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise BadInput(
                f"task: {whose} must be in float32, but {name!r} is {dtype}; give model().float() "
                "and inputs in float32"
            )
    return model


def bare(model: nn.Module) -> nn.Module:
    """``model`` without wrappers, a copy where there were any inside."""
    while type(model) in WRAPPERS:
        model = getattr(model, WRAPPERS[type(model)])
    if any(type(module) in WRAPPERS for module in model.modules()):
        model = copied(model)
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if type(child) in WRAPPERS:
                    setattr(module, name, bare(child))
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy of ``model``, also of one that keeps what it computed (a weight under its norm), or
    functions that use its modules (``self.mlpf = lambda x: mlp(x)``): those use the copy's."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [v for v in attributes if isinstance(v, torch.Tensor) and not v.is_leaf]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    model = copy.deepcopy(model, memo)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and (cells := _used(value)):
                vars(module)[name] = _Kept(value, copy.deepcopy(cells, memo))
    return model


def _used(function: FunctionType) -> dict[int, nn.Module]:
    """The modules that ``function`` closes over, by place."""
    held = {i: cell for i, cell in enumerate(function.__closure__ or ()) if cell != CellType()}
    contents = {i: cell.cell_contents for i, cell in held.items()}
    return {i: value for i, value in contents.items() if isinstance(value, nn.Module)}


class _Kept:
    """A function that is copied together with the modules that it closes over."""

    def __init__(self, function: FunctionType, modules: dict[int, nn.Module]) -> None:
        self.function, self.modules = function, modules

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        return _Kept(self.function, copy.deepcopy(self.modules, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        old = self.function
        cells = list(old.__closure__ or ())
        for place, module in self.modules.items():
            cells[place] = CellType(module)
        now = FunctionType(
            old.__code__, old.__globals__, old.__name__, old.__defaults__, tuple(cells)
        )
        now.__kwdefaults__ = old.__kwdefaults__
        return now(*args, **kwargs)


def untied(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which modules that share a parameter have equal ones of their own.

    It computes the same. Whatever works on one layer (reconstruction, equalization, rounding)
    would change the parameter for the others too.
    """
    model = copied(model)
    seen: set[nn.Parameter] = set()
    for module in model.modules():  # a module with two names comes once
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                copy_ = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, copy_)
            seen.add(parameter)
    return model


def _make_weights_plain_(model: nn.Module) -> None:
    """Weight and spectral norm, masks of pruning and other parametrizations: students train the
    weight itself, also where a mask made it 0."""
    for module in [*model.modules()]:
        if parametrize.is_parametrized(module):
            held: Any = module.parametrizations
            weights = {name: getattr(module, name) for name in held}
            # torch's own way changes the class, which the user's module has too.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in weights.items():
                own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                module.register_parameter(name, own)
        for hook in [*module._forward_pre_hooks.values()]:  # those of before parametrizations
            old: Any = getattr(hook, "name", None)
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, old)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, old)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]  # torch's
