"""Write a checkpoint as one GGUF file, tensor by tensor; it appears whole or not at all."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from struct import pack
from typing import Any, BinaryIO

import numpy as np

from surgery.apply.output_directory import check_space
from surgery.apply.shard import write_all
from surgery.errors import CheckpointError, OptionError, OutputError, check_choice
from surgery.export.architectures import Architecture, architecture_of
from surgery.export.description import Description, describe
from surgery.export.embedders import LOWERCASE, text_note
from surgery.export.tensors import BLOCK, MXFP4, OWN_TYPE, TYPES, GgufTensor, pieces, tensors_of
from surgery.export.vocabulary import Vocabulary, read_vocabulary
from surgery.files.atomic import check_file, new_file
from surgery.files.shard_file import ShardFile
from surgery.hub.skeleton import Skeleton
from surgery.layout.layout import Layout
from surgery.layout.roles import CARRIED
from surgery.planning.plan import recorded_pre_tokenizer
from surgery.process import Advance, Progress, spoken, stage
from surgery.tokenizer.kinds import check_pre_tokenizer
from surgery.tokenizer.tokenizer_file import read_pre_tokenizer

ALIGNMENT = 32
"""Tensors begin at multiples of it, counted from the first."""

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32, MXFP4: 38}
"""Type of most weights → ``general.file_type``, one of gguf's ``LlamaFileType``."""

