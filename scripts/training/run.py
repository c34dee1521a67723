"""The folder of a training run, from which a killed run goes on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from scripts.training.data import TrainingData, read_books, train_tokenizer, write_ids
from scripts.training.recipe import RECIPES


class Run:
    """The folder of one run: settings, tokenizer, token ids, checkpoint, curves.

    Raises:
        ValueError: if the folder holds something else, or a run of other settings.
    """

    def __init__(self, folder: Path, corpus: Path, recipe_name: str, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.recipe = RECIPES[recipe_name]
        settings = {"corpus": corpus.name, "seed": seed, "recipe": recipe_name, **asdict(self.recipe)}
        text = json.dumps(settings, indent=1)
        file = folder / "settings.json"
        if not file.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"{folder} is not empty and holds no run; name another --output")
            texts, held_out = read_books(corpus, self.recipe.corpus_characters)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)
            self.prepare(texts, held_out)
        elif file.read_text(encoding="utf-8") != text:
            raise ValueError(f"{folder} holds a run of other settings (settings.json); name another --output")
        elif not (folder / "ids.bin").exists():  # killed while it prepared
            self.prepare(*read_books(corpus, self.recipe.corpus_characters))
        ids = np.memmap(folder / "ids.bin", dtype=np.uint16, mode="r")
        self.data = TrainingData(ids, Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")), seed)

    def prepare(self, texts: list[str], held_out: str) -> None:
        tokenizer = train_tokenizer(texts, self.recipe.vocab_size, self.seed)
        tokenizer.save_pretrained(self.folder / "tokenizer")
        write_atomically(self.folder / "held_out.txt", held_out)
        write_ids(texts, tokenizer.backend_tokenizer, self.folder / "ids.bin")

    def save(self, state: dict[str, Any]) -> None:
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")

    def load(self, device: str) -> dict[str, Any] | None:
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return None
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        return state

    def truncate(self, name: str, header: Sequence[str], steps: int) -> None:
        """Drop the rows that a killed run wrote after its last checkpoint."""
        file = self.folder / name
        rows = list(csv.reader(file.open())) if file.exists() else []
        kept = [row for row in rows[1:] if len(row) == len(header) and int(row[0]) <= steps]
        write_atomically(file, "\n".join(",".join(row) for row in [list(header), *kept]) + "\n")


def write_atomically(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
