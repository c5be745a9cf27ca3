"""The decoder layers of the library's model, one loaded at a time, the next one underway."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from calib.streaming.empty_model import Conversion
from calib.streaming.ffn import FfnModule
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.weights import Transfer, WeightReader
from surgery.families.blocks import BUFFER, adds_up
from surgery.files.safetensors_header import TensorRef
from surgery.layout.layout import Layout
from surgery.process import Advance, Progress, stage


class Layers:
    """Modules without weights, and the tensors of the file that belong to each."""

    def __init__(
        self,
        layout: Layout,
        reader: WeightReader,
        conversion: Conversion,
        modules: Sequence[nn.Module],
        settings: PassSettings,
        timings: Timings,
    ) -> None:
        """Take the library's ``modules``, and what its names and layouts follow by."""
        self.modules = modules
        self._layout, self._reader, self._conversion = layout, reader, conversion
        self._settings, self._timings = settings, timings
        self._transfer = Transfer(reader.device)

    def names(self) -> list[str]:
        """The file's names of all their tensors, as they are read."""
        layers = range(len(self.modules))
        return [ref.name for index in layers for ref in self._stored(index).values()]

    def loaded(self, first: int) -> Iterator[int]:
        """Yield each layer from ``first`` on, loaded, the next one underway.

        Merging experts takes a layer's memory twice over; the next layer does not come on top.
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
        """Whether the library keeps as one what the file has expert by expert."""
        places = self._layout.roles
        return any(places[r.name].expert is not None for r in self._layout.of_layer[index].values())

    def _stored(self, index: int) -> dict[str, TensorRef]:
        """The tensors of a layer by their names in the text model."""
        places = self._layout.roles
        tensors = self._layout.of_layer[index].items()
        return {n: ref for n, ref in tensors if places[ref.name].slot.block != BUFFER}

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        """The same, read; with a device they are on it when this returns.

        The CPU converts here, while another layer computes; what is to be merged, and a device,
        do with half the memory if it is done later.
        """
        places = self._layout.roles
        with self._timings.timed("read"):
            stored = {
                name: self._reader.read(ref.name, convert=places[ref.name].expert is None)
                for name, ref in self._stored(index).items()
            }
            return self._transfer(stored)

    def _load(self, index: int, stored: dict[str, torch.Tensor]) -> None:
        """Give a layer its weights; each stored one is freed as soon as it is placed."""
        prefix = f"{self._layout.family.layers}.{index}."
        converted = self._conversion.convert(stored)
        weights: dict[str, torch.Tensor] = {}
        while converted:
            name, value = converted.popitem()
            weights[name.removeprefix(prefix)] = self._reader.place(value)
        self.modules[index].load_state_dict(weights, assign=True)
        move_buffers(self.modules[index], self._reader.device)

    def dtypes(self, index: int) -> dict[str, str]:
        """Parameters that add up in a collapse → the safetensors dtype that the file has."""
        prefix, places = f"{self._layout.family.layers}.{index}.", self._layout.roles
        return {
            self._conversion.target(name)[0].removeprefix(prefix): ref.dtype
            for name, ref in self._stored(index).items()
            if adds_up(places[ref.name].slot)
        }

    def ffn_modules(self, index: int) -> list[FfnModule]:
        """What has channels in a layer."""
        prefix = f"{self._layout.family.layers}.{index}."
        ffn_modules: dict[str, FfnModule] = {}
        for name, ref in self._layout.of_layer[index].items():
            slot = self._layout.roles[ref.name].slot
            if slot.ffn_output and slot.width:
                target = self._conversion.target(name)[0].removeprefix(prefix)
                path, _, leaf = target.rpartition(".")
                ffn_modules[path] = FfnModule(slot.width, path, leaf != "weight")
        return list(ffn_modules.values())


def weights_stage(progress: Progress | None, name: str, layout: Layout, windows: int) -> Advance:
    """Return what counts windows that have passed a layer, and reports bytes of weights.

    A layer counts by the share of the ``windows`` that have passed it.
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
    """Bring what is no weight to ``device``."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
