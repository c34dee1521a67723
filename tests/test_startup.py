"""The import hook in interpreters of its own, against a stand-in for lm-eval that loads in no time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from scripts.benchmarks import startup

STARTUP_LINE = (ROOT / "lm_eval_kvpress" / "_startup.pth").read_text().splitlines()[-1]

REGISTRY = """
class Registry(dict):
    def register(self, name, *, target):
        assert name not in self, name
        self[name] = target

model_registry = Registry()
"""
MODELS = """
from lm_eval.api.registry import model_registry
assert not model_registry, "lm-eval enters its own models only into an empty registry"
model_registry["hf"] = "lm_eval.models.huggingface:HFLM"
"""
MANAGER = """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.paths = include_path
"""
TASK = """
class ConfigurableTask:
    def download(self, dataset_kwargs=None, **kwargs): ...
"""


@pytest.fixture
def lm_eval(tmp_path: Path) -> Path:
    """A folder that holds a package `lm_eval` with the three modules that matter here."""
    modules = {"api/registry": REGISTRY, "models/__init__": MODELS, "tasks/manager": MANAGER}
    for name, source in {"__init__": "", "api/__init__": "", "tasks/__init__": "", **modules}.items():
        file = tmp_path / "lm_eval" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path


def run(code: str, *path: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a bare interpreter that sees the standard library, the checkout and `path`."""
    places = [str(place) for place in (*path, ROOT)]
    program = f"import sys; sys.path[:0] = {places!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", *options, "-c", program], capture_output=True, text=True, timeout=60
    )


