"""Whole models in memory: the one that is trained, and a teacher with its vocabulary pruned."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import log_softmax
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from calib.recovery.options import FFN_ALONE, RecoverOptions, TrainingError
from calib.streaming.empty_model import Conversion, library_errors, whole_class
from calib.streaming.layers import all_finite, broken_tensor
from calib.streaming.settings import PassSettings
from calib.streaming.weights import TORCH_DTYPE
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef
from surgery.hub.shards import Shards
from surgery.layout.layout import Layout

LOG = logging.getLogger(__name__)


def load_model(layout: Layout, dtype: torch.dtype) -> Any:
    """Load the whole model of a checkpoint on the CPU, by the library's own class for it.

    Raises:
        CheckpointError: transformers cannot load it.
        NotFiniteError: a weight is NaN or infinity.
    """
    name, revision = loadable_name(layout.checkpoint)
    with library_errors(layout):
        config = AutoConfig.from_pretrained(layout.checkpoint.path, trust_remote_code=False)
        made = whole_class(config).from_pretrained(
            name, dtype=dtype, trust_remote_code=False, revision=revision or "main"
        )
    made.config.use_cache = False
    for parameter, value in made.named_parameters():
        if not bool(all_finite(value.detach())):
            ref = layout.by_name.get(parameter)
            path, known = (ref.path, ref.name) if ref else (layout.checkpoint.path, parameter)
            raise broken_tensor(f"{path}: tensor {known}", dtype)
    return made


def loadable_name(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """Return the directory or the hub's name of a checkpoint, and its revision on the hub."""
    if not Shards.of(checkpoint.path).remote:
        return str(checkpoint.path), None
    name, _, revision = checkpoint.source.partition("@")  # its directory holds headers alone
    return name, revision


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher ‖ student) of logits ``(windows, tokens, V')``, in nats."""
    wanted, found = log_softmax(teacher.float(), -1), log_softmax(student.float(), -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


class Teacher:
    """The dense model, whose vocabulary is pruned as the student's: it takes and predicts its ids.

    Only the rows of the head that are kept are computed, so that a softmax over its logits is the
    dense model's distribution, renormalized over the kept tokens.
    """

    def __init__(self, layout: Layout, kept: np.ndarray, dtype: torch.dtype) -> None:
        """Load ``layout``; ``kept`` are the old ids of the student's rows, ascending."""
        model = load_model(layout, dtype).eval().requires_grad_(False)
        self._kept, head = torch.from_numpy(kept), model.get_output_embeddings()
        for name in ("weight", "bias"):
            if (old := getattr(head, name, None)) is not None:
                chosen = old.detach()[self._kept].clone()
                setattr(head, name, nn.Parameter(chosen, requires_grad=False))
        self.model = model

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)
        self._kept = self._kept.to(device)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(windows, tokens, V')`` of the student's ``ids``."""
        made: torch.Tensor = self.model(input_ids=self._kept[ids], use_cache=False).logits
        return made

    def divergence(self, student: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of the student's logits for a batch."""
        return divergence(student, self.logits(batch["input_ids"]))


def file_tensors(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's ``state`` as its files name it, with merged tensors divided."""
    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(state))
    return found


class Student:
    """The model that is trained, whole, and the tensors of its files."""

    def __init__(
        self, layout: Layout, options: RecoverOptions, settings: PassSettings, seed: int
    ) -> None:
        """Load it, and choose which of its parameters are trained.

        Raises:
            CheckpointError: transformers cannot load it, or a parameter has no place in the files.
        """
        on_card = settings.device.type != "cpu"
        dtype = settings.dtype if options.lora and on_card else torch.float32
        self._model = load_model(layout, dtype).to(settings.device)
        self._parameters = ParameterMap(self._model, layout)
        self._parameters.check()
        self._lora = options.lora is not None
        ffn = self._parameters.of_ffn() if options.only == FFN_ALONE else None
        if self._lora and layout.experts:
            LOG.info("note: adapters are for linear maps alone, so packed experts stay as they are")
        self.trained = self._adapted(options, ffn, seed) if self._lora else self._chosen(ffn)
        """The model, or the one of peft around it."""

    def _chosen(self, ffn: set[str] | None) -> Any:
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(ffn is None or name in ffn)
        return self._model

    def _adapted(self, options: RecoverOptions, ffn: set[str] | None, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        modules = "all-linear" if ffn is None else [n.removesuffix(".weight") for n in ffn]
        rank = options.lora or 0
        how = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
        return get_peft_model(self._model, how)

    def finish(self) -> None:
        """Merge adapters, and round every parameter to the dtype of its file."""
        if self._lora:
            self.trained = self._model = self.trained.merge_and_unload()
        self._parameters.round()

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors as the files name them."""
        return file_tensors(self._model, self._model.state_dict())


def check_trainable(layout: Layout) -> None:
    """Refuse a checkpoint whose weights cannot be trained, or that predicts no token.

    Raises:
        CheckpointError: it is quantized, or has tensors in another dtype.
    """
    checkpoint = layout.checkpoint
    if checkpoint.quantization is None and checkpoint.opaque is None:
        other = [ref for ref in checkpoint.tensors.values() if ref.dtype not in TORCH_DTYPE]
        if not any(layout.roles[ref.name].layer is not None for ref in other):
            return
    raise CheckpointError(
        checkpoint.path,
        "is quantized: its weights cannot be trained",
        expected="bf16, fp16 or fp32",
        fix="plan with `dequantize`, apply, and train the result",
    )


def check_chosen(layout: Layout, options: RecoverOptions) -> None:
    """Refuse FFNs alone where none is known, or where adapters do not fit them.

    Raises:
        TrainingError: naming ``only``.
    """
    if options.only is None:
        return
    where, path = f"`only` {options.only}", layout.checkpoint.path
    if not any(role.slot.width for role in layout.roles.values()):
        raise TrainingError(
            where,
            f"trains nothing: no FFN of {path} is known by its channels",
            fix="leave it out",
        )
    if options.lora is not None and layout.experts:
        raise TrainingError(
            where,
            f"does not work with `lora` for {path}: adapters do not fit its experts",
            fix="leave `lora` out, or `only`",
        )


class ParameterMap:
    """Which parameter of a whole model each tensor of its checkpoint's files is loaded into."""

    def __init__(self, model: Any, layout: Layout) -> None:
        conversion, parameters = Conversion(model), dict(model.named_parameters())
        self._parameters = parameters
        self._tensors: dict[str, list[TensorRef]] = {}
        for name, ref in layout.checkpoint.tensors.items():
            target = conversion.target(name)[0]
            if target in parameters:
                self._tensors.setdefault(target, []).append(ref)
        self._model, self._layout = model, layout

    def check(self) -> None:
        """Refuse a model whose trained parameters would not find their places in the files.

        Raises:
            CheckpointError: naming the tensor.
        """
        tied = set(self._model.all_tied_weights_keys)
        missing = sorted(self._parameters.keys() - self._tensors.keys() - tied)
        empty = {name: value.to("meta") for name, value in self._model.state_dict().items()}
        named = file_tensors(self._model, empty)
        for target, refs in self._tensors.items():
            for ref in refs:
                if ref.name not in named or tuple(named[ref.name].shape) != ref.shape:
                    missing.append(target)
        if missing:
            raise CheckpointError(
                f"{self._layout.checkpoint.path}: parameter {missing[0]}",
                "has no tensor of its shape in the files, so it could not be written",
                fix="train it with another tool",
            )

    def of_ffn(self) -> set[str]:
        """Return the parameters that belong to an FFN."""
        roles = self._layout.roles
        return {
            target
            for target, refs in self._tensors.items()
            if any(roles[ref.name].slot.width for ref in refs)
        }

    @torch.no_grad()
    def round(self) -> None:
        """Round every parameter to the dtype that its tensors have in the files, in place."""
        for target, refs in self._tensors.items():
            parameter = self._parameters[target]
            parameter.copy_(parameter.to(TORCH_DTYPE[refs[0].dtype]))
