"""The library's own model of a config without weights, and how files store its parameters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from threading import Lock, get_ident
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from calib.streaming.ffn import IMPLEMENTATION
from surgery.errors import CheckpointError, FamilyError, SurgeryError
from surgery.families.blocks import OUTSIDE
from surgery.families.schema import DECODER, ENCODER_DECODER, GLINER, TIE_KEY, UNDIVIDED
from surgery.families.table import family_of
from surgery.files.model_files import CONFIG_NAME
from surgery.layout.layout import Layout


class Conversion:
    """The renaming and merging of tensors when transformers loads a model, such as of experts."""

    def __init__(self, model: Any) -> None:
        """Take the mapping of ``model``, the library's model of the text config."""
        self._model = model
        self._state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that tensor ``name`` is loaded into, and the converter's pattern."""
        prefix = self._model.base_model_prefix
        found = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if found[0] not in self._state and name in self._state:
            return name, None
        return found

    def convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return parameter → value for ``tensors``, without tensors that the model lacks.

        ``tensors`` is emptied, so that merged tensors can be freed. They may be on the meta device;
        then headers alone are enough to check shapes.
        """
        result: dict[str, torch.Tensor] = {}
        gathered: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            tensor = tensors.pop(name)
            target, pattern = self.target(name)
            if target not in self._state:
                continue
            if pattern is None:
                result[target] = tensor
                continue
            if target not in gathered:
                gathered[target] = deepcopy(self._by_pattern[pattern])
            gathered[target].add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        while gathered:
            target, converter = gathered.popitem()
            made = converter.convert(target, model=self._model, config=self._model.config)
            result |= {k: v[0] if isinstance(v, list) else v for k, v in made.items()}
        return result


MESSAGE = 300
"""Characters of the library's message that an error quotes; it can list every model type."""

MOST_BUFFER_BYTES = 1 << 30
"""For tables such as masks, which grow with the square of ``max_position_embeddings``."""

BUILDING = Lock()
"""Held while modules are built with parameters on the meta device."""

