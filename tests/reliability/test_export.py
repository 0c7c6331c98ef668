"""Exported programs: the same outputs, and no gradients instead of wrong ones."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hut_kernels import HUTLinear

from .models import WIDTH, assert_same_gradients, every_form, moved, twin

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Residual(nn.Module):
    """A residual model: a branch without gradients would still leave dx a finite value."""

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = (HUTLinear(WIDTH, WIDTH, 3, **options) for _ in range(2))

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def model(**options):
    return moved(Residual(**options))


def exported(module, strict=False):
    return torch.export.export(module, (torch.randn(5, WIDTH),), strict=strict)


def saved(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def graph(program):
    return program.module()


ROUTES = {
    "module": graph,
    "decomposed": lambda program: graph(program.run_decompositions()),
    "saved": lambda program: graph(saved(program)),
    "compiled": lambda program: torch.compile(graph(program), backend="aot_eager"),
    "exported again": lambda program: graph(exported(graph(program))),
}
every_export = pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])


@every_export
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_program_computes_the_same_and_refuses_its_backward(route, strict):
    torch.compiler.reset()
    layers = model()
    program = route(exported(layers, strict))
    x = torch.randn(5, WIDTH, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(program(x), layers(x))
    y = program(x)
    assert torch.equal(y, layers(x))
    with pytest.raises(RuntimeError, match=r"no gradients: .* fused=False"):
        torch.autograd.grad(y.square().sum(), x)


@every_form
def test_no_form_of_a_program_has_silent_gradients(form):
    program = graph(exported(model(**form)))
    with pytest.raises(RuntimeError, match=r"no gradients: .* fused=False"):
        program(torch.randn(5, WIDTH)).square().sum().backward()


@every_export
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_eager_layer_is_exported_with_its_gradients(strict, dropout):
    layers = model(fused=False, dropout=dropout, scale_shift=True)
    program, plain = graph(exported(layers, strict)), twin(layers)
    x = torch.randn(5, WIDTH)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for module, leaf in zip((program, plain), inputs, strict=True):
        torch.manual_seed(7)
        module(leaf).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert_same_gradients(program, plain)


@pytest.mark.slow
def test_a_packed_program_serves_what_the_layers_compute(tmp_path):
    """AOTInductor: compiled ahead of time, packed into a file, loaded and run."""
    layers = model(scale_shift=True)
    file = torch._inductor.aoti_compile_and_package(
        exported(layers), package_path=str(tmp_path / "layers.pt2")
    )
    program = torch._inductor.aoti_load_package(file)
    for x in torch.randn(2, 5, WIDTH):
        with torch.no_grad():
            torch.testing.assert_close(program(x), layers(x))
