"""What the fork server imports ahead of need: learned from functions, and left out where a fork would notice."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from function.warm_imports import Order, named_in_source, site_of
from knative.local import imports as imports_module
from knative.local.imports import FILE, Imports
from tests.knative.local.forking import Stage, ask, lean_site, play, until
from tests.knative.local.running import Platform, platform_running, service
from tests.support import ROOT, wait_until

# Libraries that leave something behind when they are imported, and what is said of each.
BAD = {
    "raising": ("raise RuntimeError('too early')", "cannot be imported: RuntimeError: too early"),
    "leaving": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "threading_": ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "starts threads"),
    "forking": ("import subprocess; process = subprocess.Popen(['sleep', '60'])", "starts processes"),
    "handling": ("import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)", "sets signal handlers"),
    "connecting": ("import socket; pair = socket.socketpair()", "opens files or devices"),
    "device": ("null = open('/dev/zero')", "opens files or devices"),
    "locking": ("import multiprocessing; lock = multiprocessing.RLock()", "shares memory with its forks"),
    "moving": ("import os; os.chdir('/')", "changes the working directory"),
    "logging_": ("import logging; logging.basicConfig(level='DEBUG')", "changes how logs are written"),
    "hooking": ("import sys; sys.excepthook = print", "replaces standard files or hooks"),
    "changing": ("import os; os.environ['HOME'] = '/elsewhere'", "changes the variable HOME"),
    "choosing": ("import os; os.environ.get('CHOICE')", "reads CHOICE when it is imported, which is not the same in all pods"),
    "native": ("", "reads NATIVE_LEVEL when it is imported, which is not the same in all pods"),
    "secretive": ("import os; os.environ.get('DB_PASSWORD')", "reads DB_PASSWORD when it is imported, which is a secret"),
    "appending": ("import sys; sys.path.append('/elsewhere')", "changes sys.path"),
    "inserting": ("import sys; sys.path.insert(0, '/elsewhere')", "changes sys.path"),
    "finding": (
        "import sys\nclass Finder:\n    def find_spec(self, name, path, target=None): return self\nsys.meta_path.insert(0, Finder())",
        "changes how modules are found",
    ),
    "recursing": ("import sys; sys.setrecursionlimit(77777)", "changes the recursion limit"),
    "switching": ("import sys; sys.setswitchinterval(0.1)", "changes how often threads switch"),
    "silencing": ("import warnings; warnings.simplefilter('ignore', UserWarning)", "changes which warnings are shown"),
    "tracing": ("import sys; sys.setprofile(lambda *_: None)", "traces or profiles"),
    "patching": ("import socket; socket.create_connection = lambda *_, **__: 'PATCHED'", "replaces socket.create_connection"),
    "telling": ("import json; json.dumps = lambda *_, **__: 'PATCHED'", "replaces json.dumps"),
    "method": ("import http.client; http.client.HTTPConnection.request = lambda self: None", "replaces http.client.HTTPConnection.request"),
    "constant": ("import socket; socket.SOMAXCONN = 5", "replaces socket.SOMAXCONN"),
    "early": ("import xml.sax; xml.sax.parse = lambda *_: None", "replaces xml.sax.parse"),  # nobody else has it yet
    "instead": ("import sys, types; sys.modules['json'] = types.ModuleType('json')", "replaces json"),
    "builtin": ("import builtins; builtins._ = str", "replaces builtins._"),
    "another": ("import weights_cache.environment as ours; ours.masked = print", "replaces weights_cache.environment.masked"),
    "method_of_ours": (
        "import weights_cache.environment as ours; ours.SettingsError.__init__ = lambda self: None",
        "replaces weights_cache.environment.settings.SettingsError.__init__",
    ),
    "collecting": ("import gc; gc.set_threshold(1)", "changes what garbage is collected"),
    "spawning": ("import multiprocessing; multiprocessing.set_start_method('spawn')", "chooses how processes are started"),
    "looping": (
        "import asyncio\nclass Policy(asyncio.DefaultEventLoopPolicy): pass\nasyncio.set_event_loop_policy(Policy())",
        "replaces the event loops of asyncio",
    ),
    "seeding": ("import random; random.seed(5)", "seeds the random numbers of all others"),
    "seeding_numpy": ("import numpy; numpy.random.seed(5)", "seeds the random numbers of all others"),
    "large": ("content = bytearray(1 << 27); content[::4096] = b'x' * (1 << 15)", "would take the fork server to "),
}
GOOD = {
    "quiet": "import os, tqdm\nlevel = os.environ.get('LEVEL')\nos.environ.setdefault('QUIET_HOME', '/quiet')",
    "reading": "text = open(__file__)",
    "old_names": (
        "import sys\nclass Finder:\n    def find_spec(self, name, path, target=None): return self if name == 'older_names' else None\n"
        "sys.meta_path.insert(0, Finder())"
    ),
    "warning": (
        "import warnings\nwarnings.filterwarnings('ignore', module='warning')\n"
        "warnings.simplefilter('always', type('Ours', (Warning,), {}))"
    ),
    "lazy": "import asyncio, mimetypes, random, tempfile, typing_extensions\n"
    "asyncio.get_event_loop_policy(), tempfile.gettempdir(), mimetypes.init(), random.random()",
    "generating": "import random, numpy\nown, chosen = random.Random(), (random.Random(5), numpy.random.RandomState(5))",
    "asking": "import os\nfor name, value in os.environ.items(): pass\nos.environ.copy()",
}
OURS = ("function.agents.echo", "weights_cache.uri")
TRY = """
import json, os, sys
from function.warm_imports import Importer, LeftOut, Order, own_bytes

