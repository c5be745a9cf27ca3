"""Benches, directories with all that commands need, and what spoils them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from surgery.files.model_files import INDEX_NAME
from surgery.stats.channel_stats import ChannelStats
from tests.support import json_files
from tests.support.command import Run, assert_refused
from tests.support.contents import digests

Damage = Callable[[Path], object]
"""Spoils something in a bench directory."""
SIZES = "--vocab-size 512 --intermediate-size 64"
INSPECT = "inspect model"
SIZES_ONLY = f"plan model {SIZES} -o new.json"
PLAN = f"plan model {SIZES} --stats stats.safetensors -o new.json"
APPLY = "apply plan.json -o out"
RESUME = f"{APPLY} --resume"
CALIBRATE = "calibrate model --seq-len 32 --samples 2 -o new.safetensors --data"
SCORE = "score model --samples 2 --data"
PRUNE = f"prune model --data text.txt --seq-len 32 --samples 2 {SIZES} -o"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"
SHARD_1, SHARD_2 = "model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"


class Case(NamedTuple):
    """What spoils a bench, and what a command then says."""

    name: str
    damage: Damage
    command: str
    words: tuple[str, ...]
    """All of them stand in the one line on stderr."""


def assert_refused_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    case.damage(bench)
    before = digests(bench)
    assert_refused(run(*case.command.split()), *case.words)
    assert digests(bench) == before


def nothing(_: Path) -> None:
    """The command alone is wrong."""


def each(*damages: Damage) -> Damage:
    """Do all of ``damages``."""

    def damage(root: Path) -> None:
        for one in damages:
            one(root)

    return damage


def remove(name: str) -> Damage:
    return lambda root: (root / name).unlink()


def write(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(raw)


def cut(name: str, size: int) -> Damage:
    """Keep the first ``size`` bytes, or all but the last ``-size``."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def append(name: str, tail: bytes) -> Damage:
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + tail)


def replace(name: str, old: str, new: str) -> Damage:
    """Replace text that must be there."""

    def damage(root: Path) -> None:
        content = (root / name).read_text("utf-8")
        assert old in content
        (root / name).write_text(content.replace(old, new, 1), "utf-8")

    return damage


def change(name: str, edit: json_files.Edit) -> Damage:
    """Let ``edit`` change the JSON in file ``name``."""
    return lambda root: json_files.change(root / name, edit)


def config(**changes: Any) -> Damage:
    return change("model/config.json", lambda data: data.update(changes))


def no_config_key(key: str) -> Damage:
    return change("model/config.json", lambda data: data.pop(key))


def weight_map(**changes: Any) -> Damage:
    names = {"embed": EMBED, "gate": GATE, "extra": "model.layers.0.extra.weight"}
    new = {names[key]: value for key, value in changes.items()}
    return change(f"model/{INDEX_NAME}", lambda data: data["weight_map"].update(new))


def tokenizer(edit: Callable[[Any], object]) -> Damage:
    return change("model/tokenizer.json", edit)


def plan_key(section: str | None, **changes: Any) -> Damage:
    def edit(data: Any) -> None:
        (data[section] if section else data).update(changes)

    return change("plan.json", edit)


def header(shard: str, tensor: str, tail: int = 0, **changes: Any) -> Damage:
    """Change entries of ``tensor`` in the header; add ``tail`` bytes to the file."""

    def damage(root: Path) -> None:
        path = root / "model" / shard
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        begin, end = entries[tensor]["data_offsets"]
        shift = changes.pop("shift", (0, 0))
        entries[tensor] |= {"data_offsets": [begin + shift[0], end + shift[1]], **changes}
        new = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :] + bytes(tail))

    return damage


def last_of(shard: str, **changes: Any) -> Damage:
    """Like ``header`` for the shard's last tensor."""

    def damage(root: Path) -> None:
        raw = (root / "model" / shard).read_bytes()
        entries = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        entries.pop("__metadata__", None)
        name = max(entries, key=lambda key: entries[key]["data_offsets"])
        header(shard, name, **changes)(root)

    return damage


def tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Let ``edit`` change the tensors; they become one shard without an index."""

    def damage(root: Path) -> None:
        found: dict[str, np.ndarray] = {}
        for path in (root / "model").glob("*.safetensors"):
            found |= load_file(path)
            path.unlink()
        edit(found)
        (root / "model" / INDEX_NAME).unlink()
        save_file(found, root / "model" / "model.safetensors", {"format": "pt"})

    return damage


def no_weights(root: Path) -> None:
    for path in [*(root / "model").glob("*.safetensors"), root / "model" / INDEX_NAME]:
        path.unlink()


def stats(**changes: Any) -> Damage:
    """Change the fields of the statistics' metadata; None for an array drops it."""

    def damage(root: Path) -> None:
        path = root / "stats.safetensors"
        info = msgspec.to_builtins(ChannelStats.load(path).info)
        arrays = load_file(path)
        for key, value in changes.items():
            if value is None:
                del arrays[key.replace("__", ".")]
            elif isinstance(value, np.ndarray):
                arrays[key.replace("__", ".")] = value
            else:
                info[key] = value
        save_file(arrays, path, {"compact_surgery": json.dumps(info)})

    return damage


def directory(name: str) -> Damage:
    return lambda root: (root / name).mkdir()


def model_key(**changes: Any) -> Damage:
    """Change keys of tokenizer.json's model."""
    return tokenizer(lambda data: data["model"].update(changes))
