"""The command line: dispatch, one-line errors, and the stock command line behind `run`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
from repository import ROOT

from lm_eval_kvpress import __version__, cli


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], ["presses"], ["presses", "snapkv"], ["no-such-command"]]
)
def test_help_loads_neither_torch_nor_lm_eval(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lm_eval_kvpress.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "loaded = {'torch', 'transformers', 'lm_eval', 'kvpress'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run --model kvpress --model_args pres=snapkv --tasks x", "did you mean 'press'?"),
        ("run --model kvpress --model_args press=snpkv --tasks x", "did you mean 'snapkv'?"),
        ("sweep --presses none,snpkv --tasks x --output_path y", "did you mean 'snapkv'?"),
        ("verify --model_args pretraned=builtin", "did you mean 'pretrained'?"),
        ("presses snpkv", "did you mean 'snapkv'?"),
    ],
)
def test_what_is_misspelt_is_told_before_anything_heavy_is_imported(command: str, message: str) -> None:
    code = (
        "import sys\nfrom lm_eval_kvpress.cli import main\n"
        f"assert main({command.split()!r}) == 2\n"
        "loaded = {'torch', 'transformers', 'kvpress', 'lm_eval'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_module_and_version() -> None:
    command = [sys.executable, "-m", "lm_eval_kvpress", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"lm-eval-kvpress {__version__}\n")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and line.split()
    ]
    assert set(cli.COMMANDS) <= set(listed)


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    alone = capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert alone.out == capsys.readouterr().out and alone.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pressses"], "did you mean 'presses'?"),
        (["zzz"], f"commands: {', '.join(cli.COMMANDS)}"),
        (["--no-such-option", "run"], "--no-such-option"),
        (["presses", "knorm", "tova"], "unrecognized arguments: tova"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr()
    assert message in error.err and error.out == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_imported(name: str) -> None:
    module, _, function = cli.COMMANDS[name].target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """lm-eval's own entry point replaced by one that takes down its command line."""
    import lm_eval.__main__

    calls: list[list[str]] = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: calls.append(list(sys.argv)))
    return calls


def test_run_hands_everything_to_lm_eval(stock: list[list[str]]) -> None:
    from lm_eval.api.registry import model_registry

    argv = list(sys.argv)
    arguments = ["--model", "pythia-kvpress", "--model_args", "press=snapkv", "--include_path", "x", "--help"]
    assert cli.main(["run", *arguments]) == 0
    assert stock == [["lm_eval", "run", *arguments]]
    assert sys.argv == argv
    assert "pythia-kvpress" in model_registry


def test_run_restores_the_command_line_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.__main__

    def stop() -> None:
        raise SystemExit(3)

    argv = list(sys.argv)
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run"])
    assert stopped.value.code == 3
    assert sys.argv == argv


def command_of(monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """Enters a command `bad` whose function `command(arguments)` has `source` for its body, in a module `name`."""
    module = types.ModuleType(name)
    exec(f"def command(arguments):\n    {source}", vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(cli.COMMANDS, "bad", cli.Command(f"{name}:command", "a bad one"))


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = "from lm_eval_kvpress.errors import UsageError; raise UsageError('unknown press: do this')"
    command_of(monkeypatch, "imagined", source)
    assert cli.main(["bad"]) == 2
    assert capsys.readouterr().err == "lm-eval-kvpress bad: unknown press: do this\n"


def test_a_full_disk_is_one_line_whoever_wrote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command_of(monkeypatch, "imagined", "raise OSError(28, 'No space left on device', '/full/results.json')")
    assert cli.main(["bad"]) == 2
    expected = "/full/results.json: No space left on device: make room there, and run the same command again"
    assert capsys.readouterr().err == f"lm-eval-kvpress bad: {expected}\n"


PRINTING = (
    "import sys, types\nfrom lm_eval_kvpress import cli\n"
    "module = sys.modules['printing'] = types.ModuleType('printing')\n"
    "module.command = lambda arguments: print('x' * int(arguments[0])) or 0\n"
    "cli.COMMANDS['bad'] = cli.Command('printing:command', '')\n"
    "sys.exit(cli.main(['bad', sys.argv[1]]))"
)


@pytest.mark.parametrize("num_characters", [10, 100_000], ids=["in the buffer", "beyond the buffer"])
@pytest.mark.parametrize(
    ("output", "line"),
    [
        (">&-", "the standard output is closed: leave it open, or have it written to a file"),
        (">/dev/full", "No space left on device: make room there, and run the same command again"),
        ("| true", "Broken pipe: who read the output has ended"),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(output: str, line: str, num_characters: int) -> None:
    wait = "sleep 1; " if output.startswith("|") else ""  # until its reader has ended
    shell = f'{{ {wait}"$0" -c "$1" {num_characters}; echo $? >&2; }} {output}'
    run = ["bash", "-c", shell, sys.executable, PRINTING]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr == f"lm-eval-kvpress bad: {line}\n2\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command_of(monkeypatch, "imagined", "raise ValueError('a defect')")
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["bad"])


def test_an_interrupt_ends_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval_kvpress.presses.command.main", interrupted)
    assert cli.main(["presses"]) == 130
    assert capsys.readouterr().err == "lm-eval-kvpress presses: interrupted\n"