withheld = ["CHOICE", "DB_PASSWORD", "FUNCTION_AGENT", "NATIVE_LEVEL", "NATIVE_TOKEN", "PORT", "QUIET_TOKEN", "WEIGHTS_CACHE_DIR"]
encode = json.JSONEncoder().encode  # one of them replaces json.dumps
for library in sys.argv[1:]:
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        importer = Importer(Order(withheld=withheld, modules=[library], most_bytes=own_bytes() + (1 << 26)))
        try:
            importer.run([])
            said = ["", list(importer.libraries), importer.added]
        except LeftOut as error:
            said = [error.reason, [], {}]
        os.write(tell, encode(said).encode())
        os._exit(0)
    os.close(tell)
    print(json.dumps([library, *json.loads(os.read(told, 1 << 16))]))
    os.killpg(child, 9)
    os.wait()
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """For each library why it is left out, what is there after its import, and which variables it has added."""
    packages = tmp_path_factory.mktemp("libraries") / "site-packages"
    packages.mkdir()
    for name, code in {**{name: code for name, (code, _) in BAD.items()}, **GOOD}.items():
        (packages / f"{name}.py").write_text(code)
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/home",
        "PYTHONPATH": f"{packages}:{ROOT}",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", TRY, *BAD, *GOOD, *OURS], env=env, capture_output=True, text=True, timeout=60, check=True)
    return {library: said for library, *said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("library", BAD)
def test_a_library_that_leaves_something_behind_is_left_out(tried: Mapping[str, Any], library: str) -> None:
    assert tried[library][0].startswith(BAD[library][1])


@pytest.mark.parametrize("library", GOOD)
def test_a_library_that_leaves_nothing_behind_is_held(tried: Mapping[str, Any], library: str) -> None:
    reason, libraries, added = tried[library]
    assert (reason, library in libraries) == ("", True)
    assert added == ({"QUIET_HOME": "/quiet"} if library == "quiet" else {})


@pytest.mark.parametrize("module", OURS)
def test_settings_of_ours_are_no_reason_to_leave_our_modules_out(tried: Mapping[str, Any], module: str) -> None:
    assert tried[module] == ["", [], {}]


def test_a_library_that_our_modules_import_answers_for_itself() -> None:
    order = Order(modules=["function.agents", "weights_cache.restore", "numpy", "function.agents.echo", "torch"])
    assert list(order.names()) == ["numpy", "torch", "function.agents", "weights_cache.restore", "function.agents.echo"]


def test_what_an_agents_source_names(tmp_path: Path) -> None:
    files = {
        "my/agent.py": """
            from __future__ import annotations
            import os.path, numpy as np
            from typing import TYPE_CHECKING
            from transformers import pipeline, AutoTokenizer
            from my import near
            from . import beside
            import helper
            if TYPE_CHECKING:
                import pandas
            else:
                import polars
            def load():
                try:
                    from onnxruntime.capi import *
                except ImportError:
                    pass
        """,
        "my/near.py": "import sklearn.svm",
        "my/beside.py": "from ..outside import thing",
        "my/__init__.py": "",
        "helper/__init__.py": "from .inner import f",
        "helper/inner.py": "import PIL.Image; from my import agent",
        "broken.py": "import scipy; def",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines = text.splitlines()
        (tmp_path / name).write_text("\n".join(line[12:] for line in lines) if len(lines) > 1 else text)
    named = named_in_source("my.agent:Agent", [tmp_path / "nowhere", tmp_path])
    assert {name for name in named if name.partition(":")[0] not in ("os.path", "typing", "my", "helper", "outside")} == {
        *("numpy", "transformers:pipeline", "transformers:AutoTokenizer", "polars", "onnxruntime.capi", "sklearn.svm", "PIL.Image")
    }
    assert named_in_source("broken:Agent", [tmp_path]) == named_in_source("absent:Agent", [tmp_path]) == []


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/venv/lib/python3.11/site-packages/torch/__init__.py", "/venv/lib/python3.11/site-packages"),
        ("/usr/lib/python3/dist-packages/yaml.py", "/usr/lib/python3/dist-packages"),
        ("/usr/lib/python3.11/json/__init__.py", None),
        ("/project/agent.py", None),
        (None, None),
    ],
)
def test_what_is_installed(file: str | None, expected: str | None) -> None:
    assert site_of(file) == expected


