"""Every mistake that the field is known to make, put in on purpose: the verifier must fail, at the check that is named.

`python tests/end_to_end/test_faults.py` runs all checks on every fault and writes the table of `docs/correctness.md`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_neox, tiny_tokenizer
from lm_eval.models.huggingface import HFLM
from pytest import MonkeyPatch
from repository import ROOT

from lm_eval_kvpress.cache import compressed, group_scales
from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.cache.layers import GrowingPackedLayer
from lm_eval_kvpress.engine import decode_state, decoding, fidelity, grouped_prefill, rolling_batches, scoring, windows
from lm_eval_kvpress.engine import prefill as engine_prefill
from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.engine.scoring import Layout
from lm_eval_kvpress.harness import loading, requests, whole_weights
from lm_eval_kvpress.harness.plugin import tasks_path
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.models import full_width, gpt_neox
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records import totals
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.rolling_score import RollingScore
from lm_eval_kvpress.records.totals import KeptTotals, TaskTotals
from lm_eval_kvpress.verify.check import Check
from lm_eval_kvpress.verify.command import CHECKS
from lm_eval_kvpress.verify.subject import Subject

DOCS = ROOT / "docs" / "correctness.md"
BEGIN, END = "<!-- faults: begin, written by tests/end_to_end/test_faults.py -->", "<!-- faults: end -->"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake.

    Attributes:
        name: of the mistake.
        effect: what it does to the numbers.
        check: the check that must fail.
        put_in: makes the mistake.
    """

    name: str
    effect: str
    check: str
    put_in: Callable[[MonkeyPatch], None]


FAULTS: list[Fault] = []


def fault(name: str, effect: str, check: str) -> Callable[[Callable[[MonkeyPatch], None]], None]:
    return lambda put_in: FAULTS.append(Fault(name, effect, check, put_in))


# ------------------------------------------------------------------------------------------ presenting the model


@fault("contiguous Q/K/V split", "presses score tokens by rows of other heads' Q, K and V; it runs", "projections")
def _(patch: MonkeyPatch) -> None:
    def rows(self: gpt_neox.ProjectionView, fused: torch.Tensor) -> torch.Tensor:
        return fused.view(3, -1, *fused.shape[1:])[self._part]

    patch.setattr(gpt_neox.ProjectionView, "_rows", rows)


@fault("whole heads rotated, rows not reordered", "pairs of dims that do not belong together are rotated", "basis")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(full_width, "full_width_order", lambda head_dim, rotary_dims: torch.arange(head_dim))


@fault("full-width frequencies on partial RoPE", "dims are rotated that the model does not rotate", "rotation")
def _(patch: MonkeyPatch) -> None:
    def rotate_everything(rotary: Any, head_dim: int, undo: ExitStack) -> None:
        pad_frequencies(rotary, head_dim, undo)
        rotary.inv_freq = 1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)

    pad_frequencies = full_width.pad_frequencies
    patch.setattr(full_width, "pad_frequencies", rotate_everything)


# --------------------------------------------------------------------------------------------------- the press


@fault("inert press", "every press gives the baseline's number, to the last digit", "kept")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(PressSpec, "build", lambda self, context_tokens, *, shrink=False: None)


@fault("ratio direction confused", "90 % kept is reported as 90 % removed", "kept")
def _(patch: MonkeyPatch) -> None:
    build = PressSpec.build

    def other_way(self: PressSpec, context_tokens: int, *, shrink: bool = False) -> Any:
        ratio = self.compression_ratio
        if self.name not in ("snapkv", "random", "knorm") or ratio is None:
            return build(self, context_tokens, shrink=shrink)
        return build(parse_press(self.name, {**self.arguments, "compression_ratio": 1 - ratio}), context_tokens)

    patch.setattr(PressSpec, "build", other_way)


@fault("press instance shared and changed", "a short context's window stays behind for all later runs", "batches")
def _(patch: MonkeyPatch) -> None:
    build, shared = PressSpec.build, {}

    def build_once(self: PressSpec, context_tokens: int, *, shrink: bool = False) -> Any:
        fresh = build(self, context_tokens, shrink=shrink)
        press = shared.setdefault(self.name, fresh)
        if shrink:
            vars(press).update(vars(fresh))
        return press

    patch.setattr(PressSpec, "build", build_once)


