"""Modules of other people around weights: what their constructors compute is there, what they only initialise costs nothing."""

import copy
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tests.support import ROOT, fill_cache
from tests.weights_cache.node import URI, later
from weights_cache.cache import NodeCache
from weights_cache.errors import WeightsError
from weights_cache.reader import Weights
from weights_cache.restore.module import assemble


def sinusoids(length: int, size: int) -> Tensor:
    angles = torch.arange(length)[:, None] * torch.exp(-math.log(10_000) * torch.arange(0, size, 2) / size)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Rotary(nn.Module):
    """Like Llama's: buffers that are not saved, one computed from the other."""

    inv_freq: Tensor
    angles: Tensor

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (100.0 ** (torch.arange(0, 4, 2, dtype=torch.int64).float() / 4)), persistent=persistent)
        self.register_buffer("angles", torch.outer(torch.arange(6.0), self.inv_freq), persistent=persistent)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        return x + (self.angles.cos() * self.scale).sum()


class Positions(nn.Module):
    """Like BERT's: numbers of positions that are not saved; like a VQ-VAE's: buffers that are."""

    position_ids: Tensor
    types: Tensor
    mask: Tensor
    average: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.register_buffer("position_ids", torch.arange(6).expand((1, -1)), persistent=False)
        self.register_buffer("types", torch.zeros(self.position_ids.size(), dtype=torch.long), persistent=False)
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1), persistent=False)
        self.register_buffer("average", self.embed.weight.detach().clone())
        self.register_buffer("counts", torch.zeros(6))
        self.counts.copy_(self.embed.weight.sum(dim=1))

    def forward(self, x: Tensor) -> Any:
        return x + self.embed(self.position_ids + self.types).sum() + self.average.sum() + self.counts.sum() + self.mask.exp().sum()


class Askers(nn.Module):
    """Asks its parameters where they are, and for tensors like them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        assert self.layer.weight.device.type == "cpu"
        assert self.layer.weight.get_device() == -1
        self.layer.to(self.layer.weight.device).cpu()
        where: dict[str, Any] = {"device": self.layer.weight.device, "dtype": self.layer.weight.dtype}
        made = {
            "on_its_device": torch.arange(3, **where),
            "zeros": torch.zeros_like(self.layer.weight),
            "full": torch.full_like(self.layer.bias, 3.0),
            "ones": self.layer.weight.new_ones(2),
            "given": self.layer.weight.data.new_tensor([1.0, 2.0]),
            "moved": torch.arange(3).to(self.layer.weight),
            "moved_by_name": torch.arange(3).to(tensor=self.layer.weight),  # type: ignore[call-overload]
            "sized": torch.eye(*self.layer.weight.shape),
            "counted": torch.tensor(float(self.layer.weight.numel())),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + sum(buffer.sum() for buffer in self.buffers())


class Readers(nn.Module):
    """Reads values of what it computes, as Swin's drop path rates are; tries itself to know a shape."""

    table: Tensor
    listed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.3, 4)]
        self.layers = nn.ModuleList(nn.Linear(4, 4) for rate in self.rates if rate > 0.15)
        table = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        self.register_buffer("table", table[:, :, None] - table[:, None, :], persistent=False)
        self.widest = int(self.table.max()) if self.table.any() else 0
        self.conv = nn.Sequential(nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.GELU())
        self.out = nn.Linear(self.conv(torch.zeros(1, 1, 4)).flatten(1).shape[1], 4)
        self.register_buffer("listed", torch.tensor([*self.table.flatten().tolist(), self.widest]), persistent=False)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.out(self.conv(x[:, None]).flatten(1)) + self.listed.sum()


