"""tokenizer.model, the SentencePiece protobuf beside tokenizer.json, pruned to the kept tokens.

The file is edited record by record: what this module does not know is copied byte for byte.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import TokenizerError
from surgery.tokenizer.id_map import IdMap

PIECE, TRAINER_SPEC, SELF_TEST_DATA = (field << 3 | 2 for field in (1, 2, 4))
"""Tags of SentencePiece's ModelProto: a field's number, and 2 for a length and that many bytes."""
RUN_BYTES = 1 << 16
"""Most bytes of pieces that are parsed at a time."""
SPECIAL_IDS = ("unk_id", "bos_id", "eos_id", "pad_id")
NOT_NEEDED = "if your software does not need it"


def is_sentencepiece(data: bytes) -> bool:
    """Whether ``data`` is a SentencePiece model, judged by its first piece.

    Other files go by the name tokenizer.model too: tiktoken's ranks, a GGUF file, JSON.
    """
    if data[:1] != b"\n":  # field 1, the first piece
        return False
    try:
        _, start, end = next(_records(data))
    except IndexError:
        return False
    model = _parse(data[start:end])
    return model is not None and bool(model.pieces[0].HasField("piece"))


def prune_sentencepiece(data: bytes, path: Path, tokens: Mapping[str, int], ids: IdMap) -> bytes:
    """Return tokenizer.model for the kept tokens: same pieces, same order, same scores.

    Where no piece is removed and no id changes, ``data`` is returned as it is. Self-test data is
    removed: it names removed pieces, and older releases of SentencePiece would not load the file.

    Args:
        data: The source's tokenizer.model.
        path: Its path, for error messages only.
        tokens: Token → old id of every token of tokenizer.json.
        ids: Which ids are kept.

    Raises:
        TokenizerError: ``data`` is damaged or contradicts ``tokens``, a piece that SentencePiece
            needs is removed, or the pieces cannot keep the positions that their ids ask for.
    """
    if ids.identity:
        return data
    model = opened_model(data, path, f"download it again, or delete it {NOT_NEEDED}")
    old_ids = _token_ids(model, path, tokens)

    def new_ids() -> Iterator[int | None]:
        return (None if old is None else ids.new(old) for old in old_ids)

    if all(new == old for new, old in zip(new_ids(), old_ids, strict=True)):
        return data
    _check_needed(model, path, new_ids())
    _check_positions(model, path, old_ids, new_ids())
    return without_pieces(data, model, [new is not None for new in new_ids()])


def pieces_of(data: bytes) -> Iterator[Any] | None:
    """Return the pieces of a tokenizer.model in their order; None where it is another format."""
    model = _Model.of(data) if is_sentencepiece(data) else None
    return model.pieces if model is not None else None


class _Model:
    """A ModelProto that parses some thousand pieces at a time: all would take 4 times ``data``."""

    def __init__(self, data: bytes, runs: list[tuple[int, int]], rest: Any) -> None:
        """Read the pieces from the byte ranges ``runs`` of ``data``, all else from ``rest``."""
        self._data, self._runs = data, runs
        self.trainer_spec = rest.trainer_spec
        self.normalizer_spec = rest.normalizer_spec

    @classmethod
    def of(cls, data: bytes) -> "_Model | None":
        """Return ``data`` as a model, or None if it is not one."""
        runs: list[tuple[int, int]] = []
        rest, last = bytearray(), 0
        try:
            for tag, start, last in _records(data):
                if tag != PIECE:
                    rest += data[start:last]
                elif runs and runs[-1][1] == start and last - runs[-1][0] < RUN_BYTES:
                    runs[-1] = runs[-1][0], last
                else:
                    runs.append((start, last))
        except IndexError:
            return None
        parsed = _parse(bytes(rest) + data[last:])
        if parsed is None or any(_parse(data[start:end]) is None for start, end in runs):
            return None
        return cls(data, runs, parsed)

    @property
    def pieces(self) -> Iterator[Any]:
        """Every piece, in order."""
        for start, end in self._runs:
            yield from _parse(self._data[start:end]).pieces


def opened_model(data: bytes, path: Path, fix: str) -> _Model:
    """Return ``data``, the content of ``path``, as a model.

    Raises:
        TokenizerError: it is not one.
    """
    model = _Model.of(data) if is_sentencepiece(data) else None
    if model is None:
        raise TokenizerError(
            path,
            "cannot be read",
            expected="a SentencePiece model",
            found=f"{len(data):,} bytes that end early, are damaged or of another format",
            fix=fix,
        )
    return model


def _parse(data: bytes) -> Any:
    """Return ``data`` as a ModelProto, or None if it is not one."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # a generated module without types
    try:
        return messages.ModelProto.FromString(data)
    except DecodeError:
        return None