@fault("masking press taken for a shrinking one", "nothing is evicted, the ratio is reported all the same", "kept")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(engine_prefill, "_evicted_by_mask", lambda attention, keys: None)


@fault("layers skipped, the ratio quoted as global", "less is removed than the record says", "kept")
def _(patch: MonkeyPatch) -> None:
    add = KeptTotals.add

    def as_in_the_last_layer(self: KeptTotals, record: Any) -> None:
        kept = record.kept_per_layer[-1:] * len(record.kept_per_layer)
        add(self, dataclasses.replace(record, kept_per_layer=kept))

    patch.setattr(KeptTotals, "add", as_in_the_last_layer)


@fault("PyramidKV's fall-back to SnapKV not named", "a row says PyramidKV and shows SnapKV", "kept")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(PressSpec, "notes", lambda self, context_tokens, num_layers: [])


# ------------------------------------------------------------------------------------------ scoring over the cache


@fault("physical positions", "queries go on where the shortened cache ends, keys stay where they were", "scoring")
def _(patch: MonkeyPatch) -> None:
    prefill = grouped_prefill.prefill

    def at_kept_length(*args: Any, **kwargs: Any) -> Any:
        found = prefill(*args, **kwargs)
        length = max(layer.num_entries for layer in found.layers)
        return dataclasses.replace(found, next_position=(length,) * len(found.num_seen))

    patch.setattr(grouped_prefill, "prefill", at_kept_length)


@fault("mask made for layer 0", "layers with fewer entries see the future (PyramidKV)", "causality")
def _(patch: MonkeyPatch) -> None:
    make = scoring.attention_bias
    first: list[LayerKV] = []

    def from_layer_0(layer: LayerKV, pack: torch.Tensor, dtype: torch.dtype, heads: int) -> torch.Tensor | None:
        of_model = first[-1] if first and first[-1].num_entries > layer.num_entries else layer
        first.append(of_model)
        bias = make(of_model if layer.hidden is None else layer, pack, dtype, heads)
        return None if bias is None else bias[..., : layer.num_entries + pack.shape[1]]

    patch.setattr(scoring, "attention_bias", from_layer_0)


@fault("mask of zeros", "every new token sees all others, its own target among them", "causality")
def _(patch: MonkeyPatch) -> None:
    def zeros(layer: LayerKV, pack: torch.Tensor, dtype: torch.dtype, heads: int) -> torch.Tensor:
        return torch.zeros(len(pack), 1, pack.shape[1], layer.num_entries + pack.shape[1], dtype=dtype)

    patch.setattr(scoring, "attention_bias", zeros)


@fault("answers see each other", "choices scored in one forward leak into the ones behind them", "causality")
def _(patch: MonkeyPatch) -> None:
    def everything_earlier(self: Layout) -> torch.Tensor:
        width = self.segments.shape[1]
        return torch.ones(width, width, dtype=torch.bool).tril().expand(len(self.segments), -1, -1)

    patch.setattr(Layout, "visible", everything_earlier)


@fault("last prompt token fed twice", "the context ends in a stutter; small, and everywhere", "scoring")
def _(patch: MonkeyPatch) -> None:
    compress = Compressor.compress

    def twice(self: Compressor, contexts: Sequence[Context], **kwargs: Any) -> Any:
        longer = [dataclasses.replace(context, tokens=(*context.tokens, context.tokens[-1])) for context in contexts]
        return compress(self, longer, **kwargs)

    patch.setattr(Compressor, "compress", twice)


@fault("first token from the full cache", "one-token answers do not move, whatever the press", "action")
def _(patch: MonkeyPatch) -> None:
    compress = Compressor.compress

    def holds_nothing_back(self: Compressor, contexts: Sequence[Context], **kwargs: Any) -> Any:
        return compress(self, [dataclasses.replace(context, num_held_back=0) for context in contexts], **kwargs)

    patch.setattr(Compressor, "compress", holds_nothing_back)


@fault("one forward per window", "no press can act: every press gets the figure of none", "action")
def _(patch: MonkeyPatch) -> None:
    def one_pass(lm: HFLM, session: Session, tokens: Sequence[int]) -> Iterator[windows.Window]:
        return windows.one_pass_windows(tokens, lm.prefix_token_id, lm.max_length)

    patch.setattr(requests, "_windows", one_pass)


