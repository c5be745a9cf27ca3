"""The decoder layers of the library's model: one is loaded while the next is read."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn

from calib.streaming.empty_model import Conversion, layers_paths
from calib.streaming.ffn import FfnModule
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.weights import Transfer, WeightReader
from surgery.errors import GET_AGAIN, NotFiniteError
from surgery.families.blocks import OUTSIDE, adds_up
from surgery.families.schema import EXPERTS, Dim
from surgery.files.safetensors_header import TensorRef
from surgery.layout.layout import Layout
from surgery.process import Advance, Progress, stage

CHECKED_ROWS = 8192
"""Rows of a tensor that are looked at together: on a device, this makes copies of them."""


class Layers:
    """Modules without weights, and the file's tensors of each."""

    def __init__(
        self,
        layout: Layout,
        reader: WeightReader,
        conversion: Conversion,
        modules: Sequence[nn.Module],
        settings: PassSettings,
        timings: Timings,
    ) -> None:
        """Take the library's ``modules``; ``conversion`` maps the file's tensors to them."""
        self.modules, self._paths = modules, layers_paths(layout, conversion)
        self._layout, self._reader, self._conversion = layout, reader, conversion
        self._settings, self._timings = settings, timings
        self._transfer = Transfer(reader.device)

    def names(self) -> list[str]:
        """Return the file's names of all their tensors, in reading order."""
        layers = range(len(self.modules))
        return [ref.name for index in layers for ref in self._stored(index).values()]

    def loaded(self, first: int) -> Iterator[int]:
        """Yield the index of each layer from ``first`` on once it is loaded, and read the next one.

        Merging experts takes twice a layer's memory, so the next layer is read only after it.
        """
        count, prefetch = len(self.modules), self._settings.prefetch
        with ThreadPoolExecutor(1) as background:
            following = background.submit(self._read, min(first, count - 1))
            for index in range(first, count):
                more, merges = index + 1 < count, self._merges(index)
                with self._timings.timed("wait"):
                    stored = following.result()
                if more and prefetch and not merges:
                    following = background.submit(self._read, index + 1)
                with self._timings.timed("convert"):
                    self._load(index, stored)
                if more and prefetch and merges:
                    following = background.submit(self._read, index + 1)
                yield index
                self.modules[index].to("meta")
                if more and not prefetch:
                    following = background.submit(self._read, index + 1)

    def _merges(self, index: int) -> bool:
        """Whether the library merges tensors that the file has expert by expert."""
        roles = self._layout.roles
        return any(roles[r.name].expert is not None for r in self._layout.of_layer[index].values())

    def _stored(self, index: int) -> dict[str, TensorRef]:
        """Return the tensors of a layer by their names in the text model."""
        roles = self._layout.roles
        tensors = self._layout.of_layer[index].items()
        return {n: ref for n, ref in tensors if roles[ref.name].slot.block not in OUTSIDE}

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        """Read the tensors of a layer; with a device, they are on it when this returns.

        On the CPU they are converted here, while another layer computes. Experts, and tensors for
        a device, are converted later: that takes half the memory.
        """
        roles = self._layout.roles
        with self._timings.timed("read"):
            stored = {
                name: self._reader.read(ref.name, convert=roles[ref.name].expert is None)
                for name, ref in self._stored(index).items()
            }
            return self._transfer(stored)

    def _load(self, index: int, stored: dict[str, torch.Tensor]) -> None:
        """Give a layer its weights; each stored tensor is freed as soon as it is converted."""
        prefix = f"{self._paths[index]}."
        converted = self._conversion.convert(stored)
        weights: dict[str, torch.Tensor] = {}
        while converted:
            name, value = converted.popitem()
            weights[name.removeprefix(prefix)] = self._reader.to_device(value)
        self.modules[index].load_state_dict(weights, assign=True)
        move_buffers(self.modules[index], self._reader.device)

    def dtypes(self, index: int) -> dict[str, str]:
        """Return the parameters that a collapse adds up, each with the file's safetensors dtype."""
        prefix, roles = f"{self._paths[index]}.", self._layout.roles
        return {
            self._conversion.target(name)[0].removeprefix(prefix): ref.dtype
            for name, ref in self._stored(index).items()
            if adds_up(roles[ref.name].slot)
        }

    def routers(self, index: int) -> dict[str, int]:
        """Return the tensors of a layer's router, each with its dimension that counts experts."""
        prefix = f"{self._paths[index]}."
        found = {}
        for name, ref in self._layout.of_layer[index].items():
            slot = self._layout.roles[ref.name].slot
            if slot.router:
                target = self._conversion.target(name)[0].removeprefix(prefix)
                found[target] = slot.dims.index(Dim(EXPERTS))
        return found

    def channel_dims(self, index: int, axis: str) -> dict[str, int]:
        """Return the parameters of a layer that carry a channel axis, each with its dimension.

        Empty where one of them has the axis twice, as a fused gate and up projection has.
        """
        prefix, found = f"{self._paths[index]}.", dict[str, int]()
        for name, ref in self._layout.of_layer[index].items():
            slot = self._layout.roles[ref.name].slot
            dims = [dim for dim, each in enumerate(slot.dims) if each and each.axis == axis]
            if dims and slot.dims[dims[0]] != Dim(axis):
                return {}
            if dims:
                found[self._conversion.target(name)[0].removeprefix(prefix)] = dims[0]
        return found

    def channel_tensors(self, index: int, axis: str) -> dict[str, str]:
        """Return the parameters of ``channel_dims``, each with its tensor's name in the file."""
        prefix, carriers = f"{self._paths[index]}.", self.channel_dims(index, axis)
        names = {
            self._conversion.target(name)[0].removeprefix(prefix): ref.name
            for name, ref in self._layout.of_layer[index].items()
        }
        return {parameter: names[parameter] for parameter in carriers}

    def ffn_modules(self, index: int) -> list[FfnModule]:
        """Return the modules of a layer that have channels."""
        prefix = f"{self._paths[index]}."
        ffn_modules: dict[str, FfnModule] = {}
        above: set[str] = set()
        for name, ref in self._layout.of_layer[index].items():
            slot = self._layout.roles[ref.name].slot
            if slot.width:
                target = self._conversion.target(name)[0].removeprefix(prefix)
                path, _, leaf = target.rpartition(".")
                above.add(path.rpartition(".")[0])
                if slot.ffn_output:
                    ffn_modules[path] = FfnModule(slot.width, path, leaf != "weight")
        alone = len(ffn_modules) == 1 and len(above) == 1 and above != {""}
        return [replace(each, alone=alone) for each in ffn_modules.values()]