def _token_ids(model: Any, path: Path, tokens: Mapping[str, int]) -> list[int | None]:
    """Old token id of every piece, None for a piece that occurs in no tokenized text.

    Only the UNUSED pieces of a Unigram model never occur: tokenizer.json may leave them out. BPE
    still merges through UNUSED pieces, so there they must be tokens like the others.
    """
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    has_tab = any(piece.piece == "\t" for piece in model.pieces)
    # Gemma 1 and 2 have this byte as a tab in tokenizer.json
    renamed = {} if "<0x09>" in tokens or has_tab else {"<0x09>": "\t"}
    found: list[int | None] = []
    for index, piece in enumerate(model.pieces):
        token = renamed.get(piece.piece, piece.piece)
        if token not in tokens and not (unigram and piece.type == piece.UNUSED):
            raise TokenizerError(
                f"{path}: piece {piece.piece!r}",
                "contradicts tokenizer.json",
                expected="a token of this text",
                found=f"piece {index} without a token",
                fix=f"take both files from one model, or delete {path.name} {NOT_NEEDED}",
            )
        found.append(tokens.get(token))
    return found


def _check_needed(model: Any, path: Path, new_ids: Iterable[int | None]) -> None:
    """Refuse to remove what SentencePiece needs to load: unk, and the bytes it falls back to."""
    needed = {model.trainer_spec.unk_id}
    for index, (piece, new) in enumerate(zip(model.pieces, new_ids, strict=True)):
        byte = piece.type == piece.BYTE and model.trainer_spec.byte_fallback
        if new is None and (byte or piece.type == piece.UNKNOWN or index in needed):
            raise TokenizerError(
                f"{path}: piece {piece.piece!r}",
                "must be kept for text that has no pieces of its own",
                expected="its token among the kept ones",
                found="it among the removed ones",
                fix=f"keep the token, or delete {path.name} {NOT_NEEDED}",
            )


def _check_positions(
    model: Any, path: Path, old_ids: Sequence[int | None], new_ids: Iterable[int | None]
) -> None:
    """Refuse to change the offset between the positions of pieces and their token ids.

    Software computes the id from the position: mostly they are equal, in fairseq the id is one
    larger. Where less than half of the pieces have the same offset, there is nothing to refuse.
    """
    offsets = Counter(old - index for index, old in enumerate(old_ids) if old is not None)
    if 2 * max(offsets.values(), default=0) <= len(old_ids):
        return
    position = 0
    for index, (piece, old, new) in enumerate(zip(model.pieces, old_ids, new_ids, strict=True)):
        if new is None or old is None:
            continue
        offset = old - index
        if position + offset != new:
            raise TokenizerError(
                f"{path}: piece {piece.piece!r}",
                "would be taken for another token, because tokens without a piece are kept or "
                "removed",
                expected=f"its new token id {new}",
                found=f"id {position + offset} by its position",
                fix=f"delete {path.name} {NOT_NEEDED}",
            )
        position += 1


def without_pieces(data: bytes, model: Any, keep: Sequence[bool]) -> bytes:
    """Copy ``data`` without the removed pieces and with a corrected trainer spec."""
    spec = _trainer_spec(model, keep)
    keep_next = iter(keep)
    copied = bytearray()
    for tag, start, end in _records(data):
        if tag == PIECE and not next(keep_next):
            continue
        if tag == TRAINER_SPEC:  # one in several parts is written whole where the first part was
            copied += spec
            spec = b""
        elif tag != SELF_TEST_DATA:
            copied += data[start:end]
    copied += spec
    return bytes(copied)


def _trainer_spec(model: Any, keep: Sequence[bool]) -> bytes:
    """Return the record of the trainer spec with its new size and new ids of special pieces.

    An id left out of the file means 0 for unk, 1 for bos, 2 for eos and -1 for pad. An id that
    changes is written. -1 means "none": it does not change, and a removed piece gets it.
    """
    edited = _parse(b"")
    edited.trainer_spec.CopyFrom(model.trainer_spec)
    spec = edited.trainer_spec
    spec.vocab_size = sum(keep)
    for name in SPECIAL_IDS:
        old = getattr(spec, name)
        new = sum(keep[:old]) if 0 <= old < len(keep) and keep[old] else -1
        if new != old:
            setattr(spec, name, new)
    return bytes(edited.SerializeToString())


def _records(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, start and end of each top-level record of a protobuf message.

    Raises:
        IndexError: the data ends within a number.
    """
    start = end = depth = 0
    while end < len(data):
        tag, end = _varint(data, end)
        wire_type = tag & 7
        if wire_type == 0:
            _, end = _varint(data, end)
        elif wire_type == 1:
            end += 8
        elif wire_type == 2:
            size, end = _varint(data, end)
            end += size
        elif wire_type == 5:
            end += 4
        else:  # the start or the end of a group, which holds records of its own
            depth += 1 if wire_type == 3 else -1
        if not depth:
            yield tag, start, end
            start = end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at ``position``, seven bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise IndexError("a number of more than ten bytes")