@fault(
    "a decoding press never acts on scores",
    "long answers get the full cache's likelihoods under the press's name",
    "decoding",
)
def _(patch: MonkeyPatch) -> None:
    patch.setattr(BudgetKeeper, "is_due", lambda *_: False)
    patch.setattr(BudgetKeeper, "most_fed", 10_000)  # buffers have room for all tokens then


@fault(
    "a cache compressed while decoding goes on at its own length",
    "queries of all later tokens are rotated to other places than keys",
    "decoding",
)
def _(patch: MonkeyPatch) -> None:
    compress = BudgetKeeper.compress

    def then_physical(self: BudgetKeeper, cache: CompressedCache) -> CompressedCache:
        kept = compress(self, cache)
        return dataclasses.replace(kept, next_position=(kept.layers[0].num_entries,) * len(kept.num_seen))

    patch.setattr(BudgetKeeper, "compress", then_physical)


@fault("decoding goes on at the kept length", "generated text drifts from what scoring says", "causality")
def _(patch: MonkeyPatch) -> None:
    feed = DecodeState.feed_held_back

    def then_physical(self: DecodeState, queries: Sequence[Sequence[int]]) -> torch.Tensor:
        hidden = feed(self, queries)
        self.positions = torch.full_like(self.positions, self.layers[0].length)
        return hidden

    patch.setattr(DecodeState, "feed_held_back", then_physical)


# -------------------------------------------------------------------------------------------------- packed entries


@fault("a decoding press never acts on texts", "texts of the full cache under the press's name", "decoding")
def _(patch: MonkeyPatch) -> None:
    def unpressed(self: Any, model: Any, cache: CompressedCache, *others: Any) -> None:
        begin(self, model, cache, *others[:-1], None)

    begin = decoding._Steps.__init__
    patch.setattr(decoding._Steps, "__init__", unpressed)


@fault("entries masked by head are seen by texts", "adakv and its like generate as from the full cache", "causality")
def _(patch: MonkeyPatch) -> None:
    def by_row_alone(layer: Any, *others: Any) -> torch.Tensor | None:
        by_head = layer.hidden is not None and layer.hidden.shape[1] > 1
        return bias(dataclasses.replace(layer, hidden=None) if by_head else layer, *others)

    bias = decode_state.decoding_bias
    patch.setattr(decode_state, "decoding_bias", by_row_alone)


@fault("kv_quant that packs nothing", "full precision under the name of int4", "packing")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(grouped_prefill, "pack", lambda cache, rule: cache)


