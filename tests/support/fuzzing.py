"""Hostile checkpoints, plans and statistics by chance: what to spoil, and a watch over the run."""

import hashlib
import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from surgery.api import apply_plan
from surgery.files.model_files import tokenizer_files
from surgery.stats.channel_stats import KEY, ChannelStats
from tests.support import fp8, tiny
from tests.support.generated_tokenizers import tokenizer_json
from tests.support.plans import layout_of, random_plan, random_stats
from tests.support.sentencepiece_models import source

SECONDS = 30
"""A command that takes longer hangs: they take a tenth of a second."""


def save_sentencepiece(path: Path, kind: str) -> None:
    """A tiny Llama with a trained SentencePiece vocabulary in both forms."""
    tiny.save(path, vocab_size=900)
    made = source(kind)
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    data = json.loads(made.tokenizer.to_str())
    data["decoder"] = {"type": "Sequence", "decoders": decoders}
    (path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    (path / "tokenizer.model").write_bytes(made.data)


def save_wordpiece(path: Path) -> None:
    """A tiny Llama with a WordPiece vocabulary."""
    tiny.save(path)
    names = [*tiny.SPECIAL, *(p + c for c in "abcdefghijklmnopqrstuvwxyz" for p in ("", "##"))]
    names += [f"##{word}" for word in ("ing", "er", "tion", "ed", "es")] + ["the", "of", "and"]
    model = {
        "type": "WordPiece",
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: id_ for id_, token in enumerate(names)},
    }
    parts = {"pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": None}
    data = tokenizer_json(model, [], **parts)
    (path / "tokenizer.json").write_text(json.dumps(data), "utf-8")


def save_legacy(path: Path) -> None:
    """A tiny Llama whose tokenizer has to be built from vocab.json and merges.txt."""
    tiny.save(path)
    model = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    rules = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{rules}", "utf-8")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "GPT2Tokenizer", **roles}
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


BUILDERS: dict[str, Callable[[Path], object]] = {
    "llama": lambda path: tiny.save(path, "llama", sharded=True),
    "qwen3_moe": lambda path: tiny.save(path, "qwen3_moe"),
    "deepseek_v3": lambda path: tiny.save(path, "deepseek_v3"),
    "gpt_oss": lambda path: tiny.save(path, "gpt_oss"),
    "gemma3": lambda path: tiny.save(path, "gemma3"),
    "fp8": lambda path: fp8.save(path, "qwen3", apart=True),
    "bpe": lambda path: save_sentencepiece(path, "bpe"),
    "unigram": lambda path: save_sentencepiece(path, "unigram"),
    "wordpiece": save_wordpiece,
    "legacy": save_legacy,
}
"""Kinds of benches: sharded, of experts, with shared ones, packed, wrapped, in FP8; then other
vocabularies than byte-level BPE."""

BESIDE = {
    "evil.py": "open('run', 'w')\n",
    "README.md": "license: mit\n",
    "LICENSE": "free",
    "chat_template.jinja": "{{ messages }}",
}
"""Files that tiny checkpoints lack."""

VOCAB_SIZE = 512


