"""lm-eval's requests to the engine's request batches: token ids, cut to fit, with the id of each request.

Knows ``HFLM``, its tokenizer and a session. Does not know how anything is computed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.engine import windows
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.generation_batches import GenerationBatches
from lm_eval_kvpress.engine.likelihood_batches import LikelihoodBatches
from lm_eval_kvpress.engine.outcomes import Document, Prompt
from lm_eval_kvpress.engine.rolling_batches import RollingBatches
from lm_eval_kvpress.engine.stream_batches import StreamBatches
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import splitting
from lm_eval_kvpress.harness.document_ids import document_id
from lm_eval_kvpress.harness.generation_arguments import generation_settings
from lm_eval_kvpress.harness.ranks import without_padding
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.harness.stream_settings import stream_plan
from lm_eval_kvpress.harness.tokenization import encode_all, encode_pairs, encode_prompts
from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.records.totals import TotalsByTask, new_totals

logger = logging.getLogger("lm_eval_kvpress")

Tokens = tuple[int, ...]
RequestType = TypeVar("RequestType", bound=Callable[..., list[Any]])


def answer_padding(answer: RequestType) -> RequestType:
    """Decorate a request type: lm-eval's padding requests of a rank get the answer of the request they repeat."""

    @functools.wraps(answer)
    def run(lm: HFLM, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        if lm.world_size == 1:
            return answer(lm, requests, disable_tqdm)
        own, answered_by = without_padding(requests)
        answers = answer(lm, own, disable_tqdm)
        return [answers[place] for place in answered_by]

    return cast(RequestType, run)


def request_ids(requests: Sequence[Instance]) -> list[RequestId]:
    """The id of each request; lm-eval passes one with ``repeats: N`` on N times."""
    seen: Counter[RequestId] = Counter()
    ids = []
    for request in requests:
        first = RequestId(request.task_name or "", document_id(request), request.idx)
        ids.append(replace(first, repeat=seen[first]))
        seen[first] += 1
    return ids


def likelihood_batches(lm: HFLM, session: Session, requests: Sequence[Instance]) -> LikelihoodBatches:
    """``loglikelihood``: pairs of a context and a continuation."""
    pairs = encode_pairs(lm, [request.args for request in requests])
    _check_pairs(lm, pairs, request_ids(requests))
    prompts = [
        splitting.Prompt(request, request.args[0].rstrip(), tuple(context))
        for request, (context, _) in zip(requests, pairs, strict=True)
    ]
    found = new_totals()
    contexts = splitting.split_all(lm, session, prompts, found)
    split = [(context, tuple(continuation)) for context, (_, continuation) in zip(contexts, pairs, strict=True)]
    return _fitting(lm, split, request_ids(requests), found)


def likelihood_batches_of_tokens(
    lm: HFLM, session: Session, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], ids: Sequence[RequestId]
) -> LikelihoodBatches:
    """Pairs of token ids, of whose contexts the last ``query_tokens`` are held back.

    Raises:
        UsageError: for a side without tokens, a continuation longer than ``max_length``, or a token id that the
            checkpoint does not know.
    """
    _check_pairs(lm, pairs, ids)
    num_last = session.settings.query_tokens
    split = [(Context(tuple(one), min(num_last, len(one))), tuple(other)) for one, other in pairs]
    return _fitting(lm, split, ids, new_totals())


def _check_pairs(lm: HFLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], ids: Sequence[RequestId]) -> None:
    _check_token_ids(lm, itertools.chain.from_iterable(pairs))
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation or len(continuation) > lm.max_length:
            raise UsageError(
                f"request {index} of task '{ids[index].task}' has {len(context)} context and {len(continuation)} "
                f"continuation tokens; each needs at least 1, and a continuation at most {lm.max_length}"
            )


def _fitting(
    lm: HFLM, pairs: Sequence[tuple[Context, Tokens]], ids: Sequence[RequestId], found: TotalsByTask
) -> LikelihoodBatches:
    """A context that is too long with its continuation loses its beginning, as stock ``HFLM`` cuts it."""
    fitting, cut = list[tuple[Context, Tokens]](), set[tuple[str, Tokens]]()
    for id, (context, continuation) in zip(ids, pairs, strict=True):
        kept = context.last(lm.max_length + 1 - len(continuation))
        fitting.append((kept, continuation))
        if len(kept) < len(context):
            cut.add((id.task, context.tokens))
    if cut:
        logger.warning("%d contexts were cut from the left to fit max_length=%d", len(cut), lm.max_length)
    for task, _ in cut:
        found[task].num_cut_contexts += 1
    return LikelihoodBatches(fitting, ids, found)


