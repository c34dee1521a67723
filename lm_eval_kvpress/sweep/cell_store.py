"""The folder of one cell of a sweep.

    answers.sqlite      what it has answered, an outcome per row (`answers`); until it is finished
    throughput.jsonl    a record per batch and request, as far as the answers say
    stream/...          losses by position, of streams
    results/...         of a finished cell: results and samples as lm-eval writes them, and their manifest (`manifest`)
    results.part/...    results that are not known to be whole

Every file is whole or noticed: answers are transactions, results appear by a rename once they are sealed, and what does
not match is named, dropped and made again. Does not know lm-eval or models.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import sync_folder, write_errors
from lm_eval_kvpress.sweep.answers import Answers
from lm_eval_kvpress.sweep.manifest import MANIFEST, mismatches, seal


class CellStore:
    """The folder of one cell, which need not exist.

    Attributes:
        answers: what the cell has answered, until it is finished.
        throughput: the file of its throughput records.
        stream: the folder of its losses by position.
        results: where the finished cell's results are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.throughput, self.stream = folder / "throughput.jsonl", folder / "stream"
        self.results, self._part = folder / "results", folder / "results.part"
        self.answers = Answers(folder / "answers.sqlite", self.throughput)

    @property
    def is_finished(self) -> bool:
        """Whether the results are there and sealed."""
        return (self.results / MANIFEST).is_file()

    @property
    def holds_something(self) -> bool:
        """Whether anything was answered."""
        return any(path.exists() for path in (self.answers.file, self.results)) or any(self.stream.glob("*/*.csv"))

    def drop_damage(self) -> list[str]:
        """Set aside what is no longer what it was, so that it is made again.

        Returns:
            A line for each thing that was dropped, with the reason.

        Raises:
            UsageError: for a pipe, a link or a folder where a file belongs, and the other way round.
        """
        self._refuse_other_kinds()
        lines = [*self._drop_results(), *self._drop_answers()]
        if self.is_finished:
            self.answers.delete()
        elif not self.answers.file.exists() and not self.stream.exists():
            self.throughput.unlink(missing_ok=True)  # of answers that are no longer there
        return lines

    def _refuse_other_kinds(self) -> None:
        folders = [self.folder, self.stream, self.results, self._part]
        refuse_other_kinds(files=[self.throughput, *self.answers.files], folders=folders)

    def _drop_results(self) -> list[str]:
        wrong = mismatches(self.results) if self.results.exists() else []
        if not wrong:
            return []
        self.new_results().rmdir()
        self.results.replace(self._part)
        for file in wrong:
            if file.is_relative_to(self.stream):
                file.unlink(missing_ok=True)
        return [f"{_names(wrong)}: gone or damaged since the cell was finished; the cell is made again"]

    def _drop_answers(self) -> list[str]:
        damage = self.answers.damage()
        if not damage:
            return []
        self.answers.delete()
        self.throughput.unlink(missing_ok=True)
        return [f"{self.answers.file} is damaged ({damage}): its answers are made again"]

    def new_results(self) -> Path:
        """Return an empty folder to write the results into."""
        if self._part.exists():
            shutil.rmtree(self._part)
        self._part.mkdir(parents=True)
        return self._part

    def finish(self) -> None:
        """Make what was written into `new_results` the results; the answers are no longer needed.

        Raises:
            UsageError: in one line, if the results cannot be brought to disk; the answers are kept.
        """
        with write_errors(self._part, "make room: the answers are kept, and the same command goes on"):
            seal(self._part, [file for kind in ("*.csv", "*.json") for file in self.stream.rglob(kind)])
            self._part.replace(self.results)
            sync_folder(self.folder)
        self.answers.delete()

    def delete(self) -> None:
        """Remove what a call left that answered nothing; what is not a cell's stays."""
        self._refuse_other_kinds()
        self.answers.delete()
        for folder in (self._part, self.stream):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (self.throughput, self.throughput.with_name(f"{self.throughput.name}.lock")):
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def refuse_other_kinds(files: Iterable[Path] = (), folders: Iterable[Path] = ()) -> None:
    """Refuse what is there and is neither a plain file nor a folder, as the case may be. A link leads elsewhere.

    Raises:
        UsageError: naming the first.
    """
    for paths, is_kind, kind in ((files, stat.S_ISREG, "file"), (folders, stat.S_ISDIR, "folder")):
        for path in paths:
            if (path.exists() or path.is_symlink()) and not is_kind(path.lstat().st_mode):
                raise UsageError(f"{path} is not a {kind} of a sweep: move it away, or choose another output_path")


def _names(paths: list[Path]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}"
