"""LoRA (arXiv 2106.09685): small trained matrices beside frozen ones, and their sums.

A linear layer multiplies by W + (alpha / R) B A, with W [out, in] in the compute type, A [R, in]
and B [out, R] in float32, and alpha 32. The sum is made in float32 and rounded once, and the same
sum is trained, sampled from and saved. (x W^T + (alpha / R) (x A^T) B^T, the usual way, trains a
policy that bfloat16 weights cannot hold.) Updates add up in A and B until they show. W stays as it
was loaded, to the bit. B begins at 0, so that the adapted model begins as the base.
"""

import contextlib
import zlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from common.model.shard import ADAPTERS, copy_rows, full_weight
from common.run.errors import check

ALPHA = 32.0


class LoRALinear(nn.Linear):
    """A frozen linear layer with adapters."""

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)  # nothing is allocated: the weight is the given layer's
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.adapted, self.held = ALPHA / rank, True, None
        place = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **place))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.adapted:
            return super().forward(x)
        if self.held is not None:
            return F.linear(x, self.held, self.bias)
        return _Merged.apply(x, self.weight, self.lora_A, self.lora_B, self.scale, self.bias)

    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W + (alpha / R) B A, whole."""
        parameters = (self.weight, self.lora_A, self.lora_B)
        return _merge(*(full_weight(parameter) for parameter in parameters), self.scale, dtype)


def _merge(weight, a, b, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(torch.float32, copy=True).addmm_(b, a, alpha=scale).to(dtype)


class _Merged(torch.autograd.Function):
    """A linear layer of the rounded sum, with the gradients of factors whose sum is not rounded.
    Backward makes the sum again: kept, those of all layers would be a second model."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale, bias):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, _merge(weight, a, b, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ _merge(weight, a, b, ctx.scale, x.dtype)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_a = (grad @ b.to(x.dtype)).T @ x
        grad_b = grad.T @ (x @ a.to(x.dtype).T)
        return grad_x, None, ctx.scale * grad_a.float(), ctx.scale * grad_b.float(), None, None


def layers_of(model) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapters(model, rank: int) -> None:
    """Freeze the model, and give every linear layer of its decoder adapters (never the head). They
    are not initialised: init_adapters does that."""
    model.requires_grad_(False)
    decoder = model.get_decoder()
    found = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    check(len(found) > 0, f"--lora_rank finds no linear layer in {type(model).__name__}")
    for name, linear in found.items():
        width = min(linear.weight.shape)
        check(rank <= width, f"--lora_rank {rank} is above the width of {name}, {width}")
        decoder.set_submodule(name, LoRALinear(linear, rank))


@torch.no_grad()
def init_adapters(model, seed: int) -> None:
    """Initialise the adapters: A uniform in +-1/sqrt(in), as peft does, B with 0. They are the same
    at any number of ranks."""
    for name, layer in layers_of(model).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.rand(layer.lora_A.shape, generator=generator)
        copy_rows(layer.lora_A, (2 * values - 1) / layer.in_features**0.5)
        layer.lora_B.zero_()


def trained_parameters(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class AdaptersOff:
    """A model with its adapters off: the policy that this run began from, without a copy of it."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, **inputs):
        layers = layers_of(self.model).values()
        with contextlib.ExitStack() as stack:
            for layer in layers:
                layer.adapted = False
                stack.callback(setattr, layer, "adapted", True)
            return self.model(**inputs)


# === what is sampled from, and saved ===


@contextlib.contextmanager
def merged_weights(model) -> Iterator[None]:
    """Hold each layer's sum for many forward passes without gradient, as sampling makes them."""
    layers = layers_of(model).values()
    for layer in layers:
        layer.held = layer.merged(layer.weight.dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


def weight_names(model) -> list[str]:
    """List the parameters of the model as others know it: without adapters, tied ones once."""
    return [name for name, _ in model.named_parameters() if not name.endswith(ADAPTERS)]


def whole_weight(model, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a parameter whole and in `dtype`, its adapters merged."""
    owner, _, kind = name.rpartition(".")
    layer = model.get_submodule(owner)
    if isinstance(layer, LoRALinear) and kind == "weight":
        return layer.merged(dtype)
    return full_weight(model.get_parameter(name), dtype)


def whole_weights(model, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter by name: a sharded model is gathered one at a time."""
    for name in weight_names(model):
        yield name, whole_weight(model, name, dtype)
