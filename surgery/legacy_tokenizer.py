"""tokenizer.json of a checkpoint that has vocab.json and merges.txt instead.

Built as transformers 5 builds it. Refused are names of special tokens to which transformers 4
would give other ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from surgery.errors import TokenizerError
from surgery.jsonfile import read_file, read_json
from surgery.legacy_added_tokens import (
    CONFIG_NAME,
    SAVE,
    Recipe,
    add_tokens,
    optional_json,
    post_processor,
    special_settings,
)
from surgery.model_files import LEGACY_NAMES, TOKENIZER_NAME, tokenizer_files
from surgery.selection import MAX_SIZE
from surgery.tokenizer_checks import AGAIN, check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_NAME, MERGES_NAME = LEGACY_NAMES[:2]

RECIPES = {
    "GPT2Tokenizer": Recipe(("bos_token", "eos_token", "unk_token")),
    "Qwen2Tokenizer": Recipe(
        ("eos_token", "unk_token", "pad_token"),
        split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        plain_special=True,
    ),
}
"""tokenizer_class, without Fast → recipe."""

CLASS_OF_TYPE = {"qwen2": "Qwen2Tokenizer"}
"""model_type → the class that transformers 5 takes, whatever tokenizer_config.json says."""


def is_legacy(directory: Path) -> bool:
    """Whether the tokenizer has to be built: vocab.json and merges.txt, no tokenizer.json."""
    return directory / MERGES_NAME in tokenizer_files(directory)


def build_tokenizer(directory: Path) -> dict[str, Any]:
    """Return the tokenizer.json that ``directory`` lacks.

    Raises:
        TokenizerError: vocab.json or merges.txt is absent, the files contradict each other, or
            their tokenizer_class is none that is known.
        CheckpointError: one of the files is no JSON object.
    """
    if not is_legacy(directory):
        alone = [name for name in (VOCAB_NAME, MERGES_NAME) if (directory / name).exists()]
        raise TokenizerError(
            directory / TOKENIZER_NAME,
            "is missing",
            found=f"{alone[0]} alone" if alone else None,
            fix="save the tokenizer with transformers' AutoTokenizer, or keep the vocabulary whole",
        )
    vocab = read_json(directory / VOCAB_NAME)
    try:
        settings, extra = special_settings(directory)
        recipe = _recipe(directory, settings.get("tokenizer_class"))
        tokenizer = _byte_level_bpe(directory, vocab, recipe, settings)
        roles = add_tokens(tokenizer, directory, recipe, settings, extra)
        tokenizer.post_processor = post_processor(tokenizer, settings, roles)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of another form
        where = directory / CONFIG_NAME
        raise TokenizerError(where, "cannot be read", found=repr(error), fix=SAVE) from error
    data: dict[str, Any] = msgspec.json.decode(tokenizer.to_str())
    data["model"]["vocab"] = vocab  # the library drops one of two tokens with the same id
    check_tokenizer(data, directory / VOCAB_NAME)
    return data


def _recipe(directory: Path, class_: Any) -> Recipe:
    name = str(class_).removesuffix("Fast")
    model_type = str(optional_json(directory / "config.json").get("model_type"))
    expected = CLASS_OF_TYPE.get(model_type, name)
    if name not in RECIPES or name != expected:
        raise TokenizerError(
            f"{directory / CONFIG_NAME}: tokenizer_class",
            "is none that a tokenizer.json can be built for",
            expected=expected if name in RECIPES else " or ".join(RECIPES),
            found=class_ or "none",
            fix=SAVE,
        )
    return RECIPES[name]


def _byte_level_bpe(
    directory: Path, vocab: dict[str, Any], recipe: Recipe, settings: Mapping[str, Any]
) -> "Tokenizer":
    """The tokenizer without its added tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # The library counts up to the largest id when it writes the tokenizer.
    if not all(type(id_) is int and 0 <= id_ < MAX_SIZE for id_ in vocab.values()):
        raise TokenizerError(directory / VOCAB_NAME, "has an id that is no number", fix=AGAIN)
    merges = _merges(directory / MERGES_NAME)
    no_affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **no_affixes))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            directory / MERGES_NAME, f"does not fit {VOCAB_NAME}", found=error, fix=AGAIN
        ) from error
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=recipe.split is None
    )
    tokenizer.pre_tokenizer = byte_level
    if recipe.split is not None:
        split = pre_tokenizers.Split(Regex(recipe.split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _merges(path: Path) -> list[tuple[str, str]]:
    """The rules of merges.txt; a line ends at a newline only, for tokens may hold any other."""
    try:
        text = read_file(path).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(path, "is not UTF-8", found=error, fix=AGAIN) from error
    merges = []
    for number, line in enumerate(text.split("\n") if text else (), 1):
        if line.startswith("#version"):
            continue
        parts = line.removesuffix("\r").split(" ")
        if len(parts) != 2:
            raise TokenizerError(
                f"{path}: line {number}", "is no pair of tokens", found=repr(line[:80]), fix=AGAIN
            )
        merges.append((parts[0], parts[1]))
    return merges
