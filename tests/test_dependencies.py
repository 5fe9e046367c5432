"""The arrows of the house, read from the syntax trees: who may import whom, and where each outside world is met.

Every rule is a pure function ``Tree -> list of complaints``; it is run on the repository, where it must complain of
nothing, and on a small made-up tree that breaks it, so that a rule which has stopped seeing anything fails too.
Imports inside functions count as arrows; only the two questions about *loading* a module (cycles, torch) leave them,
and imports for type checking, aside.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "engine", "kv_transfer", "protos", "prefill_worker", "decode_worker", "cluster")
OUR_OWN = (*ROOMS, "benchmarks", "tests")

# room -> rooms that it may import
ARROWS: Mapping[str, frozenset[str]] = {
    "core": frozenset(),
    "engine": frozenset({"core"}),
    "kv_transfer": frozenset({"core"}),
    "protos": frozenset({"core"}),
    "prefill_worker": frozenset({"core", "engine", "kv_transfer", "protos"}),
    "decode_worker": frozenset({"core", "engine", "kv_transfer", "protos"}),
    "cluster": frozenset({"core", "engine", "kv_transfer", "protos"}),
}
# The files that put a worker's processes together, the first rank's and the others': they alone see both workers and
# the half of engine that loads torch.
COMPOSERS = frozenset({"cluster.worker_host", "cluster.worker_halves", "cluster.rank_host"})
COMPOSER_ARROWS = frozenset({"core", "engine", "kv_transfer", "protos", "prefill_worker", "decode_worker", "cluster"})

# outside world -> the modules that may meet it
DOORS: Mapping[str, frozenset[str]] = {
    "time": frozenset({"core.clock"}),
    "ray": frozenset({"cluster.ray_fleet"}),
    "nixl": frozenset({"kv_transfer.nixl"}),
    "opentelemetry": frozenset({"cluster.otlp"}),
    "cuda": frozenset({"engine.phase_streams"}),
    "llguidance": frozenset({"engine.grammar"}),
}
# Modules of engine that the gateway and the simulator use: loading them must not load torch.
TORCH_FREE_ENGINE = frozenset(
    f"engine.{noun}"
    for noun in (
        "cache_layout",
        "cache_tiers",
        "chunked_prefill",
        "colocated_mode",
        "config",
        "cost_fit",
        "disk_pages",
        "grammar",
        "model_source",
        "page_allocator",
        "page_tiers",
        "reload_choice",
        "reload_costs",
        "scheduler",
        "sequence",
        "step_budget",
        "step_plan",
        "step_seconds",
        "steps_under_way",
    )
)
TORCH = frozenset({"torch", "transformers"})
# Pages in device memory are gathered and scattered by torch's kernels; only the composer, which has a pool, loads it.
STAGING = "kv_transfer.staging_device"
# The gateway tokenises, so it may load this one name from transformers, when it first needs it.
TOKENIZER, TOKENIZER_MAY_IMPORT = "cluster.tokenizer", frozenset({"transformers", "transformers.AutoTokenizer"})
# The gateways are leaves: only the file that puts the gateway process together imports them.
GATEWAYS, GATEWAY_COMPOSER = frozenset({"cluster.grpc_gateway", "cluster.http_gateway"}), "cluster.launch"

VAGUE = re.compile(r"^(utils?|helpers?|common|misc|managers?)\.py$")


@dataclass(frozen=True)
class Import:
    """``module`` names ``target`` at ``line``; ``on_load`` when loading the module loads the target too."""

    module: str
    target: str
    line: int
    on_load: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class Tree:
    """Python sources by path relative to the repository's root, generated code left out."""

    sources: Mapping[str, str]

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module name -> path."""
        return {".".join(Path(path).with_suffix("").parts).removesuffix(".__init__"): path for path in self.sources}

    @cached_property
    def imports(self) -> list[Import]:
        return [found for module, path in self.modules.items() for found in _imports(module, self.sources[path])]

    @cached_property
    def _loads(self) -> dict[str, set[str]]:
        """Module name -> what its own text loads."""
        targets: dict[str, set[str]] = {name: set() for name in self.modules}
        for found in self.imports:
            if found.on_load:
                targets[found.module].add(found.target)
        return targets

    def loaded_by(self, module: str) -> set[str]:
        """Every import target, ours or foreign, that loading ``module`` loads in turn."""
        reached: set[str] = set()
        waiting = [module]
        while waiting:
            new = self._loads.get(waiting.pop(), set()) - reached
            reached |= new
            waiting += new
        return reached


def _imports(module: str, source: str) -> Iterator[Import]:
    def visit(node: ast.AST, on_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, on_load)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(module, node)
            yield Import(module, origin, node.lineno, on_load)
            for alias in node.names:
                yield Import(module, f"{origin}.{alias.name}", node.lineno, on_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for checked_only in node.body:
                yield from visit(checked_only, False)
            for otherwise in node.orelse:
                yield from visit(otherwise, on_load)
        else:
            lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, on_load and not lazy)

    yield from visit(ast.parse(source), True)


def _origin(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")[: -node.level]
    return ".".join([*parents, node.module] if node.module else parents)


def _room(name: str) -> str:
    return name.split(".")[0]


# ---- the rules ----


def arrows_between_rooms(tree: Tree) -> list[str]:
    """A room imports only the rooms that its arrows point to."""

    def allowed(found: Import) -> frozenset[str]:
        return COMPOSER_ARROWS if found.module in COMPOSERS else ARROWS[_room(found.module)] | {_room(found.module)}

    return [str(i) for i in tree.imports if _room(i.target) in OUR_OWN and _room(i.target) not in allowed(i)]


def import_cycles(tree: Tree) -> list[str]:
    """No module loads itself again through the modules that it loads."""
    return [f"{name} loads itself" for name in tree.modules if name in tree.loaded_by(name)]


def doors_to_outside_worlds(tree: Tree) -> list[str]:
    """Time, Ray and NIXL are met in one file each."""
    return [str(i) for i in tree.imports if _room(i.target) in DOORS and i.module not in DOORS[_room(i.target)]]


def torch_outside_the_engine(tree: Tree) -> list[str]:
    """Torch and transformers are imported by engine alone, but for the gateway's tokenizer and the staging of pages."""

    def allowed(found: Import) -> bool:
        if found.module == TOKENIZER and not found.on_load:
            return found.target in TOKENIZER_MAY_IMPORT
        return _room(found.module) == "engine" or (found.module == STAGING and _room(found.target) == "torch")

    return [str(i) for i in tree.imports if _room(i.target) in TORCH and not allowed(i)]