IGNORED_KEYS = (
    "quantization_config",
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""Keys of config.json that are ignored. Quantized weights are read as the numbers they encode, and
code that a config names, such as a kernel on the hub, is never run."""


KEYS_VALUES = re.compile(r"\.[kv]_(proj|norm)\.")
"""Names of what computes keys and values. Files may hold it of layers that take those of others."""

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names that the library's configs have for the number of positions, whatever config.json calls it
(``n_positions``)."""


def empty_model(layout: Layout, dtype: torch.dtype) -> tuple[Any, Conversion]:
    """Build the library's model that runs a checkpoint's text: real buffers, no weights.

    It is the language model alone where the library has a class for that, else the whole model.

    Raises:
        CheckpointError: config.json makes no model, or one with other tensors.
        FamilyError: the model cannot run layer by layer.
    """
    check_runs(layout)
    with library_errors(layout):
        config = AutoConfig.for_model(**_model_config(layout))
        for part in (config, config.get_text_config()):
            part._experts_implementation = IMPLEMENTATION
        with torch.device("meta"):
            sketch = _model(config, layout, dtype)
        _check_shapes(sketch, Conversion(sketch), layout)
        _check_buffers(sketch, layout)
        with _parameters_on_meta():
            model = _model(config, layout, dtype)
        conversion = Conversion(model)
    return model.eval().requires_grad_(False), conversion


def parameter_shapes(layout: Layout, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the library's parameters, with ``changes`` of config.json's keys.

    Raises:
        CheckpointError: config.json makes no model.
    """
    check_runs(layout)
    with library_errors(layout), torch.device("meta"):
        config = AutoConfig.for_model(**{**_model_config(layout), **changes})
        model = _model(config, layout, torch.float32)
        return {name: tuple(each.shape) for name, each in model.named_parameters()}


def check_runs(layout: Layout) -> None:
    """Refuse a model that does not run layer by layer.

    Raises:
        FamilyError: only its vocabulary is pruned, or it computes between two layers.
    """
    fix = "plan the vocabulary alone, with `vocab_size`; `forward` is not needed to verify it"
    family = layout.family
    if family.kind in (ENCODER_DECODER, UNDIVIDED) and not family.stacks:
        raise FamilyError(
            layout.checkpoint.path,
            f"{layout.family.model_type} is an {family.kind}, of which only "
            f"the vocabulary is pruned: {family.only_vocabulary}",
            fix=fix,
        )
    for name in layout.family.between_layers:
        if name in layout.by_name:
            raise FamilyError(
                f"{layout.checkpoint.path}: tensor {layout.by_name[name].name}",
                "computes between two layers, so that the model cannot run layer by layer",
                fix=fix,
            )


def _model(config: Any, layout: Layout, dtype: torch.dtype) -> Any:
    """Return the library's model that runs a text; an encoder without its pooler and heads."""
    if layout.family.kind == DECODER:
        return whole_class(config).from_config(config, dtype=dtype)
    if layout.family.kind == ENCODER_DECODER and not layout.decoder_layers:
        return AutoModelForTextEncoding.from_config(config, dtype=dtype)
    model = AutoModel.from_config(config, dtype=dtype)
    if hasattr(model, "pooler"):
        model.pooler = None
    return model


def layers_paths(layout: Layout, conversion: Conversion) -> list[str]:
    """Return the path of each layer's module in the library's model."""
    found = []
    for layer in range(layout.num_hidden_layers):
        own = f"{layout.layer_path(layer)}."
        name = next(name for name in layout.of_layer[layer] if name.startswith(own))
        number = f".{own.rpartition('.')[0].rpartition('.')[2]}."
        found.append(conversion.target(name)[0].partition(number)[0] + number[:-1])
    return found


def positions(layout: Layout) -> int | None:
    """Return how many tokens a window of the model may have, None where nothing limits it.

    Raises:
        CheckpointError: config.json makes no model.
    """
    with library_errors(layout):
        config = AutoConfig.for_model(**_model_config(layout)).get_text_config()
    for key in POSITIONS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value - (config.pad_token_id + 1 if layout.family.positions_after_pad else 0)
    return None


def _model_config(layout: Layout) -> dict[str, Any]:
    """Return config.json's keys of the model that runs a text, with its model type."""
    family = layout.family
    keys, tie = dict(layout.config), {TIE_KEY: layout.tied}
    if layout.runs_whole:
        keys = {**layout.checkpoint.config, family.section: {**keys, **tie}}
    keys["model_type"] = family.text_type or family.model_type or keys.get("model_type")
    keys |= tie
    kept = {key: value for key, value in keys.items() if key not in IGNORED_KEYS}
    decoded: dict[str, Any] = PreTrainedConfig._decode_special_floats(kept)
    return decoded


def _check_shapes(model: nn.Module, conversion: Conversion, layout: Layout) -> None:
    """Refuse a checkpoint whose tensors differ from what the library expects by config.json."""
    tensors = layout.by_name | layout.beside
    empty = {n: torch.empty(layout.shape_of(t), device="meta") for n, t in tensors.items()}
    found = conversion.convert(empty)
    parameters = model.state_dict()
    head = conversion.target(layout.family.head)[0]
    computed = _computed(model) if layout.family.kind == ENCODER_DECODER else set()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, parameter in parameters.items():
        value = found.get(name)
        if value is None and name == head and (layout.tied or layout.without_head):
            continue
        if value is None and (name in computed or tied.get(name) in found):
            continue
        if value is None or value.shape != parameter.shape:
            ref = tensors.get(name)
            raise CheckpointError(
                f"{ref.path if ref else layout.checkpoint.path}: tensor {name}",
                "is missing" if value is None else "shape contradicts config.json",
                expected=list(parameter.shape),
                found=list(value.shape) if value is not None else None,
                fix="check config.json",
            )
    for name, ref in layout.by_name.items():
        role = layout.roles[ref.name]
        idle = (role.layer or 0) >= layout.first_shared and KEYS_VALUES.search(name)
        needed = role.slot.block not in OUTSIDE and not idle
        if needed and conversion.target(name)[0] not in parameters:
            raise CheckpointError(
                f"{ref.path}: tensor {ref.name}",
                "is not in the model that transformers makes of config.json",
                fix="check config.json, such as its flags for biases",
            )


def shape_faults(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], family: str | None = None
) -> list[str]:
    """Say which tensors do not fit the library's whole model of a config.json, built empty.

    Weights whose codes are packed are not compared: their shapes are those of no parameter.

    Args:
        config: Content of config.json.
        shapes: Name of each tensor in the files → its shape.
        family: Model type to treat it as; None is the config's own.
    """
    if family == GLINER:  # transformers knows the encoder alone
        config, shapes, family = _text_alone(config, shapes, family)
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") != "fp8":
        return []
    try:
        try:
            model = _on_meta(config, family)
        except ImportError:  # of a library that only a vision tower needs
            config, shapes, family = _text_alone(config, shapes, family)
            model = _on_meta(config, family)
        empty = {name: torch.empty(list(shape), device="meta") for name, shape in shapes.items()}
        found = Conversion(model).convert(empty)
    except Exception as error:  # whatever the library makes of a wrong value
        return [f"transformers builds no model: {type(error).__name__}: {str(error)[:MESSAGE]}"]
    inside, tied = f"{model.base_model_prefix}.", set(model.all_tied_weights_keys)
    computed, faults = _computed(model), []
    for name, parameter in model.named_parameters():
        value = found.get(name)
        if value is None and name in computed:
            continue
        if value is None and name.startswith(inside) and name not in tied:
            faults.append(f"{name} is missing")
        elif value is not None and value.shape != parameter.shape:
            wanted, there = list(parameter.shape), list(value.shape)
            faults.append(f"{name} is {there}, where config.json makes it {wanted}")
    return faults


def _on_meta(config: Mapping[str, Any], family: str | None) -> Any:
    """Return the library's whole model of a config.json without storage."""
    kept = {key: value for key, value in config.items() if key not in IGNORED_KEYS}
    kept |= {"model_type": family} if family else {}
    made = AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(kept))
    with torch.device("meta"):
        return whole_class(made).from_config(made)


