"""torch.fx, feature extraction by torchvision and timm, torch.jit.script: the PyTorch twin as timm's VOLO.

`models/test_symbolic_tracing.py` runs it without the shape checks of the other tests, which torch.fx cannot trace.
"""

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import outlook_torch
from benchmarks.torchvision_stub import declare_missing_torchvision_operators

declare_missing_torchvision_operators()  # before timm

from outlook_common.config import VOLOConfig  # noqa: E402
from outlook_common.weights import table_for  # noqa: E402
from parity_tests.support.runners import relative_error  # noqa: E402
from parity_tests.support.volo import draw_images, draw_weights, small_config, timm_volo, torch_volo  # noqa: E402

from timm.layers import create_feature_extractor as timm_feature_extractor  # noqa: E402, isort: skip
from torchvision.models.feature_extraction import (  # noqa: E402, isort: skip
    create_feature_extractor,
    get_graph_node_names,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # About torch.fx's own class.
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations"),
]

LAYERS: tuple[dict[str, Any], ...] = (
    {},
    {"stride": 2},
    {"stride": (3, 1), "kernel_size": (5, 3), "padding": (2, 1), "num_heads": 2, "qkv_bias": True},
)
MODELS: tuple[dict[str, Any], ...] = (
    {},
    {"global_pool": "avg", "post_layers": None, "use_aux_head": False, "use_mix_token": False},
    {"global_pool": "", "num_classes": 0, "use_mix_token": False},
    {"in_chans": 1, "qkv_bias": True, "out_stride": 1, "img_size": (32, 48)},
)


def layer(**arguments: Any) -> outlook_torch.OutlookAttention:
    torch.manual_seed(0)
    return outlook_torch.OutlookAttention(**{"dim": 12, "num_heads": 3, "dtype": torch.float64, **arguments}).eval()


def config_of(**overrides: Any) -> VOLOConfig:
    return small_config(**{"layers": (1, 2)} | overrides)  # scripts are compiled block by block


def model(**overrides: Any) -> outlook_torch.VOLO:
    config = config_of(**overrides)
    return torch_volo(config, draw_weights(config, 1)).eval()


