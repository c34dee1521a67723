"""The package installed into fresh environments, as a wheel and as a checkout, and the stock `lm_eval` there.

The environments borrow torch, lm-eval and the rest from the one that runs the tests: a path file of theirs names its
site-packages. Start-up files in a folder that is only named so are not read, hence whatever happens at start-up in a
fresh environment comes from what was installed there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository import ROOT

STARTUP_FILE = "lm_eval_kvpress_startup.pth"
WAYS = {"wheel": [str(ROOT)], "editable": ["--editable", str(ROOT)]}

pytest.importorskip("pip", reason="installs with pip")
pytest.importorskip("hatchling", reason="builds without network, with the hatchling of this environment")


@dataclass(frozen=True)
class Environment:
    folder: Path

    @classmethod
    def fresh(cls, folder: Path) -> Environment:
        venv.create(folder, symlinks=True)
        environment = cls(folder)
        lent = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
        (environment.site_packages / "zz_borrowed.pth").write_text("\n".join(lent))
        return environment

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def python(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs the environment's interpreter away from the checkout, so that nothing is found by accident."""
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [self.interpreter, *arguments],
            cwd=self.folder,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **offline},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not check or result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def lm_eval(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """The stock console script of the installed lm-eval, under this environment's interpreter."""
        script = Path(sysconfig.get_path("scripts")) / "lm_eval"
        if not script.exists():
            pytest.skip(f"no console script {script}")
        return self.python(script, *arguments)

    def pip(self, command: str, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.interpreter), command, "--quiet", *arguments]
        subprocess.run(pip, check=True, timeout=600)

    def install(self, way: str) -> None:
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *WAYS[way])


@pytest.fixture(scope="module", params=WAYS)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.fresh(tmp_path_factory.mktemp(request.param) / "env")
    environment.install(request.param)
    return environment


def test_stock_lm_eval_knows_the_models_without_loading_them(installed: Environment) -> None:
    code = (
        "import sys, lm_eval.models; from lm_eval.api.registry import model_registry\n"
        "print('pythia-kvpress' in model_registry, 'kvpress' in model_registry, 'torch' in sys.modules)"
    )
    result = installed.python("-c", code)
    assert (result.stdout.split(), result.stderr) == (["True", "True", "False"], "")


def test_start_up_loads_neither_torch_nor_lm_eval(installed: Environment) -> None:
    code = (
        "import sys; print(*{name.partition('.')[0] for name in sys.modules} & {'torch', 'lm_eval', 'lm_eval_kvpress'})"
    )
    assert installed.python("-c", code).stdout.split() == ["lm_eval_kvpress"]
    assert installed.python("-I", "-c", code).stdout.split() == ["lm_eval_kvpress"]
    assert installed.python("-S", "-c", code).stdout.split() == []


def files_below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_tasks_are_where_the_package_says(installed: Environment) -> None:
    code = "from lm_eval_kvpress.harness.plugin import tasks_path; print(tasks_path())"
    tasks = Path(installed.python("-c", code).stdout.strip())
    assert files_below(tasks) == files_below(ROOT / "tasks") != set()


def test_a_wheel_holds_the_package_the_tasks_and_the_start_up_line_and_no_more(tmp_path: Path) -> None:
    """Neither scripts nor tests: what a user of the wheel runs are the commands."""
    environment = Environment.fresh(tmp_path / "env")
    before = files_below(environment.site_packages)
    environment.install("wheel")
    found = files_below(environment.site_packages) - before
    package = {Path("lm_eval_kvpress") / path for path in files_below(ROOT / "lm_eval_kvpress")}
    tasks = {Path("lm_eval_kvpress", "tasks") / path for path in files_below(ROOT / "tasks")}
    expected = (package | tasks | {Path(STARTUP_FILE)}) - {Path("lm_eval_kvpress", "_startup.pth")}
    assert {path for path in found if not path.parts[0].endswith(".dist-info")} == expected