def tell(imports: Imports, agent: str, text: str) -> None:
    Path(imports.variable(agent)[FILE]).write_text(text)


def test_what_functions_told_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports_module, "LOOK_S", 0.001)

    async def main() -> None:
        imports = Imports(tmp_path)
        imports.load()
        imports.want([{"FUNCTION_AGENT": "a:A"}, {"FUNCTION_AGENT": "b:B", "FUNCTION_AGENT_PATH": "/x:/y", "PYTHONPATH": "/z"}])
        assert imports.order(1)["modules"] == []
        assert imports.order(1)["sources"] == [{"agent": "a:A", "folders": []}, {"agent": "b:B", "folders": ["/x", "/y", "/z"]}]
        tell(imports, "a:A", '{"fresh": true, "modules": ["numpy", "scipy.linalg"]}')
        tell(imports, "gone:G", '{"fresh": true, "modules": ["elsewhere"]}')
        assert await imports.listen() == ["a:A", "gone:G"]
        tell(imports, "a:A", '{"fresh": false, "modules": ["pandas"]}')
        assert await imports.listen() == ["a:A"]
        imports.leave_out("bad", "starts threads", 7)
        imports.leave_out("large", "is large")
        await imports.held(["numpy"])

        again = Imports(tmp_path)
        again.load()
        again.want(imports.functions)
        assert again.order(1)["modules"] == ["numpy", "scipy.linalg", "pandas"]
        assert again.order(1)["sources"] == [{"agent": "b:B", "folders": ["/x", "/y", "/z"]}]
        assert again.order(1)["without"] == {"bad": 7}
        for odd in ("", "[]", '{"fresh": true, "modules": ["../x"]}', '{"fresh": true, "modules": [1]}', "{" * 5_000_000):
            tell(again, "a:A", odd)
        tell(again, "a:A", '{"fresh": false, "modules": ["numpy"]}')  # nothing new
        tell(again, "a:A", '{"fresh": true, "modules": ["numpy"]}')  # its code has changed between the runs
        tell(again, "b:B", '{"fresh": true, "modules": ["torch"]}')
        assert await again.listen() == ["b:B"]
        assert again.order(1)["modules"] == ["torch", "numpy"]  # the latest is first
        assert not list((tmp_path / "told").iterdir())
        await again.held(["bad"])
        assert again.left_out == {}

    asyncio.run(main())


