"""The faults: kills, damaged files, full disks and bad inputs, each made in a folder of its own.

Every generator yields pairs of a name and a function that makes the fault and returns its trial; all moments, files and
places are drawn from seeds, so a trial is the same each time.
"""

from __future__ import annotations

import functools
import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.studies.faults.inputs import Input, material
from scripts.studies.faults.process import run
from scripts.studies.faults.runs import RUNS, Run
from scripts.studies.faults.verdicts import Trial, judged, refused

Trials = Iterator[tuple[str, Callable[[], Trial]]]
DAMAGED = "damaged file"
KIB = 1024


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to.

    Attributes:
        folder: where it ran.
        contents: what it left there.
        num_bytes: that its folder takes.
    """

    folder: Path
    cpu_sec: float
    contents: Any
    num_bytes: int


def undisturbed(kind: Run, folder: Path) -> Undisturbed:
    """Run a kind once in a new folder.

    Raises:
        RuntimeError: if it does not end well.
    """
    place = folder / kind.name.replace(" ", "-")
    ended = run(kind.command(place), folder / f"{place.name}.log")
    if ended.status:
        raise RuntimeError(f"{shlex.join(kind.command(place))} fails without a fault: {ended.last_line}")
    num_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return Undisturbed(place, ended.cpu_sec, kind.contents(place), num_bytes)


# ------------------------------------------------------------------------------------------------------------- kills


def kills(references: Mapping[str, Undisturbed], folder: Path, num_each: int) -> Trials:
    """Kill each kind of run at moments spread over its processor time, and start it again."""
    for kind in RUNS:
        for number in range(num_each):
            name, reference = f"{kind.name} {number + 1}", references[kind.name]
            moment_sec = reference.cpu_sec * (number + random.Random(name).random()) / num_each
            yield name, functools.partial(_kill, kind, name, folder / _slug(name), moment_sec, reference)


def _kill(kind: Run, name: str, place: Path, moment_sec: float, reference: Undisturbed) -> Trial:
    run(kind.command(place), _log(place, "killed"), kill_after_cpu_sec=moment_sec)
    again = run(kind.command(place), _log(place, "again"))
    verdict, detail = judged(again, lambda: kind.contents(place), reference.contents)
    return Trial("killed", name, verdict, f"after {moment_sec:.1f} of {reference.cpu_sec:.1f} s of CPU: {detail}")


# ----------------------------------------------------------------------------------------------------- damaged files


def damages(references: Mapping[str, Undisturbed], folder: Path, num: int) -> Trials:
    """Damage a file of a finished run, or of one that was killed, and start it again, or report it."""
    kinds = {kind.name: kind for kind in RUNS}
    states = [(kind, state) for kind in ("sweep", "stream") for state in ("killed", "finished", "reported")]
    states.append(("logged run", "finished"))
    for number in range(num):
        kind, state = states[number % len(states)]
        name = f"{kind}, {state}, {number + 1}"
        yield name, functools.partial(_damage, kinds[kind], state, name, folder / _slug(name), references[kind])


def _damage(kind: Run, state: str, name: str, place: Path, reference: Undisturbed) -> Trial:
    draw = random.Random(name)
    if state == "killed":
        run(kind.command(place), _log(place, "killed"), kill_after_cpu_sec=reference.cpu_sec * draw.uniform(0.6, 0.95))
    else:
        shutil.copytree(reference.folder, place)
    sound = _report(place) if state == "reported" else ""
    files = sorted({file for pattern in kind.trusted for file in place.glob(pattern) if _is_content(file)})
    if not files:
        return Trial(DAMAGED, name, "held", "killed before it wrote anything")
    file = draw.choice(files)
    how = f"{file.relative_to(place)} {damage(file, draw)}"
    if state == "reported":
        verdict, detail = judged(run(*_report_command(place)), _report_file(place).read_text, sound)
    else:
        again = run(kind.command(place), _log(place, "again"))
        lost = kind.may_lose if file.name in again.stderr else frozenset[str]()
        contents = functools.partial(_without, lost)
        verdict, detail = judged(again, lambda: contents(kind.contents(place)), contents(reference.contents))
    return Trial(DAMAGED, name, verdict, f"{how}: {detail}")


def _without(keys: frozenset[str], contents: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in contents.items() if key not in keys}


def damage(file: Path, draw: random.Random) -> str:
    """Cut, empty or zero a part of a file, as a power cut may leave it; return how."""
    data, how = file.read_bytes(), draw.choice(("cut", "emptied", "zeroed"))
    start = draw.randrange(len(data))
    end = draw.randrange(start + 1, len(data) + 1)
    zeroed = data[:start] + bytes(end - start) + data[end:]
    file.write_bytes({"cut": data[:start], "emptied": b"", "zeroed": zeroed}[how])
    return how


def _is_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0 and ".lock" not in file.name and ".part" not in str(file)


def _report_command(place: Path) -> tuple[list[str], Path]:
    return ["lm-eval-kvpress", "report", str(place), "-o", str(_report_file(place))], _log(place, "report")


def _report_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.csv")


def _report(place: Path) -> str:
    """The report of a run as it is."""
    ended = run(*_report_command(place))
    if ended.status:
        raise RuntimeError(f"{place} cannot be reported without a fault: {ended.last_line}")
    return _report_file(place).read_text()


# -------------------------------------------------------------------------------------------------------- full disks


def full_disks(references: Mapping[str, Undisturbed], folder: Path, num: int) -> Trials:
    """Run on a disk that is too small, at sizes spread up to what the run needs; make room, and start it again."""
    for number in range(num):
        kind = RUNS[number % len(RUNS)]
        reference = references[kind.name]
        num_kib = max(4, round(reference.num_bytes / KIB * (number + 1) / num))
        name = f"{kind.name}, {num_kib} KiB"
        yield name, functools.partial(_full_disk, kind, name, folder / _slug(name), num_kib, reference)


def _full_disk(kind: Run, name: str, place: Path, num_kib: int, reference: Undisturbed) -> Trial:
    place.mkdir(parents=True)
    with small_disk(place, num_kib) as make_room:
        first = run(kind.command(place), _log(place, "full"), max_file_bytes=None if make_room else num_kib * KIB)
        verdict, detail = judged(first, lambda: kind.contents(place), reference.contents)
        if verdict == "one line":
            if make_room:
                make_room()
            again = run(kind.command(place), _log(place, "again"))
            after, detail_after = judged(again, lambda: kind.contents(place), reference.contents)
            if after != "held":
                verdict, detail = after, f"with room again: {detail_after}"
    return Trial("full disk", name, verdict, detail)


@contextmanager
def small_disk(place: Path, num_kib: int) -> Iterator[Callable[[], None] | None]:
    """A file system of its own on a folder, and what makes it large; None where none may be mounted."""
    if os.geteuid() != 0 or not _mount(place, f"size={num_kib}k"):
        yield None
        return
    try:
        yield lambda: _make_room(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True).returncode == 0


def _make_room(place: Path) -> None:
    assert _mount(place, "remount,size=64m"), f"{place} cannot be made larger"


# --------------------------------------------------------------------------------------------------------- bad inputs


def bad_inputs(inputs: Sequence[Input], folder: Path) -> Trials:
    """Commands with an argument or a file that is wrong; each must say so."""
    places = material(folder / "material")
    for number, one in enumerate(inputs):
        yield one.command, functools.partial(_bad_input, one, number, folder, places)


def _bad_input(one: Input, number: int, folder: Path, places: Mapping[str, str]) -> Trial:
    command = one.command.format(**places, out=folder / f"out-{number}")
    ended = run(shlex.split(command), folder / f"input-{number}")
    verdict, detail = refused(ended)
    if verdict == "one line" and one.says not in ended.last_line:
        verdict = "no line"
    return Trial("bad input", one.command, verdict, detail)


def _slug(name: str) -> str:
    return "-".join("".join(character if character.isalnum() else " " for character in name).split())


def _log(place: Path, what: str) -> Path:
    """Beside the folder, which may be full."""
    return place.with_name(f"{place.name}-{what}")
