"""What the built-in checkpoint is trained on: book text, repeated segments and recall documents, as ids.

`batch` is a pure function of (seed, step): a killed run that continues sees the data it would have seen.
Why repeats: a small model learns to look back only once copying has emerged, and documents that repeat a
segment (induction: Olsson et al. 2022, arXiv 2209.11895) make it emerge within some 5 M tokens
(docs/experiments/builtin_training.md).
"""

import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lm_eval_kvpress.recall import (
    GIVEN_NAMES,
    KINDS,
    NUM_CHOICES,
    WORDS,
    Fact,
    generated_filler,
    recall_document,
    sample_facts,
    scatter,
)
from scripts.training.recipe import Mixture

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.01  # of the corpus's characters, from its last books, never trained on


def read_books(corpus: Path, characters: int) -> tuple[list[str], str]:
    """Training texts, the same share of every book, and held-out text, the last books whole."""
    opener: Callable[..., object] = lzma.open if corpus.suffix == ".xz" else open
    try:
        with opener(corpus, "rt", encoding="utf-8") as file:  # type: ignore[attr-defined]
            books = [book.strip() for book in file.read().split(END_OF_TEXT)]
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the corpus {corpus}: {error}") from error
    books = [book for book in books if book]
    total = sum(map(len, books))
    if total < 20_000:
        raise ValueError(f"the corpus {corpus} holds {total} characters; at least 20000 are needed")
    held_out: list[str] = []
    while sum(map(len, held_out)) < HELD_OUT_SHARE * total and len(books) > 1:
        held_out.append(books.pop())
    if not held_out:
        cut = int(len(books[0]) * (1 - HELD_OUT_SHARE))
        books, held_out = [books[0][:cut]], [books[0][cut:]]
    per_book = max(characters // len(books), 1000)
    return [book[:per_book] for book in books], "\n\n".join(held_out)


def count_as_book_text(text: str) -> int:
    """Guess the tokens of a text while there is no tokenizer: a token of the built-in is 3.4 characters of a book."""
    return round(len(text) / 3.4)


def train_tokenizer(texts: list[str], vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Pythia's, with `<|endoftext|>` = 0.

    Recall documents join the sample, so that each answer word and given name is one token.
    """
    rng = random.Random(f"tokenizer {seed}")
    words = [f" {word}" for word in (*GIVEN_NAMES, *(word for group in WORDS.values() for word in group))]

    def sample() -> Iterator[str]:
        share = max(1, sum(map(len, texts)) // 15_000_000)
        yield from texts[::share]
        for kind in KINDS * 500:
            document = recall_document(rng.randrange(10**9), distance=100, kind=kind, count_tokens=count_as_book_text)
            yield document.context + document.question
        yield from ("".join(rng.sample(words, len(words))) for _ in range(400))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def write_ids(texts: list[str], tokenizer: Tokenizer, path: Path) -> None:
    """The texts as uint16 ids, each followed by `<|endoftext|>`."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        for start in range(0, len(texts), 16):
            for encoding in tokenizer.encode_batch(texts[start : start + 16]):
                np.array([*encoding.ids, 0], dtype=np.uint16).tofile(file)
    temporary.rename(path)


class TrainingData:
    """Rows of token ids, drawn by (seed, step)."""

    def __init__(self, ids: np.ndarray, tokenizer: Tokenizer, seed: int) -> None:
        self.ids = ids
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.seed = seed

    def batch(self, step: int, num_rows: int, num_tokens: int, mixture: Mixture) -> np.ndarray:
        """Token ids (num_rows, num_tokens), a pure function of the seed and the arguments."""
        rows = []
        for row in range(num_rows):
            rng = random.Random(f"{self.seed} {step} {row}")
            draw = rng.random()
            if draw < mixture.text:
                ids = self.text(rng, num_tokens)
            elif draw < mixture.text + mixture.repeats:
                ids = self.repeats(rng, num_tokens)
            else:
                ids = self.recall(rng, num_tokens, mixture.dense)
            rows.append(ids[:num_tokens])
        return np.array(rows, dtype=np.int64)

    def text(self, rng: random.Random, num_tokens: int) -> list[int]:
        start = rng.randrange(len(self.ids) - num_tokens)
        return [int(token) for token in self.ids[start : start + num_tokens]]

    def repeats(self, rng: random.Random, num_tokens: int) -> list[int]:
        """Segments of 8 to 40 tokens, random ids or text, that come back, at once or after a gap of text."""
        segments: list[list[int]] = []
        row: list[int] = []
        has_gaps = rng.random() < 0.5
        max_segments = 1 + num_tokens // 256
        while len(row) < num_tokens:
            if not segments or (len(segments) < max_segments and rng.random() < 0.2):
                length = rng.randint(8, 40)
                is_text = rng.random() < 0.5
                new = self.text(rng, length) if is_text else rng.choices(range(1, self.vocab_size), k=length)
                segments.append(new)
                row += new
            if has_gaps and rng.random() < 0.5:
                row += self.text(rng, rng.randint(1, num_tokens // 2))
            row += rng.choice(segments)
        return row

    def recall(self, rng: random.Random, num_tokens: int, dense: float) -> list[int]:
        """One or, in a long row, several recall documents, each with its questions after its context."""
        row: list[int] = [0] if rng.random() < 0.5 else []
        while len(row) < num_tokens:
            left = num_tokens - len(row)
            if left < 100:
                return row + self.text(rng, left)
            size = left if left < 256 or rng.random() < 0.7 else rng.randint(100, left)
            is_dense = dense > 0 and rng.random() < dense
            text = self.dense_recall_text(rng, size) if is_dense else self.recall_text(rng, size)
            row += self.tokenizer.encode(text).ids[:left] + [0]
        return row

    def recall_text(self, rng: random.Random, num_tokens: int) -> str:
        """Facts amid filler, then questions, about `num_tokens` altogether."""
        facts = self.facts(rng, rng.randint(2, min(24, max(3, num_tokens // 40))))
        asked = rng.sample(facts, rng.randint(1, min(len(facts), max(3, num_tokens // 100))))
        questions = "".join(fact.question + fact.answer for fact in asked) + "\n"
        statements = [fact.statement for fact in facts]
        used = self.count(questions) + self.count(" " + " ".join(statements))
        margin = 10  # generated filler overshoots by up to half a sentence, and a row cut short loses its answers
        return scatter(rng, self.filler(rng, max(num_tokens - used - margin, 0)), statements) + questions

    def dense_recall_text(self, rng: random.Random, num_tokens: int) -> str:
        """Facts amid little filler, then restated and asked for, again and again, to the end of the row.

        One or two questions a row teach a model to name *some* value of the text and no more; with ten and more
        it binds the value to its subject within 1 M tokens (docs/experiments/builtin_training.md).
        """
        facts = self.facts(rng, rng.randint(2, min(24, max(3, num_tokens // 32))))
        statements = [fact.statement for fact in facts]
        left = num_tokens - self.count(" ".join(statements))
        text = scatter(rng, self.filler(rng, round(rng.uniform(0, 0.6) * left)), statements)
        left = num_tokens - self.count(text)
        while True:
            fact = rng.choice(facts)
            more = f"\n{fact.statement}" if rng.random() < 0.5 else fact.question + fact.answer
            left -= self.count(more)
            if left < 2:
                return text + "\n"
            text += more

    def facts(self, rng: random.Random, num_facts: int) -> list[Fact]:
        """Facts of several kinds, some of them of one kind and attribute, in random order."""
        facts: list[Fact] = []
        taken: set[str] = set()
        while len(facts) < num_facts:
            group = min(num_facts - len(facts), rng.randint(1, NUM_CHOICES))
            facts += sample_facts(rng, rng.choice(KINDS), group, taken)
        rng.shuffle(facts)
        return facts

    def filler(self, rng: random.Random, num_tokens: int) -> str:
        """Generated prose, or book text: recall has to work amid both."""
        if rng.random() < 0.4:
            return generated_filler(rng, num_tokens, self.count)
        return str(self.tokenizer.decode(self.text(rng, num_tokens))).replace("\ufffd", "")

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)


def copy_rows(data: TrainingData, num_rows: int, num_tokens: int) -> np.ndarray:
    """Rows whose second half repeats the first, random ids: what the copying probe scores."""
    rng = random.Random(f"copy probe {data.seed}")
    halves = [rng.choices(range(1, data.vocab_size), k=num_tokens // 2) for _ in range(num_rows)]
    return np.array([half * 2 for half in halves], dtype=np.int64)