class Initialisers(nn.Module):
    """Initialises in every way there is."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        before = nn.Parameter(torch.empty(4, 4))
        nn.init.orthogonal_(before)
        self.before = before
        self.computed = nn.Parameter(torch.log(torch.arange(1, 5).float().repeat(4, 1)), requires_grad=False)
        self.drawn = nn.Parameter(torch.randn(4, 4) * 0.02)
        self.after = nn.Linear(4, 4)
        for init in (nn.init.kaiming_uniform_, nn.init.xavier_normal_, nn.init.trunc_normal_, nn.init.eye_, nn.init.dirac_):
            init(self.after.weight if init is not nn.init.dirac_ else nn.Parameter(torch.empty(2, 2, 3)))
        nn.init.sparse_(self.after.weight, 0.5)
        nn.init.constant_(tensor=self.after.bias, val=1.0)
        self.after.weight.data = sinusoids(4, 4)
        self.after.weight.data.normal_(0, 0.02).mul_(2.0)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.scalar.data = torch.tensor(0.7)
        mask = torch.ones(4, 4).triu()
        with torch.no_grad():
            self.after.weight.copy_(sinusoids(4, 4))
            self.after.weight[0].fill_(0)
            self.after.weight[torch.tensor([1, 2])] = torch.ones(4)
            self.after.weight[mask.bool()] = 2.0
            self.after.bias[torch.tensor(1)] = 3.0
            self.after.weight *= mask
            self.after.weight.data = torch.where(mask > 0, self.after.weight, mask)
            self.drawn.div_(torch.cat([self.after.weight, mask]).norm() + self.scalar * torch.tensor(2.0))
            self.drawn.clamp_(min=mask)
        self.several = nn.ParameterList([torch.ones(2), nn.Parameter(torch.zeros(2))])
        self.nothing = nn.Parameter()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.after(x @ self.before + self.computed + self.drawn * self.mask) * self.scalar + self.several[0].sum()


class Tied(nn.Module):
    """One parameter in several places, one buffer in two, one module in two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.embed.weight
        self.first, self.second = Rotary(), Rotary()
        self.second.inv_freq = self.first.inv_freq
        self.third = self.first

    def forward(self, x: Tensor) -> Any:
        return self.third(self.second(self.first(self.head(x)))) + self.again


