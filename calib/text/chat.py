"""Turn chats into text with the model's own chat template."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from calib.text.windows import special_ids
from surgery.errors import DataError, TokenizerError
from surgery.layout.layout import Layout
from surgery.text.documents import TextOptions
from surgery.text.rows import Chat
from surgery.tokenizer.tokenizer_file import load_tokenizer


def documents_of(layout: Layout, text: TextOptions) -> Iterable[str]:
    """Return the documents of a text, with chats rendered by the model's own template.

    Raises:
        DataError: as ``read_documents``.
    """
    return text.documents(ChatTemplate(layout.checkpoint.path))


class ChatTemplate:
    """Renders messages as transformers' ``apply_chat_template`` does, without tokenizing.

    transformers runs the template in jinja2's sandbox. Code of the checkpoint is never run. Nothing
    is loaded before the first chat.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, chat: Chat) -> str:
        """Return ``chat`` as text, without the special tokens that the post-processor adds.

        Raises:
            TokenizerError: the model has no chat template.
            DataError: the template refuses these messages.
        """
        from jinja2 import TemplateError

        before, after = self._around
        try:
            text: str = self._tokenizer.apply_chat_template(chat.messages, tokenize=False)
        except TemplateError as error:
            raise DataError(
                chat.where,
                "the chat template refuses the messages",
                found=error.message or "no reason",
                fix="correct the row",
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                chat.where,
                "the chat template does not fit the messages",
                expected="role and content in each",
                fix="correct the row",
            ) from error
        return text.removeprefix(before).removesuffix(after)

    @cached_property
    def _tokenizer(self) -> Any:
        """The library's tokenizer, with a chat template."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._directory, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # a tokenizer's files can make the library raise anything
            raise TokenizerError(
                self._directory,
                "transformers cannot load this tokenizer, whose chat template the text needs",
                fix="give text instead of messages",
            ) from error
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise TokenizerError(
                self._directory,
                "has no chat template, which a text of messages needs",
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                fix="add the model's template, or give text instead of messages",
            )
        return tokenizer

    @cached_property
    def _around(self) -> tuple[str, str]:
        """Text of the special tokens before and after every window."""
        tokenizer = load_tokenizer(self._directory)
        before, after = (
            "".join(tokenizer.id_to_token(token) or "" for token in ids)
            for ids in special_ids(tokenizer)
        )
        return before, after