@fault("codes read without their zero", "keys lose the mean of their channel", "packing")
def _(patch: MonkeyPatch) -> None:
    floats = group_scales.floats

    def without_zero(scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> Any:
        return floats(scales, torch.zeros_like(zeros), dtype)

    patch.setattr(group_scales, "floats", without_zero)


# -------------------------------------------------------------------------------------------------------- fidelity


@fault("KL with its sides swapped", "what the full cache holds likely weighs least", "fidelity")
def _(patch: MonkeyPatch) -> None:
    compare = fidelity.compare
    patch.setattr(fidelity, "compare", lambda model, full, compressed: compare(model, compressed, full))


@fault("full side taken from the compressed cache", "every press is as faithful as the full cache", "fidelity")
def _(patch: MonkeyPatch) -> None:
    compare = fidelity.compare
    patch.setattr(fidelity, "compare", lambda model, full, compressed: compare(model, compressed, compressed))


@fault("packed entries read as zeros by texts", "kv_quant generates as without a context, and scores well", "packing")
def _(patch: MonkeyPatch) -> None:
    def forgetting(
        self: GrowingPackedLayer, keys: torch.Tensor, values: torch.Tensor, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._new.update(keys, values)
        return torch.cat([0 * self._kept.keys, keys], dim=2), torch.cat([0 * self._kept.values, values], dim=2)

    patch.setattr(GrowingPackedLayer, "update", forgetting)


# ------------------------------------------------------------------------------------------------------- batches


@fault("padding not hidden", "short rows of a batch attend to zeros", "batches")
def _(patch: MonkeyPatch) -> None:
    stack_layers = compressed._stack_layers

    def in_sight(layers: Sequence[LayerKV], *args: Any) -> LayerKV:
        stacked = stack_layers(layers, *args)
        if all(layer.hidden is None for layer in layers):
            return LayerKV(stacked.keys, stacked.values)
        return stacked

    patch.setattr(compressed, "_stack_layers", in_sight)


@fault("padding under the press", "pads are scored, and kept as sinks", "batches")
def _(patch: MonkeyPatch) -> None:
    compress = Compressor.compress

    def padded(self: Compressor, contexts: Sequence[Context], **kwargs: Any) -> Any:
        width = max(len(context.tokens) for context in contexts)
        filled = [(0,) * (width - len(context.tokens)) + context.tokens for context in contexts]
        wide = [dataclasses.replace(context, tokens=tokens) for context, tokens in zip(contexts, filled, strict=True)]
        return compress(self, wide, **kwargs)

    patch.setattr(Compressor, "compress", padded)


# ------------------------------------------------------------------------------------------------- sums and records


@fault("off-by-one target", "each token is scored by a position that has seen it", "scoring")
def _(patch: MonkeyPatch) -> None:
    of = Layout.of

    def one_later(packs: Any) -> Layout:
        layout = of(packs)
        return dataclasses.replace(layout, sources=(layout.sources + 1).clamp(max=layout.tokens.shape[1] - 1))

    patch.setattr(Layout, "of", one_later)


@fault("first token dropped", "the hardest token of every document is missing", "parity")
def _(patch: MonkeyPatch) -> None:
    whole = windows.one_pass_windows
    patch.setattr(windows, "one_pass_windows", lambda tokens, prefix, length: whole(tokens[1:], tokens[0], length))


@fault("unweighted mean over windows", "the short last window counts like a full one", "parity")
def _(patch: MonkeyPatch) -> None:
    rolling_score = rolling_batches._rolling_score

    def of_means(scored: Sequence[Any]) -> RollingScore:
        score = rolling_score(scored)
        means = [sum(outcome.branches[0].logprobs) / len(outcome.branches[0].logprobs) for outcome in scored]
        total = score.num_tokens * sum(means) / len(means)
        return RollingScore(total, score.num_tokens, score.num_tokens_pressed, score.loglikelihood_pressed)

    patch.setattr(rolling_batches, "_rolling_score", of_means)


@fault("mean of the windows' perplexities", "perplexity in the record is a mean of exponentials", "records")
def _(patch: MonkeyPatch) -> None:
    scored, summary = TaskTotals.add_scores, TaskTotals.summary
    of_windows: dict[int, list[float]] = {}

    def remember(self: TaskTotals, logprobs: Sequence[float], **facts: Any) -> None:
        scored(self, logprobs, **facts)
        perplexity = totals.perplexity(sum(logprobs), len(logprobs))
        of_windows.setdefault(id(self), []).append(perplexity or 0.0)

    def mean(self: TaskTotals) -> dict[str, Any]:
        found = of_windows.get(id(self), [])
        return {**summary(self), "token_perplexity": sum(found) / len(found) if found else None}

    patch.setattr(TaskTotals, "add_scores", remember)
    patch.setattr(TaskTotals, "summary", mean)


@fault("baseline under another protocol", "the baseline sees other contexts than the methods", "records")
def _(patch: MonkeyPatch) -> None:
    of_protocol = requests._windows

    def baseline_in_one_pass(lm: HFLM, session: Session, tokens: Sequence[int]) -> Iterator[windows.Window]:
        if session.settings.press.is_none:
            return windows.one_pass_windows(tokens, lm.prefix_token_id, lm.max_length)
        return of_protocol(lm, session, tokens)

    patch.setattr(requests, "_windows", baseline_in_one_pass)


@fault("requested tokens counted as produced", "tokens per second of rows that stopped early are inflated", "records")
def _(patch: MonkeyPatch) -> None:
    decode = decoding.decode

    def padded(*args: Any, **kwargs: Any) -> Any:
        found = decode(*args, **kwargs)
        rows = found if isinstance(found, list) else found.tokens
        for row in rows:
            row += [0] * (kwargs["max_new_tokens"] - len(row))
        return found

    patch.setattr("lm_eval_kvpress.engine.runner.decode", padded)


@fault("prefill and scoring timed as one", "the cost of the press is hidden in tokens per second", "records")
def _(patch: MonkeyPatch) -> None:
    @contextmanager
    def one_phase(self: Clock, name: str, **kwargs: Any) -> Iterator[Any]:
        with phase(self, "score", **kwargs) as produced:
            yield produced

    phase = Clock.phase
    patch.setattr(Clock, "phase", one_phase)


# ------------------------------------------------------------------------------------------------------- fall-backs


@fault("silent fall-back data", "figures of three sentences under the name of WikiText", "refusals")
def _(patch: MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp()) / "tasks"
    shutil.copytree(tasks_path(), folder)
    module = folder / "kvpress_ppl" / "corpora.py"
    code = module.read_text()
    honest = "    except OSError as error:\n        raise UsageError("
    assert code.count(honest) == 2
    fields = '("page", "short_book_title", "url", "text")'
    dummy = f'    except OSError as error:\n        return [dict.fromkeys({fields}, "Lorem ipsum.")]\n'
    module.write_text(code.replace(honest, dummy + "        raise UsageError("))
    patch.setattr("lm_eval_kvpress.verify.answers.tasks_path", lambda: folder)


@fault("silent fall-back checkpoint", "figures of a small model under the name of a large one", "refusals")
def _(patch: MonkeyPatch) -> None:
    patch.setattr("lm_eval_kvpress.verify.answers.resolve_pretrained", lambda pretrained: "builtin")


@fault("weights that are missing drawn at random", "figures of a model that nobody trained", "refusals")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(whole_weights, "check_found", lambda pretrained, num_layers, found: None)


@fault("more context than the model has positions", "perplexity explodes, and the press is blamed", "refusals")
def _(patch: MonkeyPatch) -> None:
    patch.setattr(loading, "check_settings", lambda settings, config, max_length: None)


# ------------------------------------------------------------------------------------------------------------ tests


def caught(fault: Fault, checkpoint: Path, patch: MonkeyPatch, checks: Sequence[str]) -> list[Check]:
    """The outcome of checks on a model that was loaded with the mistake in place."""
    fault.put_in(patch)
    torch.manual_seed(0)
    subject = Subject.load({"pretrained": str(checkpoint), "device": "cpu"})
    return [CHECKS[name](subject) for name in checks]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: slug(fault.name))
def test_fault_is_caught(fault: Fault, checkpoint_dir: Path, monkeypatch: MonkeyPatch) -> None:
    (check,) = caught(fault, checkpoint_dir, monkeypatch, [fault.check])
    assert not check.passed, f"{fault.check} does not see it: {check.parts}"


def test_every_check_guards_against_some_fault() -> None:
    assert {fault.check for fault in FAULTS} == set(CHECKS)


# ------------------------------------------------------------------------------------------------------------ table


def table(rows: Sequence[Sequence[str]]) -> str:
    head = ["mistake", "what it does to the numbers", "check", "measured", "limit", "also seen by", "test"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rows_of(checkpoint: Path) -> Iterator[list[str]]:
    for fault in FAULTS:
        with MonkeyPatch.context() as patch:
            found = {}
            for name in CHECKS:
                try:
                    (found[name],) = caught(fault, checkpoint, patch, [name])
                except (AssertionError, IndexError, RuntimeError, ValueError) as error:
                    print(f"{fault.name}: {name} raises {type(error).__name__}: {str(error)[:80]}")
                finally:
                    patch.undo()
            others = [name for name, check in found.items() if not check.passed and name != fault.check]
            check = found[fault.check]
            sign = ">=" if check.worst.at_least else "<="
            figures = [f"{check.measured:.2g}", f"{sign} {check.tolerance:.2g}"]
            yield [fault.name, fault.effect, fault.check, *figures, ", ".join(others) or "-", f"`{slug(fault.name)}`"]


def documented() -> list[list[str]]:
    text = DOCS.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_table_in_the_documentation_is_that_of_the_faults() -> None:
    rows = documented()
    assert [row[:3] for row in rows] == [[fault.name, fault.effect, fault.check] for fault in FAULTS], "run this file"
    for name, _, _, measured, limit, _, test in rows:
        assert test == f"`{slug(name)}`"
        sign, _, bound = limit.partition(" ")
        passed = float(measured) >= float(bound) if sign == ">=" else float(measured) <= float(bound)
        assert not passed, f"{name}: {measured} {limit}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(folder)
        tiny_neox(vocab_size=len(tokenizer)).save_pretrained(folder)
        written = table(list(rows_of(Path(folder))))
    text = DOCS.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    DOCS.write_text(f"{text[:begin]}\n{written}\n{text[end:]}", encoding="utf-8")
