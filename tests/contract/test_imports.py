"""Imports go one way, modules import cheaply, nothing that can run code is loaded from a file: read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY

OURS = ("pipelines", "components", "serving", "feature_repo")
FOUNDATION = {
    "components",
    "components.artifacts",
    "components.errors",
    "components.ids",
    "components.job",
    "components.launch",
    "components.local_ray",
    "components.progress",
    "components.retry",
    "components.settings",
    "components.stages",
}
HEAVY = ("torch", "ray", "kfp", "feast", "mlflow", "sentence_transformers", "transformers", "matplotlib", "pandera", "implicit")


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (REPOSITORY / package).rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Full names of the modules a file imports; `from components import ids` counts as components.ids."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if _is_module(full) else str(node.module)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(child):
            continue
        yield child
        yield from _outside_functions(child)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_module(name: str) -> bool:
    path = REPOSITORY.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(path: Path) -> list[str]:
    return [name for name in imported(path) if is_below(name, *OURS)]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", modules("components"), ids=name_of)
def test_components_do_not_know_the_pipelines(path: Path) -> None:
    assert [name for name in ours(path) if is_below(name, "pipelines")] == []


@pytest.mark.parametrize("path", modules("components"), ids=name_of)
def test_of_serving_only_the_stages_that_score_or_start_it_know_anything(path: Path) -> None:
    stage = path.relative_to(REPOSITORY / "components").parts[0]
    allowed = {
        # the one scorer, so that offline equals online, and which of a training's bundles it judges
        "evaluate": ("serving.bundle", "serving.scorer"),
        "train": ("serving.bundle", "serving.scorer"),  # writes bundles, and the golden requests that the scorer replays
        "promote": ("serving.bundle", "serving.scorer"),  # replays them before it promotes, and judges champions again
        "serve": ("serving",),
        # what answers requests, without HTTP, and the place where that looks for what the stage writes
        "batch": ("serving.bundle", "serving.scorer", "serving.recommender", "serving.schemas", "serving.lists"),
    }.get(stage, ())
    assert [name for name in ours(path) if is_below(name, "serving") and not is_below(name, *allowed)] == []


@pytest.mark.parametrize("path", modules("serving"), ids=name_of)
def test_serving_knows_the_foundation_the_method_the_registry_and_the_feature_names_only(path: Path) -> None:
    allowed = ("serving", "components.cllmr", "components.registry", "components.sideinfo.encoder", "feature_repo")
    assert [name for name in ours(path) if name not in FOUNDATION and not is_below(name, *allowed)] == []


@pytest.mark.parametrize("path", modules("serving"), ids=name_of)
def test_serving_needs_neither_torch_nor_the_pipelines_tools(path: Path) -> None:
    assert [name for name in imported(path) if is_below(name, "torch", "kfp", "mlflow", "sentence_transformers")] == []


@pytest.mark.parametrize("path", modules("feature_repo"), ids=name_of)
def test_the_feature_repository_knows_nothing_of_ours(path: Path) -> None:
    assert [name for name in ours(path) if not is_below(name, "feature_repo")] == []


@pytest.mark.parametrize("path", modules("components/cllmr"), ids=name_of)
def test_the_method_needs_torch_and_numbers_only(path: Path) -> None:
    allowed = (
        "torch",
        "numpy",
        "scipy",
        "safetensors",
        "components.cllmr",
        "pydantic",
        "components.artifacts",
        "components.errors",
    )
    names = [name for name in imported(path) if name.split(".")[0] not in sys.stdlib_module_names]
    assert [name for name in names if not is_below(name, *allowed)] == []


def test_vllm_is_reached_through_ray_data_in_one_file_only() -> None:
    known = {name_of(path) for path in modules(*OURS) for name in imported(path) if is_below(name, "vllm", "ray.data.llm")}
    assert known == {"components/sideinfo/vllm.py"}


@pytest.mark.parametrize("path", modules("components"), ids=name_of)
def test_only_component_files_know_kfp(path: Path) -> None:
    known = [name for name in imported(path) if is_below(name, "kfp")]
    assert known == [] or path.name == "component.py"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "components").glob("*/component.py")), ids=name_of)
def test_component_files_import_kfp_alone_at_module_level(path: Path) -> None:
    names = {name for name in imported(path, top_level_only=True) if name.split(".")[0] not in sys.stdlib_module_names}
    assert names == {"components.image", "kfp"}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "components").glob("*/config.py")), ids=name_of)
def test_config_files_import_cheaply(path: Path) -> None:
    names = [name for name in imported(path, top_level_only=True) if name.split(".")[0] not in sys.stdlib_module_names]
    assert [name for name in names if is_below(name, *HEAVY, "pandas", "scipy")] == []


@pytest.mark.parametrize("path", modules("pipelines"), ids=name_of)
def test_pipelines_import_no_stage_but_its_wrapper_and_its_config(path: Path) -> None:
    at_top = [name for name in imported(path, top_level_only=True) if is_below(name, "components")]
    allowed = ("config", "component")
    stages = [name for name in at_top if name not in FOUNDATION and name != "components.image"]
    assert [name for name in stages if name.split(".")[-1] not in allowed] == []


FORBIDDEN_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FORBIDDEN_CALLS = {"torch.load", "torch.jit.load", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.unsafe_load"}


def loads_code(path: Path) -> list[str]:
    """What in a file could run code from a file that is loaded: unpickling in all its forms, eval and exec."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [name for name in imported(path) if is_below(name, *FORBIDDEN_MODULES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        allow_pickle = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
        if called in FORBIDDEN_CALLS or called in ("eval", "exec"):
            found.append(called)
        if any(not (isinstance(value, ast.Constant) and value.value is False) for value in allow_pickle):
            found.append(f"{called}(allow_pickle)")
    return found


@pytest.mark.parametrize("path", modules(*OURS), ids=name_of)
def test_nothing_that_can_run_code_is_loaded_from_a_file(path: Path) -> None:
    assert loads_code(path) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from joblib import load", ["joblib"]),
        ("import torch\ntorch.load('x')", ["torch.load"]),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", ["np.load(allow_pickle)"]),
        ("import numpy as np\nnp.load('x', allow_pickle=flag)", ["np.load(allow_pickle)"]),
        ("import numpy as np\nnp.load('x', allow_pickle=False)", []),
        ("eval('1')", ["eval"]),
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path: Path, source: str, found: list[str]) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    assert loads_code(file) == found


def test_imports_are_found_in_functions_and_told_from_those_at_module_level(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import a\nfrom components import ids\ndef f():\n    import b\nif 1:\n    import c\n")
    assert sorted(imported(file)) == ["a", "b", "c", "components.ids"]
    assert sorted(imported(file, top_level_only=True)) == ["a", "c", "components.ids"]


def test_help_comes_without_importing_anything_heavy() -> None:
    heavy = (*HEAVY, "pandas", "scipy", "pyarrow")
    script = f"import sys, pipelines.cli; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"