def rolling_batches(lm: HFLM, session: Session, requests: Sequence[Instance]) -> RollingBatches:
    """``loglikelihood_rolling``: documents, in the windows of the session's protocol."""
    documents = [list(_windows(lm, session, tokens)) for tokens in encode_documents(lm, requests)]
    return RollingBatches(documents, request_ids(requests))


def stream_batches(
    lm: HFLM, session: Session, requests: Sequence[Instance], loss_files: LossFiles | None
) -> StreamBatches:
    """``loglikelihood_rolling`` under ``rolling=stream``: whole documents."""
    texts, ids = encode_documents(lm, requests), request_ids(requests)
    documents = [Document(tuple(tokens), id) for tokens, id in zip(texts, ids, strict=True)]
    plan = stream_plan(session.settings)
    return StreamBatches(
        documents, plan, prefix_token=lm.prefix_token_id, loss_files=loss_files, window=session.max_length
    )


def _windows(lm: HFLM, session: Session, tokens: Sequence[int]) -> Iterator[windows.Window]:
    if session.settings.rolling == "one_pass":
        return windows.one_pass_windows(tokens, lm.prefix_token_id, lm.max_length)
    return windows.prefix_windows(
        tokens, lm.prefix_token_id, *session.rolling_window, num_held_back=session.settings.query_tokens
    )


def generation_batches(lm: HFLM, session: Session, requests: Sequence[Instance]) -> list[GenerationBatches]:
    """``generate_until``: prompts, those with the same generation arguments together."""
    found = new_totals()
    prompts = _prompts(lm, session, requests, found)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[repr(sorted(request.args[1].items()))].append(index)
    founds = [found, *(new_totals() for _ in groups)]  # what was found in the prompts of all goes with the first group
    return [
        _generation_group(lm, requests[indices[0]].args[1], {index: prompts[index] for index in indices}, own)
        for indices, own in zip(groups.values(), founds, strict=False)
    ]


def _prompts(lm: HFLM, session: Session, requests: Sequence[Instance], found: TotalsByTask) -> list[Prompt]:
    """Prompts with their seeds. A repeated prompt gets another seed; neither order nor batches change a seed."""
    encoded = encode_prompts(lm, [request.args[0] for request in requests])
    _check_token_ids(lm, encoded)
    texts = [
        splitting.Prompt(request, request.args[0], tuple(tokens or [lm.prefix_token_id]))
        for request, tokens in zip(requests, encoded, strict=True)
    ]
    occurrences: Counter[Tokens] = Counter()
    prompts = []
    for context, id in zip(splitting.split_all(lm, session, texts, found), request_ids(requests), strict=True):
        tokens = context.tokens
        seed = zlib.crc32(repr((torch.initial_seed(), occurrences[tokens], tokens)).encode())
        occurrences[tokens] += 1
        prompts.append(Prompt(context, seed, id))
    return prompts


def _generation_group(
    lm: HFLM, gen_kwargs: dict[str, object], prompts: Mapping[int, Prompt], found: TotalsByTask
) -> GenerationBatches:
    settings, answer = generation_settings(lm, gen_kwargs)
    longest = lm.max_length - settings.max_new_tokens
    too_long = [prompt for prompt in prompts.values() if len(prompt.context) > longest]
    if too_long:
        logger.warning(
            "%d prompts were cut from the left to %d tokens: max_length=%d less max_gen_toks=%d",
            *(len(too_long), longest, lm.max_length, settings.max_new_tokens),
        )
    for prompt in too_long:
        found[prompt.id.task].num_cut_contexts += 1
    cut = {index: replace(prompt, context=prompt.context.last(longest)) for index, prompt in prompts.items()}
    return GenerationBatches(cut, settings, answer, found)


def encode_documents(lm: HFLM, requests: Sequence[Instance]) -> list[list[int]]:
    """Token ids of each request's document.

    Raises:
        UsageError: for a token id that the checkpoint does not know.
    """
    texts = encode_all(lm, [request.args[0] for request in requests])
    _check_token_ids(lm, texts)
    return texts


def _check_token_ids(lm: HFLM, texts: Iterable[Sequence[int]]) -> None:
    known, highest = lm.model.get_input_embeddings().num_embeddings, max(map(max, filter(None, texts)), default=0)
    if highest >= known:
        raise UsageError(
            f"token id {highest} is beyond the {known} embeddings of the model: the tokenizer has tokens that the "
            "checkpoint does not know; use the one that belongs to it"
        )
