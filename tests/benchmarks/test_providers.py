"""Providers: each proves its formula before it may be timed, and a wrong one is found."""

import contextlib
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import methods, providers
from benchmarks.methods import HiRALinear, LoRALinear
from benchmarks.providers import COMPILED, GRAPH, PROVIDERS, admit, named, passes, prove
from hut_kernels import planner

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = [
    name
    for name, provider in PROVIDERS.items()
    if provider.run not in (COMPILED, GRAPH) and not provider.force
]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _peft():
    pytest.importorskip("peft")


class TestProofs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", HERE)
    def test_each_computes_its_formula(self, name, dtype):
        if PROVIDERS[name].missing(CPU, dtype):
            pytest.skip(PROVIDERS[name].missing(CPU, dtype))
        prove(PROVIDERS[name], dtype, CPU)

    @pytest.mark.gpu
    @GPU
    @pytest.mark.parametrize("name", PROVIDERS)
    def test_each_computes_its_formula_on_the_device(self, name):
        if PROVIDERS[name].missing(CUDA, torch.bfloat16):
            pytest.skip(PROVIDERS[name].missing(CUDA, torch.bfloat16))
        prove(PROVIDERS[name], torch.bfloat16, CUDA)

    @pytest.mark.slow
    def test_a_compiled_one_does_too(self):
        prove(PROVIDERS["hut_low_rank_eager_compiled"], torch.float32, CPU)

    def test_the_formula_of_lycoris_holds(self):
        """On a CPU it takes its slow path, which `missing` keeps out of the tables."""
        pytest.importorskip("lycoris")
        prove(PROVIDERS["lycoris_loha"], torch.float32, CPU)

    def test_a_wrong_output_is_found(self):
        class Doubled(LoRALinear):
            def forward(self, x):
                return 2 * super().forward(x)

        wrong = replace(PROVIDERS["lora"], adapt=providers._own(Doubled))
        with pytest.raises(ArithmeticError, match="LoRA, lean: y"):
            prove(wrong, torch.float32, CPU)

    def test_a_gradient_that_is_missing_is_found(self):
        class Dead(LoRALinear):
            def forward(self, x):
                weight = self.weight + self.lora_B.detach() @ self.lora_A
                return nn.functional.linear(x, weight, self.bias)

        dead = replace(PROVIDERS["lora"], adapt=providers._own(Dead))
        with pytest.raises(ArithmeticError, match="d lora_B"):
            prove(dead, torch.float32, CPU)

    def test_a_step_is_proved_by_a_few_rows_and_the_gradient_is_as_before(self):
        provider = PROVIDERS["hut_low_rank"]
        layer = provider.make(nn.Linear(6, 5), 2)
        nn.init.normal_(layer.hut_B)
        x, g = torch.randn(40, 6, requires_grad=True), torch.randn(40, 5)
        before = g.clone()
        step = passes(provider, layer, x, g)["step"]
        assert providers.prove_step(provider, layer, step, x, g, rows=3) < 2e-6
        assert torch.equal(g, before)
        wrong = replace(provider, formula=methods.frozen_formula)
        with pytest.raises(ArithmeticError, match="off its formula"):
            providers.prove_step(wrong, layer, step, x, g, rows=3)
        assert torch.equal(g, before)

    def test_wrong_or_unavailable_providers_are_left_out_with_a_reason(self, monkeypatch):
        def broken(model, targets, r):
            raise RuntimeError("no adapter today\nand a second line")

        wrong = replace(PROVIDERS["lora"], formula=methods.frozen_formula)
        monkeypatch.setitem(PROVIDERS, "hira", replace(PROVIDERS["hira"], adapt=broken))
        monkeypatch.setitem(PROVIDERS, "peft_lora", wrong)
        names = ["lora", "hira", "peft_lora", "lora_graph"]
        found = admit(names, torch.float32, CPU)
        assert list(found.errors) == ["lora"]
        assert found.wrong == ["peft_lora"]
        assert found.left_out["hira"] == "RuntimeError: no adapter today"
        assert "off its formula" in found.left_out["peft_lora"]
        assert found.left_out["lora_graph"] == "CUDA graphs need a CUDA device"