QUANTIZED = re.compile(r"(i?q|tq)[1-8]_\w+", re.IGNORECASE)
"""Names of the types that llama.cpp's llama-quantize makes, such as Q4_K_M."""


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written."""

    type: str | None = None
    """What weights become, one of ``TYPES``; None is what most of them are."""
    pre: str | None = None
    """llama.cpp's name for the way that the tokenizer splits text, where nobody knows it."""
    force: bool = False
    """Whether a file that is there is replaced."""


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    output: Path
    nbytes: int
    """Of the file."""
    type: str
    """What the weights are."""
    pre: str
    """llama.cpp's name for the way that the tokenizer splits text."""
    tensors: dict[str, int]
    """Type → tensors of it."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What the user should know, one sentence each."""

    def facts(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {**asdict(self), "output": str(self.output)}

    def line(self) -> str:
        """Return the result in one line."""
        counted = ", ".join(f"{count} in {type_}" for type_, count in self.tensors.items())
        return (
            f"wrote {self.output}: {self.nbytes:,} bytes, tensors: {counted}; "
            f"pre-tokenizer {self.pre}; {spoken(self.seconds)}"
        )


def export_layout(
    layout: Layout, output: Path, options: ExportOptions, progress: Progress | None = None
) -> Exported:
    """Write the checkpoint of ``layout`` as one GGUF file.

    Memory is bounded by some windows, the tokenizer, and one expert's projection where the
    checkpoint has it transposed. ``progress`` is called with "export", the bytes written so far,
    and all bytes to write.

    Raises:
        OutputError: the file cannot be written, or the package gguf (extra ``gguf``) is missing.
        OptionError: the type or the name is none, or contradicts the name that is known.
        FamilyError: llama.cpp would run the model as another one, or its type is not in the table.
        TokenizerError: the tokenizer cannot be exported, or its pre-tokenizer is not known.
        CheckpointError: the weights are not on this disk, or are quantized.
    """
    started = time.perf_counter()
    type_ = options.type or _own_type(layout)
    _check(layout, output, options, type_)
    source = layout.checkpoint.path
    pre = _pre_tokenizer(source, options.pre)
    architecture = architecture_of(layout, pre)
    description = describe(layout, architecture)
    tensors = tensors_of(layout, architecture, type_, _names(architecture, layout))
    for name, values in description.tensors.items():
        tensors.append(GgufTensor(name, "f32", values.shape, values=values))
    vocabulary = read_vocabulary(layout.checkpoint, layout.vocab_size, pre)
    pre, total = vocabulary.pre, sum(_padded(tensor.nbytes) for tensor in tensors)
    if options.pre not in (None, pre):
        raise OptionError(
            "`pre`", f"has no effect, for this tokenizer needs {pre!r}", fix="leave it out"
        )
    check_space(output, total, resumable=False)
    notes = [*description.notes, *_notes(layout, tensors, type_, architecture.encoder)]
    if architecture.encoder:
        notes += text_note(layout, lowercased=bool(vocabulary.settings.get(LOWERCASE)))
    with new_file(output) as made:
        writer = _writer(layout, architecture, description, type_)
        _add_vocabulary(writer, vocabulary)
        _write_header(writer, made.file, tensors)
        del vocabulary, writer
        _write_tensors(made.file, tensors, stage(progress, "export", total))
    return Exported(
        output=output,
        nbytes=output.stat().st_size,
        type=type_,
        pre=pre,
        tensors=dict(Counter(tensor.type for tensor in tensors)),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _check(layout: Layout, output: Path, options: ExportOptions, type_: str) -> None:
    """Refuse, before the work, what could not be written after it."""
    source = layout.checkpoint.path
    check_file(output, [source], force=options.force)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        fix = "pip install 'compact-surgery[gguf]'"
        raise OutputError(output, "needs the package gguf", fix=fix) from error
    _check_type(type_, output)
    if Skeleton.at(source) is not None:
        raise CheckpointError(source, "has no weights on this disk", fix="download the model first")


def _check_type(type_: str, output: Path) -> None:
    if QUANTIZED.fullmatch(type_) and type_.lower() not in TYPES:
        raise OptionError(
            "`type`",
            "is one that llama.cpp makes from the file",
            expected=", ".join(TYPES),
            found=repr(type_),
            fix=f"leave it out, then run llama-quantize {output} OTHER.gguf {type_.upper()}",
        )
    check_choice("type", type_, TYPES)


def _pre_tokenizer(source: Path, given: str | None) -> str | None:
    """Return the name that is known, else the ``given`` one."""
    if given is not None:
        check_pre_tokenizer("pre", given)
    known = recorded_pre_tokenizer(source) or read_pre_tokenizer(source)
    if None not in (known, given) and known != given:
        raise OptionError(
            "`pre`",
            "contradicts the name that this tokenizer is known by",
            expected=known,
            found=repr(given),
            fix="leave it out",
        )
    return known or given


def _own_type(layout: Layout) -> str:
    """The type that most of the weights have."""
    sizes: Counter[str] = Counter()
    for ref in layout.by_name.values():
        sizes[OWN_TYPE.get(ref.dtype, "bf16")] += ref.nbytes
    return sizes.most_common(1)[0][0]


def _names(architecture: Architecture, layout: Layout) -> Any:
    """Return gguf's map of names, from transformers' to its own."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(numbers[architecture.name], layout.num_hidden_layers)


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


def _writer(
    layout: Layout, architecture: Architecture, description: Description, type_: str
) -> Any:
    """Return gguf's writer with all keys but the tokenizer's."""
    from gguf import GGML_QUANT_VERSION, GGUFValueType

    writer = _writer_class()(None, architecture.name)
    writer.add_type("model")
    writer.add_name(layout.checkpoint.path.resolve().name)
    opaque = layout.checkpoint.opaque
    writer.add_file_type(FILE_TYPES[MXFP4 if opaque is not None else type_])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in description.values.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.BOOL)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    return writer


def _writer_class() -> type:
    """Return gguf's writer, made to pack an array at once. With its own loop, the header of 128,256
    tokens and 127,744 merges takes 0.75 s, not 0.35.
    """
    from gguf import GGUFValueType as Kind
    from gguf import GGUFWriter

    numbers = {Kind.INT32: "<i4", Kind.FLOAT32: "<f4"}

    class Writer(GGUFWriter):
        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if sub_type is Kind.STRING:
                texts = (text.encode() for text in val)
                data = b"".join(part for text in texts for part in (pack("<Q", len(text)), text))
            elif sub_type in numbers:
                data = np.asarray(val, numbers[sub_type]).tobytes()
            else:
                return super()._pack_val(val, vtype, add_vtype, sub_type)
            return pack("<IIQ", vtype, sub_type, len(val)) + data

    return Writer


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys."""
    from gguf import GGUFValueType as Kind

    def add_array(key: str, values: Any, kind: Kind) -> None:
        if len(values):
            writer.add_key_value(f"tokenizer.ggml.{key}", values, Kind.ARRAY, kind)

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    add_array("tokens", vocabulary.texts.tolist(), Kind.STRING)
    add_array("token_type", vocabulary.kinds, Kind.INT32)
    if vocabulary.scores is not None:
        add_array("scores", vocabulary.scores, Kind.FLOAT32)
    if vocabulary.merges is not None:
        add_array("merges", vocabulary.merges, Kind.STRING)
    if vocabulary.characters:
        add_array("precompiled_charsmap", list(vocabulary.characters), Kind.UINT8)
    for key, value in vocabulary.settings.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    if vocabulary.templates:
        named = [{"name": n, "template": t} for n, t in vocabulary.templates.items()]
        writer.add_chat_template(named)


def _write_header(writer: Any, file: BinaryIO, tensors: Sequence[GgufTensor]) -> None:
    """Write keys and the list of tensors, up to where the first tensor begins."""
    from gguf import GGMLQuantizationType
    from gguf.gguf_writer import WriterState

    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type.upper()]
        # Any dtype but uint8, which would say that the shape is in bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("f4"), tensor.nbytes, kind)
    # The writer takes a path only; this is what it does with one.
    writer.fout, writer.state = [file], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file.write(bytes(-file.tell() % ALIGNMENT))
    file.flush()


def _write_tensors(file: BinaryIO, tensors: Sequence[GgufTensor], advance: Advance) -> None:
    """Append the tensors, each padded."""
    output = file.fileno()
    paths = {part.ref.path for tensor in tensors for part in tensor.parts}
    with ExitStack() as stack:
        shards = {path: stack.enter_context(ShardFile(path)) for path in sorted(paths)}
        for tensor in tensors:
            for piece in pieces(tensor, shards):
                write_all(output, np.ascontiguousarray(piece).reshape(-1).data.cast("B"))
                advance(piece.nbytes)
            padding = _padded(tensor.nbytes) - tensor.nbytes
            write_all(output, memoryview(bytes(padding)))
            advance(padding)


def _notes(layout: Layout, tensors: Sequence[GgufTensor], type_: str, encoder: bool) -> list[str]:
    notes = []
    values, _ = BLOCK[type_]
    wide = [t for t in tensors if t.type == "f16" != type_]
    if wide:
        notes.append(
            f"{len(wide)} matrices are f16, for their rows are no multiple of {values}: "
            f"{wide[0].name} has rows of {wide[0].shape[-1]:,}"
        )
    if not encoder and any(role.slot is CARRIED for role in layout.roles.values()):
        notes.append("the language model alone is in the file; encoders are left out")
    return notes