def test_a_file_that_is_no_memory_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "imports.json").write_text('{"agents": 3}')
    imports = Imports(tmp_path)
    imports.load()
    assert imports.order(1)["modules"] == []


def test_what_the_fork_server_is_told_of_functions(tmp_path: Path) -> None:
    imports = Imports(tmp_path)
    one = {"LEVEL": "1", "HF_TOKEN": "both", "PORT": "1", "DB_PASSWORD": "mine"}
    imports.want([one, {"LEVEL": "1", "HF_TOKEN": "both", "PORT": "2"}])
    order = imports.order(1)
    assert order["environment"] == {"LEVEL": "1"}
    assert order["withheld"] == ["DB_PASSWORD", "HF_TOKEN", "PORT"]
    assert "both" not in json.dumps(order)


AGENT = """
import os
import numpy
import slow_library

class Agent:
    def load(self, weights, device):
        if os.environ.get("LIBRARY"):
            __import__(os.environ["LIBRARY"])

    def predict(self, inputs):
        told = {"pid": slow_library.pid, "level": slow_library.level, "quiet": os.environ.get("QUIET_HOME")}
        return [told | {"number": numpy.random.random()}] * len(inputs)
"""
SLOW = "import os\npid, level = os.getpid(), os.environ.get('SLOW_LEVEL')\nos.environ.setdefault('QUIET_HOME', '/quiet')\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an agent; its libraries are installed."""
    site = lean_site(tmp_path, monkeypatch)
    packages = site / "site-packages"
    packages.mkdir()
    (packages / "slow_library.py").write_text(SLOW)
    (packages / "threads_library.py").write_text(BAD["threading_"][0])
    (packages / "later_library.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{packages}:{site}:{ROOT}")
    monkeypatch.setattr(imports_module, "LOOK_S", 0.01)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "agent.py").write_text(AGENT)
    return folder


def test_functions_have_what_was_imported_for_them(project: Path, tmp_path: Path) -> None:
    imports = Imports(tmp_path / "imports")

    async def answer(stage: Stage, name: str, **settings: str) -> tuple[bool, Any]:
        process = stage.process("agent:Agent", name, FUNCTION_AGENT_PATH=str(project), **settings)
        async with stage.running(process) as container:
            return container.is_forked, await ask(process)

    async def scene(stage: Stage) -> None:
        # Its source has named them: the first one has them already.
        assert {"numpy", "slow_library"} <= set(stage.server.status()["modules"])
        assert stage.server.status()["bytes"] > 1 << 20
        is_forked, first = await answer(stage, "first")
        assert (is_forked, first["pid"], first["quiet"]) == (True, await stage.warm(), "/quiet")
        _, second = await answer(stage, "second")
        assert second["pid"] == first["pid"]
        assert second["number"] != first["number"]

        # A variable that was read by one of them.
        is_forked, other = await answer(stage, "other", SLOW_LEVEL="9")
        assert (is_forked, other["level"], other["quiet"]) == (False, "9", "/quiet")
        assert "SLOW_LEVEL is read when libraries are imported" in (tmp_path / "other.log").read_text()

        # Learned from one that runs; threads are no secret for long.
        before = await stage.warm()
        await answer(stage, "learning", LIBRARY="later_library")
        await until("it is held", lambda: "later_library" in stage.server.status()["modules"])
        assert await stage.warm() != before
        await answer(stage, "with threads", LIBRARY="threads_library")
        await until("it is left out", lambda: stage.server.status()["left_out"])
        assert stage.server.status()["left_out"] == {"threads_library": "starts threads when it is imported"}
        assert stage.server.pid  # the one before goes on
        await until("the next", lambda: stage.server._current and "threads_library" in stage.server._current.order["without"])
        assert "later_library" in stage.server.status()["modules"]
        assert stage.said == [
            "threads_library is imported by each function itself, which only makes its start longer: it starts threads when it is imported"
        ]

        # A file of the user's that would be in a library's place, and a package that is replaced.
        (project / "slow_library.py").write_text("pid, level = 0, 'mine'")
        is_forked, mine = await answer(stage, "mine")
        assert (is_forked, mine["level"]) == (False, "mine")
        (project / "slow_library.py").unlink()
        packages = tmp_path / "site/site-packages"
        before = await stage.warm()
        (packages / "new_library.py").write_text("")
        is_forked, _ = await answer(stage, "replaced")
        assert not is_forked
        assert "packages have been installed or removed" in (tmp_path / "replaced.log").read_text()
        await stage.warm(but=before)

    imports.load()
    imports.want([stage_env(project)])
    play(tmp_path, scene, imports)

    again = Imports(tmp_path / "imports")
    again.load()
    again.want([stage_env(project)])
    assert {"numpy", "slow_library", "later_library", "threads_library"} <= set(again.order(1)["modules"])
    assert set(again.order(1)["without"]) <= {"threads_library"}


