"""The code that figures come from: part of what a finished unit is, so that an edit of it measures anew."""

import ast
from collections.abc import Iterator
from pathlib import Path

import components
from components.artifacts import sha256_file


def sources(root: Path) -> dict[str, str]:
    """Every source file below the folder of the components that figures come from, and its hash.

    All of the method, whose parts are found by their files, the tasks, and what these import of the project, also inside
    functions. Not the platform at the top of the folder, nor what data and embeddings are made by: units know the texts and
    the version of their encoder.
    """
    apart = {root, root / "ingest", root / "sideinfo"}
    found = set[Path]()
    waiting = [*(root / "cllmr").rglob("*.py"), *(root / "experiment" / name for name in ("tasks.py", "search.py"))]
    while waiting:
        path = waiting.pop()
        if path not in found and root in path.parents and path.parent not in apart and path.is_file():
            found.add(path)
            waiting += _imported(path, root.parent)
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(found)}


def _imported(path: Path, above: Path) -> Iterator[Path]:
    """Where the modules are that a file imports, if they are below `above`: `from a import b` may mean a, or a.b."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        modules: list[Path] = []
        if isinstance(node, ast.ImportFrom):
            module = (path.parents[node.level - 1] if node.level else above).joinpath(*(node.module or "").split("."))
            modules = [module, *(module / name.name for name in node.names)]
        elif isinstance(node, ast.Import):
            modules = [above.joinpath(*name.name.split(".")) for name in node.names]
        for module in modules:
            yield from (module.with_suffix(".py"), module / "__init__.py")


CODE = sources(Path(components.__file__).parent)
"""What figures come from, as it was when this was imported, and as it is run. Part of what a unit is as well: who writes a
backbone, an effect or a kind of model raises no version."""