def output(code: str, *path: Path, options: tuple[str, ...] = ()) -> str:
    result = run(code, *path, options=options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


def test_startup_imports_nothing_but_itself() -> None:
    loaded = output("before = set(sys.modules); import lm_eval_kvpress._startup; print(*set(sys.modules) - before)")
    assert set(loaded.split()) == {"lm_eval_kvpress", "lm_eval_kvpress._startup"}


def test_the_benchmark_of_its_cost_starts_python_with_the_hook_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    startup.main(["--pairs", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["pairs"] == 1 and found["bare_ms"] > 0


def test_infinitebench_reads_its_data_set_once_tasks_are_there(lm_eval: Path) -> None:
    (lm_eval / "lm_eval" / "api" / "task.py").write_text(TASK)
    code = f"{STARTUP_LINE}\nfrom lm_eval.api.task import ConfigurableTask as Task\n"
    assert output(code + "print(hasattr(Task.download, 'reads_infinitebench'))", lm_eval) == "True"


def test_models_are_entered_after_lm_evals_own(lm_eval: Path) -> None:
    names = output(
        "import lm_eval_kvpress._startup, lm_eval.models; from lm_eval.api.registry import model_registry;"
        "print(*model_registry)",
        lm_eval,
    )
    assert names.split() == ["hf", "pythia-kvpress", "kvpress"]


def test_nothing_is_entered_before_lm_eval_models_is_imported(lm_eval: Path) -> None:
    code = (
        "import lm_eval_kvpress._startup; from lm_eval.api.registry import model_registry; print(len(model_registry))"
    )
    assert output(code, lm_eval) == "0"


def test_tasks_join_those_of_every_task_manager(lm_eval: Path) -> None:
    code = "import lm_eval_kvpress._startup, lm_eval.tasks.manager as m; print(m.TaskManager().paths[0])"
    assert output(code, lm_eval) == str(ROOT / "tasks")


def test_hook_leaves_no_trace_on_the_loader(lm_eval: Path) -> None:
    code = (
        "import lm_eval_kvpress._startup, lm_eval.models, inspect\n"
        "loader = lm_eval.models.__loader__\n"
        "assert loader is lm_eval.models.__spec__.loader\n"
        "assert type(loader).__name__ == 'SourceFileLoader' and 'exec_module' not in vars(loader), vars(loader)\n"
        "print('own models' in inspect.getsource(lm_eval.models))"
    )
    assert output(code, lm_eval) == "True"


def test_reload_and_a_second_install_enter_nothing_twice(lm_eval: Path) -> None:
    code = (
        "import importlib, lm_eval_kvpress._startup as startup, lm_eval.models, lm_eval.tasks.manager as manager\n"
        "from lm_eval.api.registry import model_registry\n"
        "startup.install(); startup.install()\n"
        "saved = dict(model_registry); model_registry.clear()\n"  # the stand-in insists on an empty one
        "importlib.reload(lm_eval.models)\n"
        "importlib.reload(manager); startup.install()\n"
        "hooks = sys.meta_path.count(startup.LmEvalHook)\n"
        "print(dict(model_registry) == saved, len(manager.TaskManager().paths), hooks)"
    )
    assert output(code, lm_eval) == "True 1 1"


def test_lm_eval_imported_before_the_hook_is_caught_up_with(lm_eval: Path) -> None:
    code = (
        "import lm_eval.models, lm_eval.tasks.manager as manager; import lm_eval_kvpress._startup\n"
        "from lm_eval.api.registry import model_registry\n"
        "print('kvpress' in model_registry, len(manager.TaskManager().paths))"
    )
    assert output(code, lm_eval) == "True 1"


@pytest.mark.parametrize(
    ("program", "error", "shown"),
    [
        ("/bin/lm_eval", "errors.UsageError('do this')", ["error: do this"]),
        ("/x/lm_eval/__main__.py", "errors.UsageError('do this')", ["error: do this"]),
        ("/bin/lm_eval", "ValueError('a defect')", ["Traceback", "ValueError: a defect"]),
        ("/x/mine.py", "errors.UsageError('do this')", ["Traceback", "lm_eval_kvpress.errors.UsageError: do this"]),
    ],
)
def test_lm_evals_command_ends_on_bad_input_in_one_line(
    lm_eval: Path, program: str, error: str, shown: list[str]
) -> None:
    code = f"import lm_eval_kvpress._startup, lm_eval.models\nfrom lm_eval_kvpress import errors\nraise {error}"
    result = run(f"sys.argv = [{program!r}]\n{code}", lm_eval)
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert [lines[0].partition(" (")[0], *lines[1:][-1:]] == shown


def test_a_program_of_ones_own_keeps_its_hook_for_errors(lm_eval: Path) -> None:
    code = "import lm_eval_kvpress._startup, lm_eval.models\nprint(sys.excepthook is sys.__excepthook__)"
    assert output(f"sys.argv = ['mine.py']\n{code}", lm_eval) == "True"


def test_a_spec_that_is_only_looked_up_enters_nothing(lm_eval: Path) -> None:
    code = (
        "import lm_eval_kvpress._startup, importlib.util\n"
        "spec = importlib.util.find_spec('lm_eval.models')\n"
        "from lm_eval.api.registry import model_registry\n"
        "print(len(model_registry), spec.loader.get_filename().endswith('__init__.py'))"
    )
    assert output(code, lm_eval) == "0 True"


def test_lm_eval_in_a_zip_archive(lm_eval: Path) -> None:
    """One zipimporter serves all modules of the archive, so what is hung on it must tell them apart."""
    archive = Path(shutil.make_archive(str(lm_eval / "archive"), "zip", lm_eval, "lm_eval"))
    code = (
        "import lm_eval_kvpress._startup, importlib.util\n"
        "importlib.util.find_spec('lm_eval.models'); importlib.util.find_spec('lm_eval.models')\n"
        "from lm_eval.api.registry import model_registry; assert not model_registry\n"
        "import lm_eval.tasks.manager, lm_eval.models\n"
        "print(*model_registry, len(lm_eval.tasks.manager.TaskManager().paths))"
    )
    assert output(code, archive) == "hf pythia-kvpress kvpress 1"


def test_an_lm_eval_that_scans_entry_points_itself_is_left_alone(lm_eval: Path) -> None:
    models = lm_eval / "lm_eval" / "models" / "__init__.py"
    models.write_text(models.read_text() + "model_registry['kvpress'] = 'an entry point'\n")
    code = (
        "import lm_eval_kvpress._startup, lm_eval.models; from lm_eval.api.registry import model_registry\n"
        "print(*model_registry.values())"
    )
    assert output(code, lm_eval).split(" lm_eval_kvpress") == [
        "lm_eval.models.huggingface:HFLM an entry point",
        ".harness.model:PythiaKVPress",
    ]


SCANNING_MANAGER = """
from importlib.metadata import entry_points

class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        found = [entry.load()() for entry in entry_points(group="lm_eval.tasks")]
        self.paths = [*found, *(include_path or [])]
"""


def test_an_lm_eval_that_scans_entry_points_for_tasks_finds_ours_once(lm_eval: Path) -> None:
    (lm_eval / "lm_eval" / "tasks" / "manager.py").write_text(SCANNING_MANAGER)
    metadata = lm_eval / "lm_eval_kvpress-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lm-eval-kvpress\nVersion: 0\n")
    declared = "[lm_eval.tasks]\nkvpress = lm_eval_kvpress.harness.plugin:tasks_path\n"
    (metadata / "entry_points.txt").write_text(declared)
    code = (
        "import lm_eval_kvpress._startup, lm_eval.tasks.manager as m\n"
        "print(*m.TaskManager().paths, len(m.TaskManager(include_path=['x']).paths))"
    )
    assert output(code, lm_eval) == f"{ROOT / 'tasks'} 2"


@pytest.mark.parametrize(
    "registry",
    ["", "model_registry = None", "class R(dict): pass\nmodel_registry = R()"],
    ids=["no registry", "no container", "no register"],
)
def test_an_unknown_lm_eval_goes_on_with_a_warning(lm_eval: Path, registry: str) -> None:
    (lm_eval / "lm_eval" / "api" / "registry.py").write_text(registry)
    (lm_eval / "lm_eval" / "models" / "__init__.py").write_text("")
    result = run("import lm_eval_kvpress._startup, lm_eval.models; print('goes on')", lm_eval)
    assert (result.returncode, result.stdout) == (0, "goes on\n")
    assert "RuntimeWarning: lm-eval-kvpress" in result.stderr


def test_a_changed_task_manager_goes_on_with_a_warning(lm_eval: Path) -> None:
    (lm_eval / "lm_eval" / "tasks" / "manager.py").write_text(
        "class TaskManager:\n    def __init__(self): self.fine = 1"
    )
    result = run("import lm_eval_kvpress._startup, lm_eval.tasks.manager as m; print(m.TaskManager().fine)", lm_eval)
    assert (result.returncode, result.stdout) == (0, "1\n")
    assert "RuntimeWarning: lm-eval-kvpress" in result.stderr


@pytest.mark.parametrize("options", [(), ("-W", "error")])
def test_what_our_part_raises_is_no_failure_of_lm_eval(lm_eval: Path, options: tuple[str, ...]) -> None:
    """A registry that raises an error of its own; with `-W error` our warning of it would be another one."""
    registry = lm_eval / "lm_eval" / "api" / "registry.py"
    registry.write_text(REGISTRY.replace("self[name] = target", "raise RuntimeError('closed')"))
    result = run("import lm_eval_kvpress._startup, lm_eval.models; print('goes on')", lm_eval, options=options)
    assert (result.returncode, result.stdout) == (0, "goes on\n")
    assert "RuntimeWarning: lm-eval-kvpress" in result.stderr and "closed" in result.stderr


def test_an_lm_eval_that_raises_fails_as_it_would_alone_and_can_be_imported_again(lm_eval: Path) -> None:
    (lm_eval / "lm_eval" / "models" / "__init__.py").write_text("raise RuntimeError('its own')")
    code = "import lm_eval_kvpress._startup\ntry: import lm_eval.models\nexcept RuntimeError as error: print(error)"
    assert output(code, lm_eval) == "its own"


def test_an_import_error_of_lm_eval_stays_its_own(lm_eval: Path) -> None:
    (lm_eval / "lm_eval" / "models" / "__init__.py").write_text("import no_such_library")
    result = run("import lm_eval_kvpress._startup, lm_eval.models", lm_eval)
    assert result.returncode == 1
    assert "No module named 'no_such_library'" in result.stderr and "RuntimeWarning" not in result.stderr


def test_silent_where_lm_eval_is_absent() -> None:
    result = run("import lm_eval_kvpress._startup; print('silent'); import lm_eval.models")
    assert result.stdout == "silent\n"
    assert result.stderr.strip().endswith("ModuleNotFoundError: No module named 'lm_eval'")


def test_start_up_line_is_silent_where_the_package_is_gone() -> None:
    """As after the checkout of an editable install has moved away."""
    bare = [sys.executable, "-I", "-S", "-W", "error", "-c", STARTUP_LINE]
    result = subprocess.run(bare, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_start_up_file_has_one_line_of_code() -> None:
    lines = (ROOT / "lm_eval_kvpress" / "_startup.pth").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [STARTUP_LINE]
    assert STARTUP_LINE.startswith("import "), "site executes a line only if it starts with `import `"
    assert output(f"{STARTUP_LINE}\nprint('lm_eval_kvpress._startup' in sys.modules)") == "True"