def test_uninstall_takes_everything_away(installed: Environment, tmp_path: Path) -> None:
    environment = Environment.fresh(tmp_path / "env")
    before = set(environment.site_packages.iterdir())
    environment.install("editable" if (installed.site_packages / "_lm_eval_kvpress.pth").exists() else "wheel")
    assert (environment.site_packages / STARTUP_FILE).exists()
    environment.pip("uninstall", "--yes", "lm-eval-kvpress")
    assert set(environment.site_packages.iterdir()) == before
    result = environment.python("-c", "import sys; print('lm_eval_kvpress' in sys.modules)")
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_a_checkout_that_moved_away_disturbs_nobody(tmp_path: Path) -> None:
    environment = Environment.fresh(tmp_path / "env")
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "docs", "tests", "*.safetensors")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    environment.pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", str(checkout))
    checkout.rename(tmp_path / "elsewhere")
    result = environment.python("-W", "error", "-c", "print('undisturbed')")
    assert (result.stdout, result.stderr) == ("undisturbed\n", "")


def test_start_up_file_is_read_after_the_path_of_the_checkout() -> None:
    """`site` reads start-up files in the order of their names, and ours needs the checkout on the path."""
    assert sorted([STARTUP_FILE, "_lm_eval_kvpress.pth", "_editable_impl_lm_eval_kvpress.pth"])[-1] == STARTUP_FILE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random GPTNeoX with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=symbols[-1]).save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(symbols),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=len(symbols) - 1,
        eos_token_id=len(symbols) - 1,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of two short documents, in a folder for `--include_path`."""
    folder = tmp_path_factory.mktemp("task")
    pages = [{"page": "The quick brown fox jumps over the lazy dog. " * count} for count in (8, 12)]
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    config = {
        "task": "two_pages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pages.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (folder / "two_pages.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


def byte_perplexity(output: Path) -> float:
    """The figure in the results file that lm-eval wrote for `--output_path output` (it adds the date to the name)."""
    (written,) = output.parent.glob(f"{output.stem}*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "pythia-kvpress"
    return float(results["results"]["two_pages"]["byte_perplexity,none"])


def test_stock_command_evaluates(installed: Environment, checkpoint: Path, task: Path, tmp_path: Path) -> None:
    """`lm_eval --model pythia-kvpress`, with no wrapper, flag or environment variable of ours."""
    output = tmp_path / "results.json"
    installed.lm_eval(
        *("--model", "pythia-kvpress", "--model_args", f"pretrained={checkpoint},press=snapkv,window_size=16"),
        *("--tasks", "two_pages", "--include_path", task, "--device", "cpu", "--output_path", output),
    )
    assert 1 < byte_perplexity(output) < 1000


@pytest.mark.slow
def test_run_equals_the_stock_command(installed: Environment, checkpoint: Path, task: Path, tmp_path: Path) -> None:
    arguments = [
        *("--model", "pythia-kvpress", "--model_args", f'{{"pretrained": "{checkpoint}", "press": "streaming_llm"}}'),
        *("--tasks", "two_pages", "--include_path", task, "--device", "cpu", "--output_path"),
    ]
    installed.lm_eval("run", *arguments, tmp_path / "stock.json")
    installed.python("-m", "lm_eval_kvpress", "run", *arguments, tmp_path / "ours.json")
    (installed.site_packages / STARTUP_FILE).rename(tmp_path / STARTUP_FILE)
    try:
        installed.python("-m", "lm_eval_kvpress", "run", *arguments, tmp_path / "explicit.json")
    finally:
        (tmp_path / STARTUP_FILE).rename(installed.site_packages / STARTUP_FILE)
    stock, ours, explicit = (byte_perplexity(tmp_path / f"{name}.json") for name in ("stock", "ours", "explicit"))
    assert stock == ours == explicit


@pytest.mark.slow
def test_stock_command_lists_our_tasks(installed: Environment) -> None:
    listed = installed.lm_eval("ls", "tasks").stdout
    for name in ("wikitext_kvpress", "pg19_kvpress", "kvpress_ppl"):
        assert f"|{name}" in listed.replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_what_kvpress_imports_is_there_on_every_python(tmp_path: Path, version: str) -> None:
    """Its command line needs ``fire<0.7``, which imports a module that Python 3.13 dropped."""
    pythons = [*sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), shutil.which(f"python{version}")]
    python = next(filter(None, pythons), None)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True, timeout=300)
    asked = re.search(r'"(standard-pipes[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert asked is not None
    inside = tmp_path / "env" / "bin" / "python"
    subprocess.run([inside, "-m", "pip", "install", "-q", "fire<0.7", asked[1]], check=True, timeout=300)
    subprocess.run([inside, "-c", "import fire"], check=True, timeout=60)
