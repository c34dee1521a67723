"""Generates recall documents: facts stated once amid filler, asked for after the context.

The question stands after the context on purpose: a press that compresses the context without having seen
the question must guess what will be asked for, and one that guesses badly loses the fact. The wrong choices
are other facts of the same document, so knowing *some* number of the text does not help: chance is 1 in 4.

Every choice comes from a `random.Random` seeded by the caller, so a document is a pure function of its seed.
Standard library only: nothing here knows of tokenizers, tensors or lm-eval. Training
(`scripts/training/data.py`) and the demo tasks (`tasks/demo`) use the same phrasing, with other seeds.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lm_eval_kvpress.errors import UsageError

CountTokens = Callable[[str], int]
Filler = Callable[[random.Random, int], str]

KINDS = ("word", "number", "place", "key")
NUM_CHOICES = 4
CHARACTERS_PER_TOKEN = 4.5  # of these documents, with the built-in's tokenizer and with Pythia's alike

# One token each: the training script adds them to the tokenizer's sample, and a test checks.
WORDS: dict[str, tuple[str, ...]] = {
    attribute: tuple(words.split())
    for attribute, words in (
        ("colour", "red blue green yellow white black brown purple golden silver grey scarlet"),
        ("animal", "dog cat horse bear wolf fox lion eagle sheep goat rabbit snake"),
        ("tree", "oak pine elm ash birch cedar maple willow apple cherry palm fir"),
        ("trade", "baker farmer sailor soldier doctor teacher priest hunter painter merchant tailor singer"),
        ("metal", "iron copper gold tin lead steel brass bronze zinc nickel chrome cobalt"),
        ("day", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Christmas Easter"),
    )
}
GIVEN_NAMES, NAME_STARTS, PERSON_ENDS, PLACE_ENDS = (
    tuple(names.split())
    for names in (
        "Adam Agnes Albert Alice Anna Arthur Barbara Charles Clara David Dorothy Edward Eleanor Ellen "
        "Emily Frank George Hannah Harry Helen Henry Hugh Isabel Jack Jacob James Jane John Joseph Julia "
        "Kate Laura Lewis Louis Lucy Margaret Mark Martha Martin Mary Michael Nancy Oliver Paul Peter "
        "Philip Rachel Ralph Richard Robert Rose Ruth Samuel Sarah Simon Stephen Susan Thomas Walter William",
        "Mar Hol Ald Bren Cas Dor Els Fen Gar Hart Kel Lin Mor Nor Os Pen Quin Ros Sel Thorn Ul Ver Wes Yar",
        "low win ric mund wick ley by ner lock man bert well",
        "mere ford ton bury dale stead field port haven combe bridge church",
    )
)
FILLER_SUBJECTS, FILLER_VERBS, FILLER_PLACES, FILLER_ENDS = (
    tuple(parts.split("|"))
    for parts in (
        "The old miller|A young clerk|The widow|Her brother|The ferryman|A tired traveller|The schoolmaster|"
        "The captain's wife|Every child in the street|The gardener|A stranger in a long coat|The innkeeper|"
        "My uncle|The two sisters|Nobody in the village|The night watchman",
        "walked slowly|sat for an hour|had often been seen|waited without a word|went back|stood in the rain|"
        "used to sing|slept badly|worked until dark|looked about|told a long story|was always to be found|"
        "stopped to rest|lost a glove|ate some bread and cheese|thought of other things",
        "by the river|near the church|in the market|under the bridge|at the end of the lane|beside the fire|"
        "on the road to the sea|behind the mill|in front of the inn|among the empty boxes|at the garden gate|"
        "on the stairs|in the empty hall|over the hill|at the corner of the square|along the wall",
        "|, as it was the custom|, and the bells began to ring|, although the evening was cold|"
        ", for no reason at all| while the wind turned|, and said nothing more of it|"
        ", before the lamps were lit| until the rain was over|"
        ", to the surprise of everyone|, with a basket on one arm|"
        " when the shops had closed",
    )
)


@dataclass(frozen=True)
class Fact:
    """A statement made once, and the question whose answer it holds."""

    kind: str
    attribute: str
    subject: str
    value: str

    @property
    def statement(self) -> str:
        return f"The {self.attribute} of {self.subject} is {self.value}."

    @property
    def question(self) -> str:
        """From newlines to before the answer's space, so that the pieces tokenise as the whole does."""
        return f"\n\nQuestion: What is the {self.attribute} of {self.subject}?\nAnswer:"

    @property
    def answer(self) -> str:
        return f" {self.value}"


@dataclass(frozen=True)
class RecallDocument:
    """A context, a question after it, and four candidate answers, each beginning with a space."""

    context: str
    question: str
    choices: tuple[str, ...]
    answer: int  # index into choices
    distance: int  # tokens between the end of the asked fact and the question
    kind: str
    fact: str  # the asked statement, exactly once in the context


def count_by_characters(text: str) -> int:
    return round(len(text) / CHARACTERS_PER_TOKEN)