def weights_stage(progress: Progress | None, name: str, layout: Layout, windows: int) -> Advance:
    """Return a callable that counts windows which passed a layer and reports bytes of weights.

    The bytes of a layer count by the share of the ``windows`` that have passed it.
    """
    sizes = [sum(ref.nbytes for ref in layer.values()) for layer in layout.of_layer]
    advance, passed, shown = stage(progress, name, sum(sizes)), 0, 0

    def count(more: int) -> None:
        nonlocal passed, shown
        passed += more
        layers, part = divmod(passed, windows)
        done = sum(sizes[:layers]) + (sizes[layers] * part // windows if part else 0)
        advance(done - shown)
        shown = done

    return count


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move all buffers of ``module`` to ``device``."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Return, as a tensor, whether no value is NaN or infinity.

    On a CPU the extremes, which are NaN where any value is, take a tenth of the time.
    """
    if values.device.type != "cpu" or not values.numel():
        return values.isfinite().all()
    return torch.stack(torch.aminmax(values)).isfinite().all()


def not_finite(layout: Layout, index: int, layer: nn.Module, dtype: torch.dtype) -> NotFiniteError:
    """Return the error for a layer whose output or weights have a number that is not finite.

    Args:
        layout: The model.
        index: The layer; all layers before it gave finite numbers.
        layer: The library's layer, while it has its weights.
        dtype: The dtype that computes.
    """
    where, name = str(layout.checkpoint.path), f"layer {index}"
    for parameter, value in layer.named_parameters():
        if not value.is_meta and not bool(all_finite(value)):
            name = f"{layout.layer_path(index)}.{parameter}"
            ref = layout.by_name.get(name)
            where = str(ref.path) if ref else where
            return broken_tensor(f"{where}: tensor {ref.name if ref else name}", dtype)
    return NotFiniteError(
        f"{where}: {name}",
        "is the first that gives numbers which are not finite; its weights are finite",
        expected="finite hidden states",
        found=f"NaN or infinity in {_name(dtype)}",
        fix="use `dtype` float32"
        if dtype == torch.bfloat16
        else "use `dtype` bfloat16 or float32"
        if dtype == torch.float16
        else "check the weights of this layer; a value may be far too large",
    )


def check_finite(ref: TensorRef, values: torch.Tensor) -> None:
    """Refuse NaN and infinity in a tensor outside of the layers.

    Raises:
        NotFiniteError: it names the tensor.
    """
    if not all(bool(all_finite(part)) for part in values.split(CHECKED_ROWS)):
        raise broken_tensor(f"{ref.path}: tensor {ref.name}", values.dtype)


def broken_tensor(where: str, dtype: torch.dtype) -> NotFiniteError:
    """Return the error for a tensor that has NaN or infinity in the ``dtype`` that computes."""
    return NotFiniteError(
        where,
        "has a number that is not finite",
        expected="finite numbers",
        found=f"NaN or infinity in {_name(dtype)}",
        fix="use `dtype` bfloat16 or float32, else " * (dtype == torch.float16) + GET_AGAIN,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
