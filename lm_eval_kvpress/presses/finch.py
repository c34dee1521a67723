"""FINCH with the question's length given, where kvpress's class reads it off a delimiter token in the prompt.

kvpress adds a token to the tokenizer and the embeddings, sets it between context and question, and takes it out again
behind the embedding layer. Here the boundary is known before tokens are made. Scores and choice are kvpress's own. Does
not know models, or where a question begins.

Source: doi 10.1162/tacl_a_00716; kvpress ``presses/finch_press.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import kvpress


@dataclass
class QuestionFinchPress(kvpress.FinchPress):
    """FINCH: an entry of the context stays by the attention that the question behind it pays it.

    Args:
        window_size: tokens of the question, the last ones of what is compressed; they all stay.
    """

    window_size: int = 0

    __call__ = kvpress.BasePress.__call__  # kvpress's own looks for the delimiter