class Stock(nn.Module):
    """Torch's own, among them such as copy themselves, keep lists of their parameters or compute them from others."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
        self.rnn = nn.LSTM(4, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.conv = nn.utils.weight_norm(nn.Conv1d(4, 4, 3, padding=1))
        self.norm = nn.BatchNorm1d(4)
        self.copied = copy.deepcopy(self.norm)

    def forward(self, x: Tensor) -> Any:
        x = self.spectral(self.normed(self.rnn(self.encoder(x[None]))[0]))
        return self.copied(self.norm(self.conv(x.mT)))


def saved(module: nn.Module) -> dict[str, Tensor]:
    """Its state as it would be saved: what is shared once."""
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if all(tensor.data_ptr() != other.data_ptr() or not tensor.numel() for other in state.values()):
            state[name] = tensor.detach().clone().contiguous()
    return state


def put(cache: NodeCache, state: Mapping[str, Tensor]) -> None:
    fill_cache(cache.root, URI, {"model.safetensors": save(dict(state))})


def shared(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names that are of one object."""
    return sorted(
        sorted(name for name, tensor in tensors.items() if tensor is one) for one in {id(t): t for t in tensors.values()}.values()
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("device", ["cpu", "host"])
@pytest.mark.parametrize(
    "build",
    [pytest.param(build, id=build.__name__.lower()) for build in (Rotary, Positions, Askers, Readers, Initialisers, Tied, Stock)],
)
def test_a_module_is_what_its_constructor_and_the_weights_make_of_it(
    cache: NodeCache, weights: Weights, build: Callable[[], nn.Module], device: str
) -> None:
    plain = build()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    put(cache, saved(plain))
    made = weights.module(build, device)
    for mine, theirs in (
        (dict(made.named_parameters(remove_duplicate=False)), dict(plain.named_parameters(remove_duplicate=False))),
        (dict(made.named_buffers(remove_duplicate=False)), dict(plain.named_buffers(remove_duplicate=False))),
    ):
        assert mine.keys() == theirs.keys()
        assert {name: (one.dtype, one.device, one.tolist()) for name, one in mine.items()} == {
            name: (one.dtype, one.device, one.tolist()) for name, one in theirs.items()
        }
        assert shared(mine) == shared(theirs)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    x = torch.linspace(0, 1, 16).view(4, 4)
    torch.testing.assert_close(made.eval()(x), plain.eval()(x))  # a view may begin where another kernel is chosen, which rounds otherwise


def test_a_buffer_that_the_weights_lack_is_the_constructors_although_it_would_be_saved(cache: NodeCache, weights: Weights) -> None:
    put(cache, {"scale": torch.zeros(2), "inv_freq": torch.full((2,), 7.0)})
    made = weights.module(lambda: Rotary(persistent=True), "cpu")
    assert made.inv_freq.tolist() == [7, 7]
    assert made.angles.tolist() == Rotary().angles.tolist()


def test_a_buffer_that_is_not_saved_is_the_constructors_although_the_weights_have_one(cache: NodeCache, weights: Weights) -> None:
    put(cache, {"scale": torch.zeros(2), "inv_freq": torch.full((2,), 7.0)})  # as older versions of many classes did
    assert weights.module(Rotary, "cpu").inv_freq.tolist() == Rotary().inv_freq.tolist()


class Lost(nn.Module):
    found: Tensor

    def __init__(self, how: str, persistent: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        found = torch.zeros(3)
        with torch.no_grad():
            match how:
                case "a parameter's":
                    found = self.weight.detach()
                case "a copy":
                    found = torch.clone(self.weight)
                case "mixed":
                    found = torch.ones(3) - self.weight
                case "in a list":
                    found = torch.stack([found, self.weight])[1]
                case "written":
                    found.copy_(self.weight)
                case "written and copied":
                    found += self.weight
                    found = found.clone()
                case "written to a view":
                    found[:2] = self.weight[:2]
                case "as data":
                    found.data = self.weight.data
                case "by out=":
                    torch.add(self.weight, 1, out=found)
                case "meta":
                    found = torch.zeros(3, device="meta")
        self.register_buffer("found", found, persistent=persistent)


LOST = ["a parameter's", "a copy", "mixed", "in a list", "written", "written and copied", "written to a view", "as data", "by out=", "meta"]


@pytest.mark.parametrize("how", LOST)
def test_a_buffer_made_of_a_parameters_values_is_an_error_unless_the_weights_have_it(cache: NodeCache, weights: Weights, how: str) -> None:
    put(cache, {"weight": torch.ones(3), "found": torch.full((3,), 5.0)})
    assert weights.module(lambda: Lost(how, persistent=True), "cpu").found.tolist() == [5, 5, 5]
    with pytest.raises(WeightsError, match="buffer 'found' is not in the weights, and cannot be computed before they are there"):
        weights.module(lambda: Lost(how, persistent=False), "cpu")


def test_values_of_parameters_cannot_be_read(cache: NodeCache, weights: Weights) -> None:
    put(cache, {"weight": torch.ones(3)})
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        weights.module(lambda: nn.Linear(3, 3, bias=bool(nn.Parameter(torch.ones(1)).item())), "cpu")


def test_buffers_go_to_where_their_module_is() -> None:
    made = assemble(Tied, saved(Tied()).items(), lambda name: torch.device("meta" if name.startswith("third") else "cpu"))
    assert made.third.inv_freq.is_meta
    made = assemble(Tied, saved(Tied()).items(), lambda _: torch.device("meta"))
    assert all(buffer.is_meta for buffer in made.buffers())
    assert made.second.inv_freq is made.first.inv_freq


def test_names_of_the_weights_can_be_other_than_the_modules(cache: NodeCache, weights: Weights) -> None:
    put(cache, {"wte.weight": torch.ones(4, 4), "h.attn.bias": torch.zeros(9)})  # as GPT-2's are

    def build() -> nn.Module:
        return nn.ModuleDict({"transformer": nn.ModuleDict({"wte": nn.Embedding(4, 4)})})

    made = weights.module(build, "cpu", rename=lambda name: None if name.endswith(".attn.bias") else f"transformer.{name}")
    assert [(name, one.sum().item()) for name, one in made.named_parameters()] == [("transformer.wte.weight", 16)]
    with pytest.raises(WeightsError, match=r"they lack 'transformer\.wte\.weight', and the module lacks 'h\.attn\.bias', 'wte\.weight'"):
        weights.module(build, "cpu")


def test_a_default_device_does_not_reach_the_buffers(cache: NodeCache, weights: Weights) -> None:
    put(cache, saved(Rotary()))
    with torch.device("meta"):
        made = weights.module(Rotary, "cpu")
    assert made.angles.tolist() == Rotary().angles.tolist()


def test_parameters_elsewhere_are_what_they_always_are_while_a_module_is_built_and_after_one_failed(
    cache: NodeCache, weights: Weights
) -> None:
    put(cache, saved(Rotary()))
    theirs = vars(nn.Parameter)["__new__"]
    entered, may_go = threading.Event(), threading.Event()

    def build(fails: bool) -> Rotary:
        entered.set()
        may_go.wait(10)
        if fails:
            raise ZeroDivisionError
        return Rotary()

    building = [later(lambda fails=fails: weights.module(lambda: build(fails), "cpu")) for fails in (True, False)]  # type: ignore[misc]
    assert entered.wait(10)
    assert nn.Linear(2, 2).weight.isfinite().all()
    may_go.set()
    with pytest.raises(ZeroDivisionError):
        building[0].result(10)
    assert building[1].result(10).scale.tolist() == [1, 1]
    assert vars(nn.Parameter)["__new__"] is theirs
    assert nn.Parameter(torch.ones(2)).tolist() == [1, 1]


def test_many_wrong_shapes_are_told_in_some_hundred_signs() -> None:
    names = [f"{'long' * 100}{number}" for number in range(100)]

    def build() -> nn.Module:
        return nn.ParameterDict({name: torch.ones(2) for name in names})

    with pytest.raises(WeightsError, match=r"size mismatch for long(?s:.*)and 9. more") as caught:
        assemble(build, [(name, torch.ones(3)) for name in names], lambda _: torch.device("cpu"))
    assert len(str(caught.value)) < 1500
    with pytest.raises(WeightsError, match=r"they lack 'long.* and 95 more, and the module lacks 'xlong") as caught:
        assemble(build, [(f"x{name}", torch.ones(2)) for name in names], lambda _: torch.device("cpu"))
    assert len(str(caught.value)) < 1500


class Large(nn.Module):
    """Two times 1.1 GB, and 4 MB in a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1 << 14, 1 << 14)
        self.linear = nn.Linear(1 << 14, 1 << 14)
        nn.init.orthogonal_(self.linear.weight)
        self.register_buffer("mask", torch.ones(1 << 10, 1 << 10).tril(), persistent=False)


def test_parameters_take_neither_memory_nor_time_before_they_have_values() -> None:
    weights = {"embed.weight": torch.zeros(1), "linear.weight": torch.zeros(1), "linear.bias": torch.zeros(1)}
    state = {name: tensor.expand((1 << 14, 1 << 14) if name.endswith("t") else 1 << 14) for name, tensor in weights.items()}
    Rotary()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    made = assemble(Large, state.items(), lambda _: torch.device("cpu"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.process_time() - began < 5
    assert made.mask.sum() == (1 << 10) * ((1 << 10) + 1) / 2


BUILT = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 3, padding_idx=0)
        self.layer = torch.nn.Linear(3, 3)
        torch.nn.init.normal_(self.layer.weight, std=0.02)
        self.register_buffer("angles", torch.arange(3, device=self.layer.weight.device), persistent=False)

state = {"embed.weight": torch.ones(9, 3), "layer.weight": torch.eye(3), "layer.bias": torch.zeros(3)}
made = assemble(Net, state.items(), lambda _: torch.device("cpu"))
print((made.layer(made.embed.weight[0]) * made.angles).tolist())
"""


def output_of(code: str) -> list[str]:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_it_works_with_a_lean_torch() -> None:
    head = "from function import lean_torch\nlean_torch.install()\nimport torch\nassert lean_torch.is_lean()"
    assert output_of(f"{head}\nfrom weights_cache.restore.module import assemble\n{BUILT}") == ["[0.0, 1.0, 2.0]"]


def test_building_has_torch_import_next_to_nothing() -> None:
    # Initialising on `meta` would bring in decompositions and with them sympy, some 800 modules.
    head = "import sys, torch\nfrom weights_cache.restore.module import assemble\nbefore = len(sys.modules)"
    _, count = output_of(f"{head}\n{BUILT}\nprint(len(sys.modules) - before)")
    assert int(count) < 50