def build_bench(root: Path, kind: str) -> str:
    """Make ``root`` a bench of model, text, statistics, plan and output; return the sizes."""
    BUILDERS[kind](root / "model")
    (root / "text.txt").write_text(tiny.prose(3_000), "utf-8")
    for name, content in BESIDE.items():
        (root / "model" / name).write_text(content, "utf-8")
    layout = layout_of(root / "model")
    random_stats(layout).save(root / "stats.safetensors")
    widths = {key: max(16, size // 32 * 16) for key, size in layout.widths.items()}
    plan = random_plan(root / "model", VOCAB_SIZE, widths)
    plan = msgspec.structs.replace(plan, source="model")
    plan.save(root / "plan.json")
    apply_plan(plan, source=root / "model", output=root / "cut")
    given = " ".join(f"--width {key}={size}" for key, size in widths.items())
    return f"--vocab-size {VOCAB_SIZE} {given}"


def fit_again(root: Path) -> None:
    """Let plan and statistics belong to the spoilt model, as a forger would."""
    model = root / "model"
    shards = sorted(model.glob("*.safetensors"))
    read = [model / "config.json", *tokenizer_files(model), *shards]
    if not all(
        path.is_file() and path.stat().st_size > 8
        for path in (*read, root / "plan.json", root / "stats.safetensors")
    ):
        return
    digest = hashlib.sha256()
    for path in read[: len(read) - len(shards)]:
        digest.update(path.read_bytes())
    for shard in shards:
        raw = shard.read_bytes()
        digest.update(shard.name.encode())
        digest.update(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    plan = json.loads((root / "plan.json").read_text("utf-8"))
    plan["fingerprint"] = digest.hexdigest()
    (root / "plan.json").write_text(json.dumps(plan), "utf-8")
    stats = root / "stats.safetensors"
    info = msgspec.to_builtins(ChannelStats.load(stats).info)
    info["fingerprint"] = digest.hexdigest()
    save_file(load_file(stats), stats, {KEY: json.dumps(info)})


# JSON.

DEEP = 50_000
TEXTS = (
    "null", "true", "false", "0", "1", "2", "3", "-1", "-2", "0.5", "1e308", "1e999", "-0.0",
    "NaN", "Infinity", "-Infinity", "4", "96", "512", "640", "641", "1000000000",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "-9223372036854775809",
    "1" * 400, "1" * 5_000, '""', '"x"', '"1"', '"-1"', '"../../../etc/passwd"', '"/etc/passwd"',
    '"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"\\n"', '"{layer}"', '"{0}"', '"<unk>"',
    '"llama"', '"evil.Evil"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", "[null]", "[0]",
    "[1, 2]", '["x"]', "[-1]", "[1e999]", "[[1, 2], [3]]", '{"a": 1}', '{"content": "x"}',
    '{"content": "x", "id": 3}', '{"content": [], "id": {}}', '{"ids": ["x"]}', '{"": null}',
    "[" * 90 + "]" * 90, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 100,
    "", ",", "1 2", "// x", "'x'", "[9223372036854775807]", "[0, 0]", "[1000000000, 1000000000]",
)  # fmt: skip
"""What stands in place of a value."""

KEYS = (
    "", "x", "__proto__", "../x", "\0", "\n", "0", "-1", "a" * 10_000, "{layer}", "model_type",
    "text_config", "auto_map", "quantization_config", "eos_token_id", "n_shared_experts",
    "num_nextn_predict_layers", "weight_map", "metadata", "total_parameters", "__metadata__",
    "added_tokens_decoder", "bad_words_ids", "sequence_bias", "vocab_size", "ids", "padding",
    "dtype", "chat_template", "vision_config", "vocab_offset", "unk_id", "merges",
    "model.layers.0.mlp.gate_proj.weight", "model.layers.99999999999.mlp.up_proj.weight",
    "model.layers." + "9" * 5_000 + ".x", "model.embed_tokens.weight_scale_inv",
)  # fmt: skip
"""What keys are renamed to, and under what values are added."""

OPERATIONS = ("value", "value", "value", "number", "remove", "rename", "add", "twice", "copy")


@dataclass
class Document:
    """A JSON document that is spoilt piece by piece; raw text stands behind marks until the end."""

    value: Any
    raw: dict[str, str] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        """A string for which the text has ``text``."""
        name = f"@@{len(self.raw)}@@"
        self.raw[json.dumps(name)] = text
        return name

    def text(self) -> str:
        """The spoilt document."""
        text = json.dumps(self.value)
        for name, raw in self.raw.items():
            text = text.replace(name, raw)
        return text


@st.composite
def spoilt(draw: st.DrawFn, text: str) -> str:
    """The JSON ``text`` with one to three things wrong."""
    document = Document(json.loads(text))
    for _ in range(draw(st.integers(1, 3))):
        operation = draw(st.sampled_from(OPERATIONS))
        parents: list[Any] = []
        found = document.value
        while isinstance(found, dict | list) and found:
            parents.append(found)
            keys = list(found) if isinstance(found, dict) else range(len(found))
            key = draw(st.sampled_from(keys))
            found = found[key]
            if draw(st.integers(0, 2)) == 0:
                break
        if parents:
            spoil(document, parents[-1], key, operation, draw)
    return document.text()


def spoil(document: Document, parent: Any, key: Any, operation: str, draw: st.DrawFn) -> None:
    """Do one thing to ``parent[key]``."""
    new = document.mark(draw(st.sampled_from(TEXTS)))
    if operation == "number" and type(parent[key]) is int:
        parent[key] += draw(st.sampled_from((-1, 1, 2**31, -(2**31), 2**63)))
    elif operation == "remove":
        del parent[key]
    elif operation == "copy":
        other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else parent))
        parent[key] = parent[other] if isinstance(parent, dict) else other
    elif isinstance(parent, dict) and operation == "rename":
        parent[draw(st.sampled_from((*KEYS, *parent)))] = parent.pop(key)
    elif isinstance(parent, dict) and operation == "add":
        parent[draw(st.sampled_from(KEYS))] = new
    elif isinstance(parent, dict) and operation == "twice":
        name = json.dumps(key)
        parent[key] = document.mark(f"1, {name}: {json.dumps(parent[key])}")
    elif isinstance(parent, list) and operation in ("add", "rename", "twice"):
        parent.append(new)
    else:
        parent[key] = new


# Files.

Damage = Callable[[Path], None]
"""Spoils a file."""


def _write(data: bytes) -> Damage:
    return lambda path: _put(path, lambda: path.write_bytes(data))


def _link(target: str) -> Damage:
    return lambda path: _put(path, lambda: path.symlink_to(target))


def _put(path: Path, make: Callable[[], object]) -> None:
    path.unlink(missing_ok=True)
    make()


SPECIAL: dict[str, Damage] = {
    "gone": lambda path: path.unlink(missing_ok=True),
    "directory": lambda path: _put(path, path.mkdir),
    "fifo": lambda path: _put(path, lambda: os.mkfifo(path)),
    "endless": _link("/dev/zero"),
    "null": _link("/dev/null"),
    "loop": lambda path: _put(path, lambda: path.symlink_to(path.name)),
    "dangling": _link("../nowhere"),
    "outside": _link("../../outside/secret"),
    "absolute": _link("/etc/passwd"),
    "process": _link("/proc/self/mem"),
    "empty": _write(b""),
    "brackets": _write(b"[" * 100_000),
    "text": _write(b"version https://git-lfs.github.com/spec/v1\n"),
    "not UTF-8": _write(b'{"\xff": 1}'),
    "half a header": _write(struct.pack("<Q", 2**63) + b"{}"),
    "no header": _write(struct.pack("<Q", 2**64 - 1)),
    "empty object": _write(struct.pack("<Q", 2) + b"{}"),
}
"""What a file is replaced by."""


@st.composite
def bytes_spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes flipped, cut off, put in, or twice."""
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(raw) - 1, 4_096))))
        operation = draw(st.sampled_from(("flip", "cut", "insert", "repeat", "number")))
        if operation == "flip" and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif operation == "cut":
            del raw[at : at + draw(st.sampled_from((1, 8, 1_000, len(raw))))]
        elif operation == "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif operation == "repeat":
            raw[at:at] = raw[at : at + 100]
        else:
            raw[at : at + 8] = struct.pack("<Q", draw(st.sampled_from((0, 1, 2**63, 2**64 - 1))))
    return bytes(raw)


def header_text(data: bytes) -> str:
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]].decode("utf-8")


def with_header(data: bytes, text: str) -> bytes:
    """The safetensors file ``data`` with another header."""
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + body


@st.composite
def file_spoilt(draw: st.DrawFn, path: Path) -> None:
    """Spoil ``path`` in place: its JSON, its bytes, or what it is."""
    data = path.read_bytes()
    how = draw(st.sampled_from(("json", "json", "json", "json", "bytes", "special")))
    if how == "special":
        SPECIAL[draw(st.sampled_from(sorted(SPECIAL)))](path)
    elif how == "bytes" or path.suffix not in (".json", ".safetensors"):
        path.write_bytes(draw(bytes_spoilt(data)))
    elif path.suffix == ".json":
        path.write_text(draw(spoilt(data.decode("utf-8"))), "utf-8")
    elif path.name == "stats.safetensors" and draw(st.booleans()):
        header = json.loads(header_text(data))
        header["__metadata__"][KEY] = draw(spoilt(header["__metadata__"][KEY]))
        path.write_bytes(with_header(data, json.dumps(header)))
    else:
        path.write_bytes(with_header(data, draw(spoilt(header_text(data)))))


# The watch.


class Hang(BaseException):
    """A command did not come back."""


class Forbidden(BaseException):
    """A command did what none may do."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise ``Hang`` after ``SECONDS``."""

    def stop(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NEVER = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "socket.connect", "subprocess.Popen")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "os.utime")  # fmt: skip


