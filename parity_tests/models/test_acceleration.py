"""timm's VOLO with this package's outlook attention inside."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.models import volo as timm_volo
from torch import nn

import outlook_torch
from outlook_torch import OutlookAttention, accelerate, restore

TINY = {
    "layers": (2, 1, 1, 1),
    "embed_dims": (24, 32, 32, 32),
    "num_heads": (3, 4, 4, 4),
    "stem_hidden_dim": 8,
    "img_size": 64,
    "num_classes": 10,
}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm_volo.VOLO(**TINY)  # type: ignore[arg-type]


def layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is kind]


def adapted(model: nn.Module) -> nn.Module:
    """Wrap the value projections, as adapters of low rank do."""
    for layer in layers(model, timm_volo.OutlookAttention):
        layer.v = nn.Sequential(layer.v)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_are_the_same_to_rounding_and_weights_are_shared(images: torch.Tensor) -> None:
    model = tiny().double().eval()
    names, parameters = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    before = model(images)
    gradients = torch.autograd.grad(before.sum(), list(model.parameters()), allow_unused=True)

    assert accelerate(model, implementation="composite") is model
    assert len(layers(model, OutlookAttention)) == 2
    assert not layers(model, timm_volo.OutlookAttention)
    assert list(model.state_dict()) == names
    assert [p.data_ptr() for p in model.parameters()] == parameters
    after = model(images)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(after.sum(), list(model.parameters()), allow_unused=True)
    for ours, expected in zip(theirs, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_restore_brings_back_the_layers_with_the_weights_as_they_are_now(images: torch.Tensor) -> None:
    model = tiny().double()
    originals = layers(model, timm_volo.OutlookAttention)
    accelerate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.eval()
    changed = model(images)
    assert restore(model) is model
    assert layers(model, timm_volo.OutlookAttention) == originals
    assert not any(layer.training for layer in originals)
    torch.testing.assert_close(model(images), changed, rtol=1e-12, atol=1e-12)


def test_restore_keeps_parts_that_were_put_in_and_the_mode_of_each(images: torch.Tensor) -> None:
    model = accelerate(tiny().double())
    layer = model.network[0][0].attn
    layer.v = nn.Linear(24, 24, bias=False, dtype=torch.float64)  # as what adapts or quantizes models does
    model.eval()
    layer.attn_drop.train()
    expected = model(images)
    restored = restore(model).network[0][0].attn
    assert restored.v is layer.v
    assert [name for name, module in restored.named_modules() if module.training] == ["attn_drop"]
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_a_copy_of_an_accelerated_model_has_its_own_weights(images: torch.Tensor) -> None:
    model = accelerate(tiny().double().eval())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(images).abs().max() > 0
    assert twin(images).abs().max() == 0
    assert restore(twin)(images).abs().max() == 0


def test_hooks_and_modes_stay() -> None:
    model = tiny()
    layer = layers(model, timm_volo.OutlookAttention)[0]
    called: list[type] = []
    layer.register_forward_hook(lambda module, args, out: called.append(type(module)))
    accelerate(model.eval())
    model(torch.randn(1, 3, 64, 64))
    assert called == [OutlookAttention]
    assert not any(layer.training for layer in layers(model, OutlookAttention))


@pytest.mark.parametrize(("first", "second"), [(nn.Module.eval, accelerate), (accelerate, restore)], ids=["in", "out"])
def test_hooks_of_the_backward_pass_and_of_state_dicts_go_on_being_called(
    first: Callable[[nn.Module], nn.Module], second: Callable[[nn.Module], nn.Module]
) -> None:
    model = first(tiny())
    layer = model.network[0][0].attn
    called: list[object] = []
    layer.register_full_backward_hook(lambda module, inputs, outputs: called.append(inputs[0].shape))
    layer.register_state_dict_pre_hook(lambda *arguments: called.append("save"))
    layer.register_load_state_dict_pre_hook(lambda *arguments: called.append("load"))
    for change in (lambda model: model, second):
        called.clear()
        change(model)(torch.randn(1, 3, 64, 64)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert called == [torch.Size([1, 8, 8, 24]), "save", "load"]


def test_a_layer_with_weights_of_its_own_besides_stays_as_it_is() -> None:
    class Scaled(timm_volo.OutlookAttention):
        def __init__(self) -> None:
            super().__init__(24, 3, stride=2)
            self.gain = nn.Parameter(torch.full((24,), 3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.gain

    Scaled.__name__ = "OutlookAttention"
    model = tiny()
    model.network[0][0].attn = scaled = Scaled()
    accelerate(model)
    assert model.network[0][0].attn is scaled
    assert isinstance(model.network[0][1].attn, OutlookAttention)


def test_a_layer_alone_is_replaced_and_restored() -> None:
    layer = timm_volo.OutlookAttention(12, 3, stride=2, qkv_bias=True, attn_drop=0.1, proj_drop=0.2).double().eval()
    ours = accelerate(layer)
    x = torch.randn(2, 7, 5, 12, dtype=torch.float64)
    assert isinstance(ours, OutlookAttention)
    assert (ours.config.attn_drop, ours.config.proj_drop) == (0.1, 0.2)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-12, atol=1e-12)
    assert accelerate(ours) is ours
    assert restore(ours) is layer


def test_a_second_time_nothing_changes() -> None:
    model = accelerate(tiny())
    before = layers(model, OutlookAttention)
    assert accelerate(model, implementation="reference") is model
    assert list(map(id, layers(model, OutlookAttention))) == list(map(id, before))
    assert {layer.implementation for layer in before} == {None}


@pytest.mark.parametrize(
    ("change", "make", "words"),
    [
        (
            accelerate,
            lambda: nn.Sequential(nn.Linear(2, 2)),
            "among its 1 modules \\(0 are of this package already, 0 ",
        ),
        (accelerate, lambda: adapted(tiny()), "2 of that name have other parts: adapt or quantize after accelerate"),
        (accelerate, lambda: outlook_torch.OutlookAttention(4), "this package already"),
        (restore, lambda: nn.Sequential(nn.Linear(2, 2)), "no layer that accelerate"),
    ],
    ids=["no-layer", "adapted-layers", "our-own-layer", "nothing-to-restore"],
)
def test_a_model_without_such_a_layer_is_an_error(
    change: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        change(make())
