"""Which tokens of a context a press kept, as a value that draws itself: in a notebook, to a file, as a table.

The HTML holds its own style and script, a few KB beside the text, and follows the paper that it stands on, light or
dark: of the system, JupyterLab or Material for MkDocs. Text is escaped by Jinja. Knows texts and booleans. Does not
know models or presses.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.templates import render_html

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width">
<title>Kept tokens</title>
"""
PICTURES = (".png", ".svg", ".pdf")
BLUE = "#2459c4"


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """What each layer and head kept of a context.

    Attributes:
        press: its name and how much it was asked to remove.
        tokens: the text of each prefilled token.
        held_back: the text of each token that is fed after compression.
        kept: ``(L, H, P)`` for L layers, H key-value heads and P prefilled tokens: True where an entry can be attended.
        notes: what the press did at this length that a reader must know.
    """

    press: str
    tokens: tuple[str, ...]
    held_back: tuple[str, ...]
    kept: numpy.ndarray[Any, Any]
    notes: tuple[str, ...] = ()

    @cached_property
    def share(self) -> float:
        """Fraction of all entries that were kept."""
        return float(self.kept.mean()) if self.kept.size else 1.0

    @cached_property
    def share_per_token(self) -> numpy.ndarray[Any, Any]:
        """``(P,)``: the fraction of layers and heads that kept each token."""
        return self.kept.mean(axis=(0, 1))

    @cached_property
    def share_per_layer(self) -> numpy.ndarray[Any, Any]:
        """``(L,)``: the fraction of entries that each layer kept."""
        return self.kept.mean(axis=(1, 2))

    def to_frame(self) -> pandas.DataFrame:
        """A row per token: its text, the share that kept it, and that of each layer's heads."""
        import pandas

        by_layer = {f"layer {layer}": heads.mean(axis=0) for layer, heads in enumerate(self.kept)}
        return pandas.DataFrame({"token": self.tokens, "kept": self.share_per_token, **by_layer})

    def html(self) -> str:
        """A heat map over the text; layer and head are chosen in it. Opens by itself and in notebooks."""
        return heat_map(self)

    def figure(self) -> Figure:
        """A heat map of heads over places, with the share that kept each token above it.

        Raises:
            UsageError: if matplotlib is not installed.
        """
        return figure(self)

    def save(self, file: str | Path) -> None:
        """Write the heat map: ``.html``, or ``.png``, ``.svg`` and ``.pdf``.

        Raises:
            UsageError: for another ending.
        """
        file = Path(file)
        if file.suffix == ".html":
            file.write_text(PAGE + self.html(), encoding="utf-8")
        elif file.suffix in PICTURES:
            self.figure().savefig(file, dpi=160)
        else:
            raise UsageError(f"{file}: the ending must be one of .html, {', '.join(PICTURES)}")

    def _repr_html_(self) -> str:
        return self.html()


def heat_map(kept: KeptTokens) -> str:
    """A heat map over the text, in which a reader chooses layer and head."""
    rows = ["".join("01"[value] for value in head) for layer in kept.kept.tolist() for head in layer]
    name = hashlib.sha256("".join([kept.press, *kept.tokens, *rows]).encode()).hexdigest()[:10]
    return render_html("heat_map.html", kept=kept, rows=rows, name=f"kept-{name}", shown=_shown)


def _shown(token: str) -> str:
    """A token with its line breaks made visible; the break itself comes from the style sheet."""
    return token.replace("\r", "").replace("\n", "↵\n")


def figure(kept: KeptTokens) -> Figure:
    """A row per layer and head, a column per place; above it the share that kept each token.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'lm-eval-kvpress[report]'") from error
    num_layers, num_heads, num_tokens = kept.kept.shape
    drawn = Figure(figsize=(9, 1.6 + 0.09 * num_layers * num_heads), layout="constrained")
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    upper.bar(range(num_tokens), kept.share_per_token, width=1.0, color=BLUE)
    upper.set(ylim=(0, 1), yticks=[0, 1], yticklabels=["0", "100 %"], ylabel="kept by")
    upper.set_title(f"{kept.press}: {100 * kept.share:.1f} % of the entries kept", loc="left", fontsize="medium")
    cells = kept.kept.reshape(num_layers * num_heads, num_tokens)
    lower.imshow(cells, aspect="auto", cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
    _name_layers(lower, num_layers, num_heads)
    lower.set(xlabel="place in the context, in tokens", ylabel=f"layer ({num_heads} heads each)")
    return drawn


def _name_layers(axes: Any, num_layers: int, num_heads: int) -> None:
    """A tick in the middle of each layer's heads, and a line between layers."""
    axes.set_yticks([num_heads * layer + (num_heads - 1) / 2 for layer in range(num_layers)], range(num_layers))
    for layer in range(1, num_layers):
        axes.axhline(num_heads * layer - 0.5, color="black", linewidth=0.5)
