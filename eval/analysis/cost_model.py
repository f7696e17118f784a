"""What a configuration costs before anything is built: FLOPs, weights and activation memory at any resolution.

`predict` runs a module on tensors that have shapes and no content, so that a model of any size is costed in seconds and
in no memory; `measure` asks torch's profiler what a real pass did. Tests hold the two within 10 % of each other.

Counted, for a batch of one and float32:

- FLOPs: two per multiply-accumulate of convolutions, linear layers and both products of attention. Element-wise work,
  normalisation and softmax are left out.
- weights: every parameter.
- saved: what is kept from the forward for the backward pass, inputs and parameters left out. A training step holds this
  once per image of its batch.
- peak: the largest sum of tensors alive between two operators of a forward pass without gradients, inputs and
  parameters left out. What a kernel allocates and frees within one call comes on top; it depends on the kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Of one forward pass at batch 1; the fields are defined in the module's docstring."""

    flops: int
    weight_bytes: int
    saved_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def attention_bytes(tokens: int, heads: int = 1, bytes_per_value: int = FLOAT_BYTES) -> int:
    """softmax(QK^T) of one self-attention layer, where it is written down: heads · tokens² values.

    A fused kernel never does (Dao et al. 2022, arXiv:2205.14135), and `predict` counts with one.
    """
    return heads * tokens * tokens * bytes_per_value


def model_costs(model: Mapping[str, Any], height: int, width: int) -> dict[str, Cost]:
    """Encoder, decoder and one U-Net step of what model.json describes, at an image size in pixels; and, as
    "unet_in_pixel_space", the same U-Net on the pixels themselves.

    Raises `ValueError` if the size is no multiple of the model's `size_multiple`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ldm_deploy.models.unet import UNet

    if height % model["size_multiple"] or width % model["size_multiple"]:
        raise ValueError(f"size {height}x{width} is no multiple of {model['size_multiple']}")
    with FakeTensorMode():
        costs = {name: predict(module, *inputs) for name, module, inputs in parts(model, height, width)}
        pixels = UNet(**{**model["unet"], "in_channels": 3})
        _, *conditions = _unet_inputs(model, 3, height, width)
        costs["unet_in_pixel_space"] = predict(pixels, _zeros(3, height, width), *conditions)
    return costs


def parts(model: Mapping[str, Any], height: int, width: int) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """(name, untrained module, inputs of batch 1) of encoder, decoder and U-Net; sizes in pixels."""
    from ldm_deploy.models.autoencoder import Autoencoder
    from ldm_deploy.models.unet import UNet

    autoencoder = Autoencoder(**model["autoencoder"]).eval()
    z, factor = model["latent_channels"], model["downsampling"]
    latent = _zeros(z, height // factor, width // factor)
    yield "encoder", autoencoder.encoder, (_zeros(3, height, width),)
    yield "decoder", autoencoder.decoder, (latent,)
    yield "unet", UNet(**model["unet"]).eval(), _unet_inputs(model, z, height // factor, width // factor)


def _unet_inputs(model: Mapping[str, Any], channels: int, height: int, width: int) -> tuple[Tensor, ...]:
    import torch

    context = torch.zeros(1, model["context_length"], model["unet"]["context_channels"])
    return _zeros(channels, height, width), torch.zeros(1, dtype=torch.int64), context


def _zeros(*shape: int) -> Tensor:
    import torch

    return torch.zeros(1, *shape)


def predict(module: nn.Module, *inputs: Tensor) -> Cost:
    """Count a forward pass of `module`; with fake tensors nothing is computed and nothing allocated."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # torch has no formula for its fused attention on a CPU: written out, attention is two products that it knows.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    known = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers(), *inputs)}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad(), _alive(known) as alive:
        module(*inputs)
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor.untyped_storage())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), _needing_gradients(module), hooks:
        outputs = module(*inputs)
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in known)
    del outputs  # not before: it keeps the saved tensors alive, and with them their identities
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return Cost(int(counter.get_total_flops()), weights, saved, alive.peak)


def measure(module: nn.Module, *inputs: Tensor) -> Cost:
    """The same of a real pass on the CPU, from the profiler's records of operators and of the allocator.

    `weight_bytes` is the size of the parameters as safetensors would store them.
    """
    import torch
    from safetensors.torch import save
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        flops, _, _ = _profile(lambda: module(*inputs))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            _, peak, _ = _profile(lambda: module(*inputs))
        with _needing_gradients(module):
            # What is left when the pass is over: saved tensors and the outputs, which are counted apart.
            outputs: list[Any] = []
            _, _, left = _profile(lambda: outputs.append(module(*inputs)))
    result = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    weights = len(save({name: value.detach().contiguous() for name, value in module.named_parameters()}))
    return Cost(flops, weights, left - result.numel() * result.element_size(), peak)


def _profile(call: Callable[[], object]) -> tuple[int, int, int]:
    """(FLOPs, most bytes held between two operators, bytes held at the end) of what `call` does."""
    from torch.profiler import ProfilerActivity, profile

    options: dict[str, Any] = {"profile_memory": True, "with_flops": True, "record_shapes": True}
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], **options) as record:
        call()
    flops = sum(event.flops or 0 for event in record.key_averages())
    events = record.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    # An operator that others are nested in ends after them: only the ends of outermost ones are looked at.
    ends, outermost = [], 0
    spans = [(event.start_ns(), event.end_ns()) for event in events if event.name().startswith("aten::")]
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= outermost:
            ends.append((end, 0))
            outermost = end
    held = most = 0
    for _, change in sorted(changes + ends, key=lambda event: event[0]):
        held += change
        most = max(most, held) if change == 0 else most
    return int(flops), most, held


@contextmanager
def _no_chatter() -> Iterator[None]:
    """The profiler's library writes lines for its own developers to the process's standard error, and has no switch."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _needing_gradients(module: nn.Module) -> Iterator[None]:
    import torch

    before = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(module.parameters(), before, strict=True):
            parameter.requires_grad_(flag)


def _storage(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, its views included."""
    return int(tensor.untyped_storage()._cdata)


def _alive(known: set[int]) -> Any:
    """A context in which every operation's new memory is followed until it is freed; `peak` is the largest sum."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.peak = 0
            self._there: dict[int, tuple[Any, int]] = {}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for key in [key for key, (storage, _) in self._there.items() if storage.expired()]:
                del self._there[key]
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and _storage(tensor) not in known:
                    storage = tensor.untyped_storage()
                    self._there.setdefault(_storage(tensor), (StorageWeakRef(storage), storage.nbytes()))
            self.peak = max(self.peak, sum(size for _, size in self._there.values()))
            return result

    return Alive()