def stage_env(project: Path) -> dict[str, str]:
    return {"FUNCTION_AGENT": "agent:Agent", "FUNCTION_AGENT_PATH": str(project)}


def test_a_library_that_ends_the_process_is_left_out(project: Path, tmp_path: Path) -> None:
    (tmp_path / "site/site-packages/slow_library.py").write_text("import os; os.abort()")
    imports = Imports(tmp_path / "imports")
    imports.want([stage_env(project)])

    async def scene(stage: Stage) -> None:
        could_not, without = stage.said
        assert could_not.startswith("the fork server could not be warmed up")  # once, which may have been anybody's doing
        assert without.startswith("slow_library is imported by each function itself")
        assert without.endswith(": it ends or hangs the process that imports it")
        assert "numpy" in stage.server.status()["modules"]
        process = replace(stage.process(), env={**stage.process().env, "FUNCTION_AGENT": "function.agents.echo:Echo"})
        async with stage.running(process) as container:
            assert container.is_forked

    play(tmp_path, scene, imports)


def test_a_library_that_forks_is_left_out_and_what_it_forked_ends(project: Path, tmp_path: Path) -> None:
    noted = tmp_path / "forked"
    code = f"import os, time\nif not os.fork():\n    open({str(noted)!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    (tmp_path / "site/site-packages/slow_library.py").write_text(f"{code}while not os.path.exists({str(noted)!r}): pass\n")
    imports = Imports(tmp_path / "imports")
    imports.want([stage_env(project)])

    async def scene(stage: Stage) -> None:
        assert stage.said == [
            "slow_library is imported by each function itself, which only makes its start longer: it starts processes when it is imported"
        ]
        assert stage.server.status()["left_out"] == {"slow_library": "starts processes when it is imported"}
        assert "numpy" in stage.server.status()["modules"]
        await until("what it forked has ended", lambda: not is_running(int(noted.read_text())))

    play(tmp_path, scene, imports)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


DRAWING = """
import random
import numpy

own, chosen = [random.Random(), numpy.random.default_rng(), numpy.random.RandomState()], [random.Random(5), numpy.random.default_rng(5)]
"""


def test_each_fork_draws_numbers_of_its_own_but_for_seeds_that_a_library_has_chosen(project: Path, tmp_path: Path) -> None:
    (tmp_path / "site/site-packages/drawing_library.py").write_text(DRAWING)
    (project / "agent.py").write_text(
        "import drawing_library, numpy, random\n"
        "class Agent:\n"
        "    def load(self, weights, device):\n"
        "        self.own = [generator.random() for generator in (random, numpy.random, *drawing_library.own)]\n"
        "        self.chosen = [generator.random() for generator in drawing_library.chosen]\n"
        "    def predict(self, inputs):\n"
        "        return [[self.own, self.chosen]] * len(inputs)\n"
    )
    imports = Imports(tmp_path / "imports")
    imports.want([stage_env(project)])

    async def scene(stage: Stage) -> None:
        assert "drawing_library" in stage.server.status()["modules"]
        told = []
        for name in ("first", "second"):
            process = stage.process("agent:Agent", name, FUNCTION_AGENT_PATH=str(project))
            async with stage.running(process) as container:
                assert container.is_forked
                told.append(await ask(process))
        (own, chosen), (other, same) = told
        assert len({*own, *other}) == 2 * len(own)
        assert chosen == same

    play(tmp_path, scene, imports)


