"""Who may import whom, read from the syntax tree of every file (docs/architecture.md draws it).

Also here, because they are one walk of the same trees: absolute imports only, the environment is
read in one file, private JAX names are used in one, partition specs are written in one package.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SIBLINGS = ("layers", "pallas_kernels", "sharding", "server")

# Modules that anyone may import: data that crosses boundaries. They import only each other.
LEAVES = frozenset(
    f"jengine.{name}"
    for name in (
        "errors",
        "kv_spec",
        "config",
        "logits_processors",
        "request",
        "outputs",
        "protocol",
        "structured_outputs",
        "cluster",
    )
)
COMPAT = "jengine.jax_compat"  # the one place for private JAX names

# A module may import its own group, the leaves, and what its group's line names. Prefixes count as
# whole dotted parts; the longest prefix wins.
MAY_IMPORT: dict[str, frozenset[str]] = {
    COMPAT: frozenset(),
    "jengine.sharding": frozenset({COMPAT}),
    "jengine.pallas_kernels": frozenset({COMPAT}),
    "jengine.layers": frozenset({"jengine.pallas_kernels", "jengine.sharding", COMPAT}),
    "jengine.text": frozenset(),
    "jengine.loading": frozenset({"jengine.layers.param", "jengine.text", "jengine.sharding"}),
    "jengine.models": frozenset(
        {"jengine.layers", "jengine.loading", "jengine.pallas_kernels", "jengine.sharding"}
    ),
    "jengine.core": frozenset(),
    "jengine.distributed": frozenset(),
    "jengine.grammar": frozenset({"jengine.text"}),
    "jengine.runtime": frozenset(
        {
            "jengine.models",
            "jengine.layers",
            "jengine.loading",
            "jengine.pallas_kernels",
            "jengine.sharding",
            "jengine.core.plan",
            "jengine.distributed",
            COMPAT,
        }
    ),
    "jengine.engine": frozenset(
        {
            "jengine.runtime",
            "jengine.core",
            "jengine.models",
            "jengine.grammar",
            COMPAT,
        }
    ),
    "jengine.follower": frozenset({"jengine.runtime", "jengine.distributed"}),
    "jengine.convert": frozenset(
        {"jengine.models.loader", "jengine.loading", "jengine.layers.param", "jengine.text"}
    ),
    "jengine.prebuild": frozenset(
        {
            "jengine.runtime",
            "jengine.loading",
            "jengine.layers.param",
        }
    ),
}
# The front end reaches the core by name ("jengine.engine:EngineCore") and by messages.
FRONT_END = frozenset(
    f"jengine.{name}"
    for name in (
        "async_engine",
        "beam_search",
        "core_client",
        "core_process",
        "determinism",
        "front_end",
        "input_processor",
        "llm",
        "llm_arguments",
        "metrics_reader",
        "model_info",
        "output_processor",
        "progress",
        "request_stream",
        "sync_engine",
        "teacher_forcing",
        "thinking_markers",
        "vllm_compat",
    )
)
for _name in FRONT_END:
    MAY_IMPORT[_name] = FRONT_END | {
        "jengine.text",
        "jengine.loading",
        "jengine.engine",
        "jengine.grammar.checker",
    }
MAY_IMPORT["jengine"] = FRONT_END  # lazy exports of jengine/__init__.py
MAY_IMPORT["jengine.client"] = frozenset({"jengine.server.proto"})
MAY_IMPORT["jengine.server"] = frozenset(
    {
        "jengine",
        "jengine.async_engine",
        "jengine.beam_search",
        "jengine.client",
        "jengine.determinism",
        "jengine.convert",
        "jengine.follower",
        "jengine.input_processor",
        "jengine.loading.pull",
        "jengine.prebuild",
        "jengine.text.deepseek_v4_chat",
        "jengine.text.deepseek_v4_completion",
        "jengine.text.deepseek_v4_stream",
        "jengine.text.tokenizer",
    }
)

# The host side: these start without the seconds that importing JAX takes.
WITHOUT_JAX = (
    *sorted(LEAVES),
    *("jengine.core", "jengine.distributed", "jengine.text", "jengine.grammar"),
    *("jengine.server", "jengine.client"),
)
ENVIRONMENT_READER = "jengine.config"


def test_nobody_breaks_the_rules() -> None:
    found = [
        f"{path.relative_to(REPO)}: {problem}"
        for module, path in _modules()
        for problem in violations(module, path.read_text())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        (
            "jengine.layers.mlp",
            "from jengine.runtime import step",
            "may not import jengine.runtime",
        ),
        (
            "jengine.layers.mlp",
            "def f():\n  import jengine.core.plan",
            "may not import jengine.core",
        ),
        ("jengine.core.queue", "import jax", "imports jax"),
        ("jengine.core.queue", "from jengine.runtime.buckets import B", "may not import"),
        ("jengine.runtime.step", "from jengine.core.scheduler import S", "may not import"),
        ("jengine.server.http_server", "from jengine.engine import EngineCore", "may not import"),
        ("jengine.models.llama", "from jengine import server", "may not import jengine.server"),
        ("jengine.errors", "import jengine.core.plan", "may not import"),
        ("jengine.request", "from jax import numpy", "imports jax"),
        ("jengine.brand_new", "import os", "is in no group"),
        ("jengine.layers.mlp", "from . import linear", "relative import"),
        ("jengine.layers.mlp", "from layers import linear", "import jengine.layers"),
        ("jengine.layers.mlp", "import os\nx = os.environ['A']", "reads the environment"),
        ("jengine.layers.mlp", "from os import getenv", "reads the environment"),
        ("jengine.layers.mlp", "import jax\njax._src.core.Trace", "private jax._src"),
        ("jengine.layers.mlp", "from jax._src import core", "private jax._src"),
        ("jengine.layers.mlp", "from jaxlib import _jax", "private jaxlib._jax"),
        ("jengine.runtime.runner", "from jax.sharding import PartitionSpec", "PartitionSpec"),
    ],
)
def test_each_rule_bites(module: str, source: str, problem: str) -> None:
    assert any(problem in found for found in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jengine.layers.mlp", "import jax\nfrom jengine.layers import linear"),
        ("jengine.core.scheduler", "from jengine.config import X\nfrom jengine.core.plan import Y"),
        ("jengine.server.http_server", "from jengine import AsyncEngine\nimport starlette"),
        ("jengine.config", "import os\nx = os.environ.get('A')"),
        (COMPAT, "from jax._src import core"),
        ("jengine.sharding.rules", "from jax.sharding import PartitionSpec"),
    ],
)
def test_rules_let_these_pass(module: str, source: str) -> None:
    assert not violations(module, source)


def test_host_modules_load_without_jax() -> None:
    """The syntax tree shows direct imports; this shows indirect ones."""
    groups = {*LEAVES, *FRONT_END, "jengine.core", "jengine.text", "jengine.server"}
    groups |= {"jengine.grammar", "jengine.distributed"}
    names = [module for module, _ in _modules() if _group(module) in groups]
    code = (
        f"import sys, {', '.join(names)}\nprint([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def violations(module: str, source: str) -> list[str]:
    """What `module` does that the rules forbid, one line each."""
    tree = ast.parse(source)
    imported = list(_imports(tree))
    return [
        *_group_problems(module, imported),
        *_jax_problems(module, tree, imported),
        *_other_problems(module, tree, imported),
    ]


def _group_problems(module: str, imported: list[str]) -> Iterator[str]:
    group = _group(module)
    if group is None:
        yield f"{module} is in no group: give it a line in MAY_IMPORT"
        return
    allowed = {group} | LEAVES | MAY_IMPORT.get(group, frozenset())
    if group in LEAVES:
        allowed = set(LEAVES)
    for name in imported:
        target = _module_of(name)
        if target.split(".")[0] != "jengine" or target == module:
            continue
        if not any(_is_within(target, prefix) for prefix in allowed):
            yield f"may not import {name}"


def _jax_problems(module: str, tree: ast.AST, imported: list[str]) -> Iterator[str]:
    if any(_is_within(module, prefix) for prefix in WITHOUT_JAX):
        for name in imported:
            if name.split(".")[0] in ("jax", "jaxlib", "flax"):
                yield f"imports {name}, but this part of the host runs without JAX"
    if module == COMPAT:
        return
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for name in sorted({*imported, *used}):
        parts = name.split(".")
        if parts[0] in ("jax", "jaxlib") and any(
            part.startswith("_") and not part.startswith("__") for part in parts
        ):
            yield f"uses private {name}; only {COMPAT} may"


def _other_problems(module: str, tree: ast.AST, imported: list[str]) -> Iterator[str]:
    for name in imported:
        if name.startswith("."):
            yield f"relative import of {name}"
        if name.split(".")[0] in SIBLINGS:
            yield f"imports {name}: import jengine.{name}"
        if name.endswith(".PartitionSpec") and not _is_within(module, "jengine.sharding"):
            yield f"imports {name}: write it in sharding/rules.py"
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    environment = {"os.environ", "os.getenv", "os.environb", "os.putenv"}
    if module != ENVIRONMENT_READER and environment & {*imported, *attributes}:
        yield f"reads the environment; only {ENVIRONMENT_READER} does"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def _modules() -> list[tuple[str, Path]]:
    """Every hand-written source file, under the name it is imported by."""
    roots = {"jengine": REPO / "jengine"} | {f"jengine.{d}": REPO / d for d in SIBLINGS}
    found = []
    for name, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).with_suffix("").parts
            if (name == "jengine" and inside[0] in SIBLINGS) or "_pb2" in path.stem:
                continue  # reached through a symlink, or generated
            if inside[-1] == "__init__":
                inside = inside[:-1]
            found.append((".".join((name, *inside)), path))
    return found


def _module_of(name: str) -> str:
    """The module that `name` lives in: `jengine.errors.LoadError` -> `jengine.errors`."""
    known = {module for module, _ in _modules()} | set(MAY_IMPORT) | LEAVES
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def _group(module: str) -> str | None:
    groups = [group for group in LEAVES | set(MAY_IMPORT) if _is_within(module, group)]
    return max(groups, key=len, default=None)


def _is_within(module: str, prefix: str) -> bool:
    # "jengine" as a prefix means its __init__.py, which holds only lazy exports of public names.
    return module == prefix or (prefix != "jengine" and module.startswith(prefix + "."))