def sample_value(rng: random.Random, kind: str, attribute: str) -> str:
    if kind == "word":
        return rng.choice(WORDS[attribute])
    if kind == "number":
        return str(rng.randrange(1000, 10000))
    if kind == "place":
        return rng.choice(NAME_STARTS) + rng.choice(PLACE_ENDS)
    if kind == "key":
        letters = "".join(rng.choice("bcdfghjklmnprstvwxz") for _ in range(2))
        return f"{letters}-{rng.randrange(100, 1000)}"
    raise UsageError(f"unknown kind of fact {kind!r}; valid: {', '.join(KINDS)}")


def sample_subject(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(GIVEN_NAMES)
    return rng.choice(NAME_STARTS) + rng.choice(PERSON_ENDS)


def sample_facts(rng: random.Random, kind: str, num_facts: int, taken: set[str]) -> list[Fact]:
    """Facts of one kind and attribute, with distinct values and subjects; the subjects join `taken`."""
    attribute = rng.choice(sorted(WORDS)) if kind == "word" else {"place": "home"}.get(kind, kind)
    facts: list[Fact] = []
    values: set[str] = set()
    while len(facts) < num_facts:
        subject, value = sample_subject(rng), sample_value(rng, kind, attribute)
        if subject not in taken and value not in values:
            taken.add(subject)
            values.add(value)
            facts.append(Fact(kind, attribute, subject, value))
    return facts


def generated_filler(rng: random.Random, num_tokens: int, count_tokens: CountTokens = count_by_characters) -> str:
    """About `num_tokens` (to half a sentence) of prose without names, numbers or any of the asked words."""
    sentences: list[str] = []
    left = num_tokens
    while True:
        parts = [rng.choice(options) for options in (FILLER_SUBJECTS, FILLER_VERBS, FILLER_PLACES)]
        sentence = " ".join(parts) + rng.choice(FILLER_ENDS) + "."
        cost = count_tokens(" " + sentence)
        if left < cost / 2:
            return " ".join(sentences)
        sentences.append(sentence)
        left -= cost


def scatter(rng: random.Random, filler: str, statements: Sequence[str]) -> str:
    """The statements, in order, at random sentence boundaries of the filler."""
    cuts = [0] + [match.end() for match in re.finditer(r"[.!?][\"']?(?=\s)", filler)] + [len(filler)]
    chosen = sorted(rng.choices(cuts, k=len(statements)))
    pieces, start = [], 0
    for cut, statement in zip(chosen, statements, strict=True):
        pieces += [filler[start:cut].strip(), statement]
        start = cut
    pieces.append(filler[start:].strip())
    return " ".join(piece for piece in pieces if piece)


def recall_document(
    seed: int,
    *,
    distance: int,
    kind: str,
    filler: Filler | None = None,
    count_tokens: CountTokens | None = None,
) -> RecallDocument:
    """One document whose asked fact ends about `distance` tokens before the question.

    filler(rng, num_tokens): prose between the facts, by default `generated_filler`. count_tokens(text): by
    default characters / 4.5. The document's own `distance` is the one measured with it.
    Raises UsageError for an unknown kind or a distance below 48, where the other three facts do not fit.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of fact {kind!r}; valid: {', '.join(KINDS)}")
    if distance < 48:
        raise UsageError(f"distance is {distance}; at least 48 tokens are needed to hold the other facts")
    count = count_tokens or count_by_characters
    fill = filler or partial(generated_filler, count_tokens=count)
    rng = random.Random(f"recall {seed} {distance} {kind}")

    taken: set[str] = set()
    asked, *others = sample_facts(rng, kind, NUM_CHOICES, taken)
    for _ in range(rng.randrange(min(4, distance // 128) + 1)):
        others += sample_facts(rng, rng.choice(KINDS), 1, taken)
    lead = 16 + min(round(distance * rng.uniform(0.02, 0.12)), 144)
    after = [fact for fact in others if rng.random() < distance / (distance + lead)]
    before = [fact for fact in others if fact not in after]
    rng.shuffle(after)

    def prose(num_tokens: int, facts: list[Fact]) -> str:
        statements = [fact.statement for fact in facts]
        budget = max(num_tokens - sum(count(" " + statement) for statement in statements), 0)
        return scatter(rng, fill(rng, budget), statements)

    tail = prose(distance, after)
    context = " ".join(part for part in (prose(lead, before), asked.statement, tail) if part)
    choices = [asked.answer] + [fact.answer for fact in others if fact.kind == kind][: NUM_CHOICES - 1]
    rng.shuffle(choices)
    return RecallDocument(
        context=context,
        question=asked.question,
        choices=tuple(choices),
        answer=choices.index(asked.answer),
        distance=count(" " + tail),
        kind=kind,
        fact=asked.statement,
    )


def recall_documents(
    seed: int, *, per_cell: int, distances: Sequence[int], kinds: Sequence[str]
) -> list[RecallDocument]:
    """`per_cell` documents for each distance and kind; another seed shares no document with this one."""
    return [
        recall_document(seed * 1_000_003 + index, distance=distance, kind=kind)
        for distance in distances
        for kind in kinds
        for index in range(per_cell)
    ]