TORCH = """
import os
from function.warm_imports import Importer, Order

importer = Importer(Order())
importer.run(["torch"])
for _ in range(2):
    child = os.fork()
    if not child:
        importer.generators.differ()
        import torch
        print(torch.rand(1).item(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.soak
def test_each_fork_draws_numbers_of_its_own_from_torch() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TORCH], env=env, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert len(set(done.stdout.split())) == 2


def memory(pid: int) -> Iterator[bytes]:
    """What a process can write to."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as content:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, access, *_ = line.split()
            if access.startswith("rw"):
                start, end = (int(number, 16) for number in span.split("-"))
                content.seek(start)
                with suppress(OSError):
                    yield content.read(end - start)


def test_no_function_nor_the_fork_server_knows_what_another_one_is_told(project: Path, tmp_path: Path) -> None:
    words = {name: f"{os.urandom(8).hex()}-of-{name}" for name in ("one", "other")}
    settings = {name: {**stage_env(project), "DB_PASSWORD": word, "PLACE": f"at-{word}"} for name, word in words.items()}
    imports = Imports(tmp_path / "imports")
    imports.want(list(settings.values()))

    def known(*pids: int) -> set[str]:
        return {name for name, word in words.items() for pid in pids if any(word.encode() in content for content in memory(pid))}

    async def scene(stage: Stage) -> None:
        assert stage.server.pid
        assert known(stage.server.pid, await stage.spare()) == set()
        for name, env in settings.items():
            process = stage.process("agent:Agent", name, **{key: value for key, value in env.items() if key != "FUNCTION_AGENT"})
            async with stage.running(process) as container:
                assert container.is_forked
                await ask(process)
                master = container._child.pid  # type: ignore[union-attr]
                workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
                assert known(master, *map(int, workers)) == {name}
                assert known(stage.server.pid, await stage.spare()) == set()

    play(tmp_path, scene, imports)


CLASSIFIER = """
from transformers import pipeline

class Agent:
    def load(self, weights, device):
        self.classify = pipeline("text-classification", model="{model}")

    def predict(self, inputs):
        return self.classify(list(inputs))
"""


@pytest.mark.soak
def test_a_function_of_transformers_starts_in_a_fraction_of_the_time(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

    model = tmp_path / "model"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=6, **sizes)).save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    BertTokenizer.from_pretrained(model).save_pretrained(model)
    (tmp_path / "classifier.py").write_text(CLASSIFIER.format(model=model))
    (expected,) = pipeline("text-classification", model=str(model))(["word"])
    container = {"command": ["python", "-m", "function"], "readinessProbe": {"httpGet": {"path": "/readyz"}}}
    env = {"FUNCTION_AGENT": "classifier:Agent", "FUNCTION_AGENT_PATH": str(tmp_path), "FUNCTION_HOST": "127.0.0.1"}
    scale = {"window": "6s", "scale-to-zero-pod-retention-period": "0s"}
    one = service("one", scale=scale, container=container, env=env, progress_deadline="120s")

    def start(platform: Platform) -> tuple[bool, float]:
        platform.wait_for("one", "zero", lambda found: not found["pods"], 120)
        reply = platform.call("one", "/", "POST", {"instances": ["word"]}, timeout=120).json()
        assert reply["predictions"] == [pytest.approx(expected)]
        (pod,) = platform.pods("one")
        return pod["forked"], pod["stages"]["ready"]

    with platform_running(tmp_path / "fresh", [one], "--no-fork-server") as platform:
        is_forked, fresh_s = start(platform)
        assert not is_forked
    kept = tmp_path / "state/imports/imports.json"
    for run in ("first", "second"):
        with platform_running(tmp_path / "state", [one]) as platform:
            held = wait_until("it holds them", lambda: "transformers" in platform.status()["fork_server"]["modules"], 120)
            is_forked, forked_s = start(platform)
            assert (is_forked, held) == (True, True)
            assert forked_s < fresh_s / 2  # a fifteenth on a machine that does nothing else
            assert "fork server: " in platform.relight("status").stdout
            if run == "first":
                wait_until("it is remembered", lambda: kept.exists() and "transformers.models.bert.modeling_bert" in kept.read_text())
