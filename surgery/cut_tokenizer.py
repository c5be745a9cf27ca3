"""Text cut by the pruned tokenizer, in the ids of the source: what the dense model can be shown."""

from typing import TYPE_CHECKING

import numpy as np

from surgery.idmap import IdMap
from surgery.tokenizer import TokenizerFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def cut_tokenizer(tokenizer: TokenizerFile, ids: IdMap) -> tuple["Tokenizer", np.ndarray]:
    """Return the pruned tokenizer, without truncation and padding, and what its ids were before.

    Returns:
        The library's tokenizer, which gives new ids, and int64 ``[V' + rowless]``: the old id of
        each. Tokens without a row keep their places behind the last one.

    Raises:
        TokenizerError: something that every text gets does not stay.
    """
    cut = TokenizerFile(tokenizer.path, tokenizer.rewrite(ids)).library()
    cut.no_truncation()
    cut.no_padding()
    rowless = np.arange(ids.old_size, ids.old_size + ids.rowless)
    return cut, np.concatenate([ids.kept, rowless])
