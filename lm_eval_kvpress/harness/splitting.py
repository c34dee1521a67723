"""Prompts to contexts in two parts: what is compressed, and what is held back and fed afterwards.

Under ``query_aware=true`` the last ``query_tokens`` are held back. Under ``query_aware=false`` it is the question and
all that follows it, ``gen_prefix`` and the end of a chat's template included, as in kvpress's own evaluation
(``KVPressTextGenerationPipeline``). kvpress tokenises context and question apart. Here the tokens are those of the
whole prompt, cut at the last token boundary at or before the question, and prompts for which that is another text are
counted. A press that scores the context by the question (``finch``) is told how much of what is compressed it is.

Knows ``HFLM``, its tokenizer and a session's settings. Does not know how anything is computed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.document_ids import document_id
from lm_eval_kvpress.harness.questions import rule_for
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.harness.tokenization import cut_at
from lm_eval_kvpress.records.totals import TotalsByTask

logger = logging.getLogger("lm_eval_kvpress")

NUM_NAMED = 5
"""How many documents a warning names."""


@dataclass(frozen=True)
class Prompt:
    """What comes before an answer.

    Attributes:
        request: whose.
        text: of the context.
        tokens: of the context.
    """

    request: Instance
    text: str
    tokens: tuple[int, ...]

    @property
    def task(self) -> str:
        return self.request.task_name or ""


@dataclass(frozen=True)
class _Split:
    """Where a prompt is cut.

    Attributes:
        start: the place of the question's first character; None if there is no question.
        num_before: tokens before it.
        is_inside: whether the question begins inside a token, which is held back with it.
    """

    start: int | None
    num_before: int = 0
    is_inside: bool = False

    @property
    def has_context(self) -> bool:
        """Whether there is something to compress."""
        return bool(self.start and self.num_before)


def split_all(lm: HFLM, session: Session, prompts: Sequence[Prompt], found: TotalsByTask) -> list[Context]:
    """The context of each prompt in its two parts; what was found is counted in ``found``.

    Raises:
        UsageError: where questions are needed, if no rule says where a task's questions begin, or none of its prompts
            has a question with a context before it.
    """
    num_last = session.settings.query_tokens
    contexts = [Context(prompt.tokens, min(num_last, len(prompt.tokens))) for prompt in prompts]
    if not session.settings.question_needed_by or not prompts:
        return contexts
    splits = _splits(lm, session, prompts)
    _check_and_count(session, prompts, splits, found)
    pairs = list(zip(contexts, splits, strict=True))
    return _with_questions(session, pairs) if session.settings.query_aware else _without_questions(pairs)


def _without_questions(pairs: Sequence[tuple[Context, _Split]]) -> list[Context]:
    """Hold back each question and what follows it; contexts that are alike before it are shared."""
    split = [
        context if at.start is None else replace(context, num_held_back=len(context) - at.num_before)
        for context, at in pairs
    ]
    sharing = Counter(context.compressed for context in set(split))
    return [replace(context, is_shared=sharing[context.compressed] > 1) for context in split]


def _with_questions(session: Session, pairs: Sequence[tuple[Context, _Split]]) -> list[Context]:
    """Say of each context how much of its compressed part is the question, and what follows that.

    Raises:
        UsageError: if ``query_tokens`` hold back every question whole.
    """
    split = [
        replace(context, num_question=max(0, len(context.compressed) - at.num_before)) if at.has_context else context
        for context, at in pairs
    ]
    if not any(context.num_question for context in split):
        raise UsageError(
            f"press={session.settings.press_name} scores contexts by questions, and "
            f"query_tokens={session.settings.query_tokens} hold back all of each: lower query_tokens"
        )
    return split


def _splits(lm: HFLM, session: Session, prompts: Sequence[Prompt]) -> list[_Split]:
    """Where each prompt is cut; at least one token is left for the question."""
    rules = {task: rule_for(task, session.settings) for task in dict.fromkeys(prompt.task for prompt in prompts)}
    found: dict[tuple[str, int], _Split] = {}
    splits = []
    for prompt in prompts:
        start = rules[prompt.task].start(prompt.text, prompt.request.doc)
        if start is None:
            splits.append(_Split(None))
            continue
        if (prompt.text, start) not in found:  # the choices of a document share a prompt
            cut = cut_at(lm, prompt.text, prompt.tokens, start)
            num_before = min(cut.num_before, len(prompt.tokens) - 1)
            found[prompt.text, start] = _Split(start, num_before, cut.is_inside)
        splits.append(found[prompt.text, start])
    return splits


# --------------------------------------------------------------------------------------------------- what was found


def _check_and_count(
    session: Session, prompts: Sequence[Prompt], splits: Sequence[_Split], counts: TotalsByTask
) -> None:
    """Count each prompt of each task once, name those without a question or a context, and refuse if all are such."""
    by_task: dict[str, dict[str, tuple[Prompt, _Split]]] = {}
    for prompt, split in zip(prompts, splits, strict=True):
        by_task.setdefault(prompt.task, {}).setdefault(prompt.text, (prompt, split))
    for task, by_text in by_task.items():
        found = list(by_text.values())
        missing = [prompt for prompt, split in found if split.start is None]
        bare = [prompt for prompt, split in found if split.start is not None and not split.has_context]
        if len(missing) + len(bare) == len(found):
            raise UsageError(_nothing_to_compress(session, task, missing, bare))
        totals = counts[task]
        totals.num_prompts_without_question += len(missing)
        totals.num_prompts_without_context += len(bare)
        totals.num_questions_inside_tokens += sum(split.is_inside for _, split in found)
        if missing:
            logger.warning(
                "%s: %d of %d prompts hold no question (%s): %s (%s)",
                *(task, len(missing), len(found), rule_for(task, session.settings)),
                *(_WITHOUT_QUESTION[session.settings.query_aware], _names(missing)),
            )
        if bare:
            logger.warning(
                "%s: in %d of %d prompts nothing stands before the question: nothing is compressed (%s)",
                *(task, len(bare), len(found), _names(bare)),
            )


_WITHOUT_QUESTION = {
    False: "they are compressed with all of their text, as under query_aware=true",
    True: "nothing is compressed of them",
}
"""What happens to prompts without a question, by ``query_aware``."""


def _nothing_to_compress(session: Session, task: str, missing: Sequence[Prompt], bare: Sequence[Prompt]) -> str:
    rule, num_prompts = rule_for(task, session.settings), len(missing) + len(bare)
    needed_by = session.settings.question_needed_by
    if not missing:
        return f"{needed_by}: nothing stands before the question ({rule}) in the {num_prompts} prompts of '{task}'"
    return (
        f"{needed_by}: none of the {num_prompts} prompts of '{task}' has a question ({rule}) after a context; "
        f"the first ends with {missing[0].text[-80:]!r}: pass question_pattern=REGEX or question_field=NAME"
    )


def _names(prompts: Sequence[Prompt]) -> str:
    named = ", ".join(str(document_id(prompt.request)) for prompt in prompts[:NUM_NAMED])
    return f"documents {named}" + (", ..." if len(prompts) > NUM_NAMED else "")