class Watch:
    """Python's audit hook, which sees every file that is opened: writes belong into one place."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        """Where to write is allowed; None while nobody watches."""
        sys.addaudithook(self._see)

    @contextmanager
    def over(self, inside: Path) -> Iterator[None]:
        """Watch what is done here."""
        self.inside = inside
        try:
            yield
        finally:
            self.inside = None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in NEVER:
            raise Forbidden(f"{event} {arguments}")
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if event in CHANGES or opened:
            self._check(arguments[0])

    def _check(self, path: Any) -> None:
        if isinstance(path, int) or self.inside is None:
            return
        place = Path(os.fsdecode(path))
        above = place.parent.resolve()
        allowed = self.inside in (above, *above.parents) or place == Path(os.devnull)
        if not allowed and above.name != "__pycache__":
            raise Forbidden(f"wrote {place}")


def listing(root: Path) -> dict[str, tuple[int, ...]]:
    """Path → kind, size, time of change, of everything below ``root``; links are not followed."""
    found: dict[str, tuple[int, ...]] = {}
    for path in root.rglob("*"):
        facts = path.lstat()
        changes = (0, 0) if path.is_dir() else (facts.st_size, facts.st_mtime_ns)
        found[str(path.relative_to(root))] = (facts.st_mode, *changes)
    return found


def copy_bench(pattern: Path, root: Path) -> Path:
    """A fresh copy of a bench beside a directory with a secret; return the bench."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "outside").mkdir(parents=True)
    (root / "outside" / "secret").write_text('{"secret": 1}')
    shutil.copytree(pattern, root / "bench")
    return root / "bench"