def torch_loaded_without_need(tree: Tree) -> list[str]:
    """Loading a torch-free module of engine, or any module of cluster but the composer, loads no torch."""
    light = [m for m in tree.modules if m in TORCH_FREE_ENGINE or (_room(m) == "cluster" and m not in COMPOSERS)]
    return [f"{m} loads {t}" for m in light for t in sorted(tree.loaded_by(m)) if t in TORCH]


def torch_half_used_by_the_cluster(tree: Tree) -> list[str]:
    """The cluster uses torch-free engine modules only, not even the others lazily; the composer may use all."""
    heavy = {m for m in tree.modules if _room(m) == "engine" and tree.loaded_by(m) & TORCH}
    return [
        str(i) for i in tree.imports if _room(i.module) == "cluster" and i.module not in COMPOSERS and i.target in heavy
    ]


def importers_of_gateways(tree: Tree) -> list[str]:
    """Nothing imports a gateway but the file that puts the gateway process together."""
    return [str(i) for i in tree.imports if i.target in GATEWAYS and i.module != GATEWAY_COMPOSER]


def code_in_package_files(tree: Tree) -> list[str]:
    """``__init__.py`` files are empty."""
    return [f"{path} is not empty" for path, text in tree.sources.items() if path.endswith("__init__.py") and text]


def vague_file_names(tree: Tree) -> list[str]:
    """A file is named after its noun."""
    return [f"{path} says nothing" for path in tree.sources if VAGUE.match(Path(path).name)]


Rule = Callable[[Tree], list[str]]

# rule -> (a tree that breaks it, the one complaint that it must make)
BROKEN: Mapping[Rule, tuple[dict[str, str], str]] = {
    arrows_between_rooms: (
        {"engine/engine.py": "def f():\n    from kv_transfer import sender\n", "kv_transfer/sender.py": ""},
        "engine.engine:2 imports kv_transfer",
    ),
    import_cycles: (
        {"core/a.py": "import core.b", "core/b.py": "try:\n    from core import a\nfinally: pass"},
        "core.a",
    ),
    doors_to_outside_worlds: ({"cluster/router.py": "async def f():\n    from time import sleep\n"}, "imports time"),
    torch_outside_the_engine: (
        {"cluster/tokenizer.py": "def f():\n    from transformers import AutoModel\n"},
        "cluster.tokenizer:2 imports transformers.AutoModel",
    ),
    torch_loaded_without_need: (
        {"engine/scheduler.py": "import engine.page_pool", "engine/page_pool.py": "import torch"},
        "engine.scheduler loads torch",
    ),
    torch_half_used_by_the_cluster: (
        {"cluster/router.py": "def f():\n    import engine.sampler", "engine/sampler.py": "import torch"},
        "cluster.router:2 imports engine.sampler",
    ),
    importers_of_gateways: ({"cluster/cli.py": "from cluster import http_gateway"}, "imports cluster.http_gateway"),
    code_in_package_files: ({"core/__init__.py": "from core.clock import Clock\n"}, "core/__init__.py is not empty"),
    vague_file_names: ({"engine/utils.py": ""}, "engine/utils.py says nothing"),
}
RULES = tuple(BROKEN)


@pytest.fixture(scope="module")
def repository() -> Tree:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    written = [path for path in paths if not path.stem.endswith(("_pb2", "_pb2_grpc"))]
    return Tree({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in written})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Rule, repository: Tree) -> None:
    assert rule(repository) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_sees_a_tree_that_breaks_it(rule: Rule) -> None:
    sources, complaint = BROKEN[rule]

    complaints = rule(Tree(sources))

    assert any(complaint in made for made in complaints), complaints


def test_every_room_is_read(repository: Tree) -> None:
    assert {_room(name) for name in repository.modules} == set(ROOMS)


def test_every_room_tells_type_checkers_that_it_is_typed() -> None:
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []


def test_lazy_and_typing_imports_are_arrows_that_load_nothing() -> None:
    tree = Tree({"core/a.py": "if TYPE_CHECKING:\n    import torch\ndef f():\n    import ray\nimport json\n"})

    assert {(i.target, i.on_load) for i in tree.imports} == {("torch", False), ("ray", False), ("json", True)}


def test_relative_imports_are_resolved() -> None:
    tree = Tree({"cluster/router.py": "from .view import ClusterView\nfrom . import view\n"})

    assert {i.target for i in tree.imports} == {"cluster.view", "cluster.view.ClusterView", "cluster"}