def images(of: outlook_torch.VOLO, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    return torch.from_numpy(draw_images(of.config, batch, seed=batch, size=size))


def maps(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal((*shape, 12)))


def saved_script(of: nn.Module) -> Any:
    """Return what is left of a script after it was saved."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(of), file)
    file.seek(0)
    return torch.jit.load(file)


TRACES: dict[str, Callable[[nn.Module], Any]] = {
    "fx": fx.symbolic_trace,
    "script": saved_script,
    "frozen-script": lambda of: torch.jit.freeze(torch.jit.script(of)),
    "script-in-a-module": lambda of: torch.jit.script(nn.Sequential(copy.deepcopy(of))),
    "script-of-fx": lambda of: torch.jit.script(fx.symbolic_trace(of)),
}
traces = pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)


@cache
def model_and_trace(trace: Any, **overrides: Any) -> tuple[outlook_torch.VOLO, Any]:
    """Return a model in evaluation mode and its trace, which tests share: they are only called."""
    eager = model(**overrides)
    return eager, trace(eager)


def assert_same(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert relative_error(a.detach().double().numpy(), b.detach().double().numpy()) <= bound


@traces
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_a_traced_layer_equals_the_layer_on_maps_of_any_size(arguments: dict[str, Any], trace: Any) -> None:
    eager = layer(**arguments)
    traced = trace(eager)
    for shape in ((2, 7, 9), (1, 8, 8), (3, 13, 10), (1, 1, 1)):
        assert_same(traced(maps(*shape)), eager(maps(*shape)))


@traces
@pytest.mark.parametrize("overrides", MODELS, ids=str)
def test_a_traced_model_equals_the_model_with_any_batch(overrides: dict[str, Any], trace: Any) -> None:
    eager, traced = model_and_trace(trace, **overrides)
    for batch in (1, 3):
        assert_same(traced(images(eager, batch)), eager(images(eager, batch)))


@traces
def test_a_traced_model_takes_images_of_any_size(trace: Any) -> None:
    eager, traced = model_and_trace(trace, dynamic_img_size=True)
    for size in ((32, 32), (48, 40), (64, 96)):
        assert_same(traced(images(eager, size=size)), eager(images(eager, size=size)), 1e-11)


@traces
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_traced_model_refuses_images_that_do_not_fit(dynamic: bool, trace: Any) -> None:
    _, traced = model_and_trace(trace, **({"dynamic_img_size": True} if dynamic else {}))
    expected = "multiples of 8" if dynamic else "32, 32"
    # One row and column of tokens would be broadcast.
    for shape in ((2, 3, 36, 32), (2, 1, 32, 32), (2, 3, 8, 8)[: 3 + (not dynamic)]):
        with pytest.raises(Exception, match=rf"images must have shape \(B, 3, {expected}\), got .*{shape[-1]}\]"):
            traced(torch.zeros(shape, dtype=torch.float64))


@traces
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_traced_layer_sums_in_float32(dtype: torch.dtype, trace: Any) -> None:
    eager = layer(stride=2, implementation="reference", dtype=dtype)
    x = maps(2, 9, 7).to(dtype)
    assert torch.equal(trace(eager)(x), eager(x))


@pytest.mark.parametrize("trace", [fx.symbolic_trace, torch.jit.script])
def test_gradients_of_a_traced_model_are_those_of_the_model(trace: Any) -> None:
    eager = model().train()
    traced, x = trace(eager), images(eager)
    parameters = dict(eager.named_parameters())
    assert parameters.keys() == dict(traced.named_parameters()).keys()
    ours = torch.autograd.grad(traced(x).square().mean(), parameters.values())
    theirs = torch.autograd.grad(eager(x).square().mean(), parameters.values())
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-10)


def test_weights_of_a_traced_model_load_under_the_released_names() -> None:
    config = config_of()
    for traced in (fx.symbolic_trace(model()), torch.jit.script(model())):
        assert traced.state_dict().keys() == {entry.torch for entry in table_for(config).entries}
        weights = {name: torch.from_numpy(array) for name, array in draw_weights(config, 2).items()}
        traced.load_state_dict(weights)
        eager = torch_volo(config, draw_weights(config, 2)).eval()
        assert_same(traced(images(eager)), eager(images(eager)))


RATES = {"attn_drop_rate": 0.4, "drop_path_rate": 0.6, "drop_rate": 0.3, "pos_drop_rate": 0.3}


@pytest.mark.parametrize("rate", RATES)
def test_a_script_follows_train_and_eval(rate: str) -> None:
    eager = model(**{rate: RATES[rate]}).train()
    for scripted in (torch.jit.script(eager), torch.jit.script(eager.eval())):
        x = images(eager)
        assert_same(scripted.eval()(x), eager.eval()(x))
        scripted.train()
        assert not torch.equal(scripted(x), scripted(x))


@traces
def test_a_traced_layer_drops_as_often_as_the_layer(trace: Any) -> None:
    if trace is TRACES["frozen-script"]:
        pytest.skip("not run: a frozen script is in evaluation mode for ever")
    eager = layer(attn_drop=0.4, proj_drop=0.0).train()
    traced, x = trace(eager), maps(1, 5, 6)
    torch.manual_seed(0)
    with torch.no_grad():
        outputs, reference = (of(x.expand(800, -1, -1, -1)) for of in (traced, eager))
    assert_same(outputs.mean(0), eager.eval()(x)[0], 0.15)
    assert abs(float(outputs.std(0).mean() / reference.std(0).mean()) - 1) < 0.05


@pytest.mark.parametrize("extract", [create_feature_extractor, timm_feature_extractor])
def test_features_by_name_are_those_of_timms_model(extract: Callable[..., nn.Module]) -> None:
    config = config_of()
    weights = draw_weights(config, 1)
    ours, theirs = torch_volo(config, weights).eval(), timm_volo(config, weights).eval()
    nodes = [info["module"] for info in ours.feature_info] + ["network.0.0.attn.v", "head"]
    x = images(ours)
    found, expected = (extract(of, return_nodes=nodes)(x) for of in (ours, theirs))
    assert found.keys() == expected.keys() == set(nodes)
    for name in nodes:
        assert_same(found[name], expected[name])


def test_the_graph_has_nodes_for_the_layers_of_timms_graph() -> None:
    config = config_of()
    weights = draw_weights(config, 1)
    of_timm = fx.symbolic_trace(timm_volo(config, weights).eval()).graph
    layers = {node.target for node in of_timm.nodes if node.op == "call_module" and "drop" not in str(node.target)}
    # Without parameters: the activations are functions here, and so is the pooling of the maps.
    layers = {name for name in layers if not str(name).endswith((".act", ".pool", ".unfold", "mlp.norm"))}
    train, evaluation = get_graph_node_names(torch_volo(config, weights))
    assert layers <= set(train)
    assert layers <= set(evaluation)
    assert "token_labels" not in fx.symbolic_trace(model()).code


def test_features_of_a_module_around_the_model_trace() -> None:
    class Features(nn.Module):
        def __init__(self, method: str) -> None:
            super().__init__()
            self.backbone, self.method = model(), method

        def forward(self, x: Tensor) -> Any:
            return getattr(self.backbone, self.method)(x)

    for method in ("forward_features", "forward_intermediates"):
        eager = Features(method).eval()
        traced, x = fx.symbolic_trace(eager), images(eager.backbone)
        flat: Callable[[Any], Iterator[Tensor]] = lambda out: iter(torch.utils._pytree.tree_leaves(out))  # noqa: E731
        for a, b in zip(flat(traced(x)), flat(eager(x)), strict=True):
            assert_same(a, b)


def test_features_only_of_a_registered_model_traces() -> None:
    import timm

    importlib.import_module("outlook_torch.timm")
    sizes = {"layers": (1, 1, 1, 1), "embed_dims": (12, 24, 24, 24), "num_heads": (2, 4, 3, 2), "img_size": 64}
    by_graph, by_model = (
        timm.create_model("outlook_volo_d1_224", features_only=True, out_indices=(0, 2), feature_cls=kind, **sizes)
        for kind in ("fx", "getter")
    )
    by_model.model.load_state_dict(
        {name: by_graph.state_dict()[f"graph_module.{name}"] for name in by_model.model.state_dict()}
    )
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(by_graph.eval()(x), by_model.eval()(x), strict=True):
        assert_same(a.permute(0, 3, 1, 2), b, 1e-5)


def test_a_function_of_the_op_traces() -> None:
    def attend(value: Tensor, logits: Tensor) -> Tensor:
        return outlook_torch.outlook_attention(value, logits, stride=2).relu()

    rng = np.random.default_rng(0)
    for H, W in ((7, 9), (4, 4)):
        value = torch.from_numpy(rng.standard_normal((2, H, W, 3, 4)))
        logits = torch.from_numpy(rng.standard_normal((2, -(-H // 2), -(-W // 2), 3, 9, 9)))
        assert_same(fx.symbolic_trace(attend)(value, logits), attend(value, logits))


@pytest.mark.parametrize("option", ["token_labels", "mix_box"])
def test_options_that_tracing_fixes_are_no_inputs_of_a_traced_model(option: str) -> None:
    for trace, error in (("fx", option), ("script", "at most 2 argument")):
        eager, traced = model_and_trace(TRACES[trace])
        with pytest.raises((TypeError, RuntimeError), match=error):
            traced(images(eager), **{option: True})


def test_masks_are_no_inputs_of_a_traced_layer() -> None:
    traced = fx.symbolic_trace(layer())
    with pytest.raises(TypeError, match="dropout_mask"):
        traced(maps(1, 4, 4), dropout_mask=torch.ones(1, 4, 4, 3, 9, 9, dtype=torch.float64))


def test_a_mask_that_a_module_passes_on_is_traced() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x, dropout_mask=mask, proj_dropout_mask=x.sign())

    eager, x = Masked(), maps(2, 4, 5)
    mask = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 5, 3, 9, 9)))
    assert_same(fx.symbolic_trace(eager)(x, mask), eager(x, mask))
    assert_same(torch.jit.script(fx.symbolic_trace(eager))(x, mask), eager(x, mask))


@pytest.mark.parametrize("implementation", ["composite", "triton"])
def test_an_implementation_that_cannot_be_traced_says_so(implementation: str) -> None:
    for trace in (fx.symbolic_trace, torch.jit.script):
        with pytest.raises(NotImplementedError, match=f"'{implementation}' cannot run here: .* the reference"):
            trace(layer(implementation=implementation))


def test_models_that_were_changed_trace() -> None:
    recomputed, folded = model(), outlook_torch.fold_batch_norm(model())
    recomputed.set_grad_checkpointing()
    for eager in (recomputed, folded):
        for traced in (fx.symbolic_trace(eager), torch.jit.script(eager)):
            assert_same(traced(images(eager)), eager(images(eager)))


def test_an_accelerated_model_of_timm_traces_as_it_was() -> None:
    config = config_of()
    theirs = timm_volo(config, draw_weights(config, 1)).eval()
    x = torch.from_numpy(draw_images(config))
    expected = theirs(x)
    accelerated = outlook_torch.accelerate(theirs)
    assert_same(fx.symbolic_trace(accelerated)(x), expected)
    assert_same(torch.jit.script(copy.deepcopy(accelerated))(x), expected)


def test_scripting_keeps_the_model_itself() -> None:
    eager = model()
    before = [(name, type(module)) for name, module in eager.named_modules()]
    torch.jit.script(eager)
    assert type(eager) is outlook_torch.VOLO
    assert [(name, type(module)) for name, module in eager.named_modules()] == before


def copies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(of: nn.Module) -> Any:
        file = io.BytesIO()
        torch.save(of, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda of: pickle.loads(pickle.dumps(of)), "torch.save": saved}


@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_copies_of_models_and_graphs_are_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    eager = model()
    for source in (eager, fx.symbolic_trace(eager)):
        other, x = copied(source), images(eager)
        assert torch.equal(other(x), source(x))
        with torch.no_grad():
            other.get_parameter("network.0.0.attn.v.weight").add_(1)
        assert not torch.equal(other(x), source(x))


def test_functional_call_takes_other_weights() -> None:
    eager, weights = model(), draw_weights(config_of(), 5)
    other = torch_volo(config_of(), weights).eval()
    x = images(eager)
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    for of in (eager, fx.symbolic_trace(eager)):
        assert_same(torch.func.functional_call(of, state, (x,)), other(x))
    assert not torch.equal(eager(x), other(x))


def test_a_jit_trace_equals_the_model() -> None:
    eager = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(eager, images(eager, 2))
    assert_same(traced(images(eager, 3)), eager(images(eager, 3)))