class TestProviders:
    def test_reasons(self, monkeypatch):
        missing = PROVIDERS["peft_lora_cast"].missing
        assert missing(CPU, torch.bfloat16) is None
        assert "float32" in missing(CPU, torch.float32)
        assert "Triton" in PROVIDERS["hut_low_rank_fused"].missing(CPU, torch.float32)
        monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
        assert "peft is not installed" in PROVIDERS["peft_hira"].missing(CPU, torch.float32)
        assert "lycoris is not" in PROVIDERS["lycoris_loha"].missing(CUDA, torch.float32)
        assert PROVIDERS["hut_low_rank"].missing(CPU, torch.float32) is None

    def test_patterns_name_providers_in_order(self):
        assert named(["peft_l*a", "frozen"]) == ["frozen", "peft_lora", "peft_loha"]
        with pytest.raises(ValueError, match="no provider matches 'nothing'"):
            named(["frozen", "nothing"])

    def test_all_layers_share_one_weight(self):
        linear = nn.Linear(8, 6)
        for name in HERE:
            if PROVIDERS[name].missing(CPU, torch.float32):
                continue
            layer = PROVIDERS[name].make(linear, 2)
            pointers = {parameter.data_ptr() for parameter in layer.parameters()}
            shared = name != "full"  # which trains a copy
            assert (linear.weight.data_ptr() in pointers) == shared, name
            assert not linear.weight.requires_grad

    def test_full_fine_tuning_trains_everything(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).requires_grad_(False)
        trained = PROVIDERS["full"].adapt(model, "0", 2)
        assert all(p.requires_grad for p in trained.parameters())
        assert not any(p.requires_grad for p in model.parameters())

    def test_the_doors_of_the_integration_run_the_fused_layer(self):
        """By the operator: the forward of a layer is one call of hut::linear_forward."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func.name())
                return func(*args, **(kwargs or {}))

        for name in ("peft_hira_accelerated", "hut_low_rank_config", "peft_hira"):
            layer, names = PROVIDERS[name].make(nn.Linear(8, 6), 2), []
            with Seen():
                layer(torch.randn(3, 8))
            fused = any(op.startswith("hut::") for op in names)
            assert fused == (name != "peft_hira"), name

    def test_adapters_have_the_type_that_is_said(self):
        for name in HERE:
            if PROVIDERS[name].missing(CPU, torch.bfloat16):
                continue
            layer = PROVIDERS[name].make(nn.Linear(8, 6, dtype=torch.bfloat16), 2)
            types = {p.dtype for p in layer.parameters() if p.requires_grad}
            assert types <= {PROVIDERS[name].adapter_dtype(torch.bfloat16)}, name

    def test_forced_strategies_hold_in_every_pass(self, monkeypatch):
        seen = []
        provider = PROVIDERS["hut_low_rank_staged"]
        monkeypatch.setattr(
            nn.Linear, "forward", lambda self, x: (seen.append(dict(planner._forced)), x)[1]
        )
        x = torch.ones(2, 3, requires_grad=True)
        for case in passes(provider, nn.Linear(3, 3), x, torch.ones(2, 3)).values():
            case.prepare()
            case.run()
        assert seen == [dict(provider.force)] * 3
        assert not planner._forced

    def test_a_graph_is_captured_without_old_gradients(self, monkeypatch):
        """With stand-ins for CUDA's: what is captured, in which state, and what a replay gives."""
        captured = []

        class Graph:
            def replay(self):
                captured.append("replay")

        class Capture:
            def __init__(self, graph):
                pass

            def __enter__(self):
                captured.append((x.grad, layer.weight.grad))

            def __exit__(self, *error):
                pass

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": Capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        layer, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
        nodes = []

        def mark(*_):
            """A hook lives as long as the node that adds up x's gradient."""

            def hook(*_):
                pass

            x.view_as(x).grad_fn.next_functions[0][0].register_hook(hook)
            nodes.append(weakref.ref(hook))

        layer.register_forward_hook(mark)
        cases = passes(PROVIDERS["lora_graph"], layer, x, torch.ones(2, 3))
        assert nodes
        assert not [node for node in nodes if node() is not None]
        assert all(case.replay for case in cases.values())
        assert list(cases) == ["forward", "step"]
        assert captured == [(None, None)] * 2
        gradient = x.grad
        cases["step"].prepare()
        torch.testing.assert_close(cases["step"].run(), layer(x))
        assert captured[-1] == "replay"
        assert x.grad is gradient  # the replay's own: not cleared


class TestLeanLayers:
    def test_a_merged_lora_layer_computes_the_same(self):
        layer = LoRALinear(nn.Linear(6, 5), 2)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(3, 6)
        torch.testing.assert_close(layer.to_linear()(x), layer(x))

    @pytest.mark.parametrize("kind", [LoRALinear, HiRALinear])
    def test_a_conv1d_is_computed_as_the_linear_layer_that_it_is(self, kind):
        from transformers.pytorch_utils import Conv1D

        conv = Conv1D(5, 6)
        linear = nn.Linear(6, 5)
        linear.weight, linear.bias = nn.Parameter(conv.weight.t()), conv.bias
        one, other = kind(conv, 2), kind(linear, 2)
        for layer in (one, other):
            torch.manual_seed(0)
            for p in layer.parameters():
                if p.requires_grad:
                    nn.init.normal_(p)
        x = torch.randn(2, 3, 6)
        torch.testing.assert_close(one(x), other(x))

    def test_lora_under_autocast_computes_in_its_type(self):
        layer = LoRALinear(nn.Linear(6, 5), 2)
        x = torch.randn(3, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert x.grad.dtype == layer.lora_B.grad.dtype == torch.float32

    def test_lora_omits_an_unneeded_gradient_of_x(self):
        layer = LoRALinear(nn.Linear(6, 5), 2)
        layer(torch.randn(3, 6)).sum().backward()
        assert layer.lora_B.grad is not None

    def test_a_sharing_copy_adapts_without_touching_the_original(self):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        copied = PROVIDERS["hut_low_rank"].adapt(methods.sharing_copy(base), r"\d", 2)
        assert type(base[0]) is nn.Linear
        assert copied[1].weight.data_ptr() == base[1].weight.data_ptr()