def _text_alone(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], family: str | None
) -> tuple[Mapping[str, Any], Mapping[str, Sequence[int]], str]:
    """Return the config of the language model inside another, the shapes of its tensors by their
    names there, and its type."""
    whole = family_of(config, CONFIG_NAME, family)
    inside: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        prefixes = ((old, new) for old, new in whole.prefixes if old and name.startswith(old))
        old, new = next(prefixes, ("", ""))
        if old or name in whole.by_name:
            inside[new + name.removeprefix(old)] = shape
    return whole.text_config(config), inside, whole.text_type


def _computed(model: Any) -> set[str]:
    """Return the parameters that the library computes itself, such as Marian's positions."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    inside = f"{model.base_model_prefix}."  # which patterns name though the model has none
    return {
        name
        for name, _ in model.named_parameters()
        if any(re.search(each, spelled) for each in patterns for spelled in (name, inside + name))
    }


def compute_missing(model: Any) -> None:
    """Let the library compute the parameters that no file has and that it need not read."""
    for name in _computed(model):
        module = model.get_submodule(name.rpartition(".")[0])
        if module.weight.is_meta:
            empty = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            module.weight = nn.Parameter(empty, requires_grad=False)
            model._init_weights(module)


def whole_class(config: Any) -> Any:
    """Return the class of transformers that loads the whole model of a config."""
    both = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq) if config.is_encoder_decoder else ()
    alone = (AutoModelForMaskedLM, AutoModelForCausalLM)
    masked_last = getattr(config, "is_decoder", False)  # Reformer is one or the other
    autos = (*both, AutoModelForImageTextToText, *(reversed(alone) if masked_last else alone))
    return next((auto for auto in autos if type(config) in auto._model_mapping), AutoModel)


def _check_buffers(sketch: nn.Module, layout: Layout) -> None:
    nbytes = sum(buffer.nbytes for buffer in sketch.buffers())
    if nbytes > MOST_BUFFER_BYTES:
        raise CheckpointError(
            layout.checkpoint.config_path,
            "asks for tables that do not fit in memory",
            expected=f"at most {MOST_BUFFER_BYTES:,} bytes",
            found=f"{nbytes:,}",
            fix="lower the number of positions",
        )


@contextmanager
def library_errors(layout: Layout) -> Iterator[None]:
    """Turn any error that a wrong value of config.json causes in the library into one line.

    Raises:
        CheckpointError: instead of any other error.
    """
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise CheckpointError(
            layout.checkpoint.config_path,
            "transformers cannot build or run the model that it describes",
            found=f"{type(error).__name__}: {str(error)[:MESSAGE]}",
            fix="check config.json",
        ) from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create modules with real buffers (rotary tables, scales) but parameters without storage.

    The library is told that these are initialized. It would draw random numbers for them, which
    took half of the time to build a model.

    torch has one ``register_parameter`` for the whole process. So one thread at a time replaces it,
    and the modules of all other threads keep their parameters.
    """
    builder = get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and get_ident() == builder:
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[name] = empty

    with BUILDING:
        original = nn.Module.register_parameter
        nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
