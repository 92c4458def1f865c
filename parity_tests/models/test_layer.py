"""The layer: both twins against timm's, dropout, precision, and each framework's own ways of using it."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from timm.models.volo import OutlookAttention as TimmOutlookAttention

import outlook_jax
import outlook_jax.linen
import outlook_torch
from outlook_common.op_cases import CASES, Case
from outlook_parity.models.builtin import draw_weights
from parity_tests.support.runners import (
    Gradients,
    copy_weights,
    from_torch,
    jax_gradients,
    layer_pair,
    relative_error,
    torch_gradients,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

Array = np.ndarray


def assert_same(ours: tuple[Array, Gradients], theirs: tuple[Array, Gradients]) -> None:
    assert relative_error(ours[0], theirs[0]) <= 1e-12
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        if np.abs(gradient).max() == 0:  # a softmax over a single place is constant
            assert name.startswith("attn.")
            assert (ours[1][name] == 0).all()
        else:
            assert relative_error(ours[1][name], gradient) <= 1e-10, name


def assert_both_equal_timm(case: Case, *, qkv_bias: bool, seed: int) -> None:
    arguments = {"num_heads": case.N, **case.window, "qkv_bias": qkv_bias, "attn_drop": 0.0, "proj_drop": 0.0}
    torch_layer, jax_layer = layer_pair(case.dim, **arguments, seed=seed)
    timm_layer = TimmOutlookAttention(case.dim, **arguments, dtype=torch.float64)
    timm_layer.load_state_dict(torch_layer.state_dict(), strict=True)

    rng = np.random.default_rng(seed)
    x, cotangent = (rng.standard_normal((case.B, case.H, case.W, case.dim)) for _ in range(2))
    theirs = torch_gradients(timm_layer, x, cotangent)
    assert_same(torch_gradients(torch_layer, x, cotangent), theirs)
    assert_same(jax_gradients(jax_layer, x, cotangent), theirs)


# timm's layer takes square windows only.
@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.kernel_size, int)], ids=lambda case: case.name)
def test_both_twins_equal_timm_forward_and_backward(case: Case) -> None:
    assert_both_equal_timm(case, qkv_bias=case.name.startswith("volo"), seed=11)


@settings(max_examples=8)
@given(
    map_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    radius=st.integers(0, 2),
    stride=st.integers(1, 4),
    qkv_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_both_twins_equal_timm_on_any_config(
    map_size: tuple[int, int], heads: int, head_dim: int, radius: int, stride: int, qkv_bias: bool, seed: int
) -> None:
    case = Case("drawn", *map_size, heads, head_dim, 2 * radius + 1, stride, radius)
    assert_both_equal_timm(case, qkv_bias=qkv_bias, seed=seed)


def test_upstream_defaults() -> None:
    torch_layer, jax_layer = layer_pair(8)
    for config in (torch_layer.config, jax_layer.config):
        assert (config.num_heads, config.kernel_size, config.padding, config.stride) == (1, (3, 3), (1, 1), (1, 1))
        assert (config.qkv_bias, config.attn_drop, config.proj_drop) == (False, 0.1, 0.1)
        assert config.qk_scale == 8**-0.5
    assert torch_layer.v.bias is None
    assert jax_layer.v.bias is None


@pytest.mark.parametrize(("qk_scale", "in_force"), [(None, 4**-0.5), (0.0, 4**-0.5), (2.5, 2.5)])
def test_qk_scale_multiplies_the_logits(qk_scale: float | None, in_force: float) -> None:
    torch_layer, jax_layer = layer_pair(12, 3, qk_scale=qk_scale, attn_drop=0.0)
    default_torch, default_jax = layer_pair(12, 3, attn_drop=0.0)
    factor = in_force / 4**-0.5
    weights = draw_weights(default_torch.config)
    copy_weights(
        default_torch, default_jax, {n: w * factor if n.startswith("attn.") else w for n, w in weights.items()}
    )
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 12))
    assert (
        relative_error(from_torch(torch_layer(torch.from_numpy(x))), np.asarray(default_jax(jnp.asarray(x)))) <= 1e-12
    )
    assert relative_error(np.asarray(jax_layer(jnp.asarray(x))), np.asarray(default_jax(jnp.asarray(x)))) <= 1e-12


def test_the_pool_averages_only_the_pixels_inside() -> None:
    x = np.arange(1.0, 16.0).reshape(1, 3, 5, 1)
    expected = np.array([[4.0, 6.0, 7.5], [11.5, 13.5, 15.0]])[None, :, :, None]
    np.testing.assert_allclose(outlook_torch.attention.average_pool(torch.from_numpy(x), (2, 2)).numpy(), expected)
    np.testing.assert_allclose(outlook_jax.attention.average_pool(jnp.asarray(x), (2, 2)), expected)


class TestDropout:
    x = np.random.default_rng(0).standard_normal((1, 4, 3, 12))
    jax_x = jnp.asarray(x)

    def test_the_twins_agree_under_shared_masks_forward_and_backward(self) -> None:
        rng = np.random.default_rng(1)
        torch_layer, jax_layer = layer_pair(12, 3, stride=2)
        masks = {
            "dropout_mask": (rng.random((1, 2, 2, 3, 9, 9)) > 0.1) / 0.9,
            "proj_dropout_mask": (rng.random(self.x.shape) > 0.1) / 0.9,
        }
        cotangent = rng.standard_normal(self.x.shape)
        ours = torch_gradients(torch_layer, self.x, cotangent, **masks)
        assert_same(jax_gradients(jax_layer, self.x, cotangent, **masks), ours)
        assert relative_error(ours[0], from_torch(torch_layer.eval()(torch.from_numpy(self.x)))) > 0.01

    def test_evaluation_draws_nothing(self) -> None:
        torch_layer, jax_layer = layer_pair(12, 3, attn_drop=0.5)
        torch_layer.eval()
        jax_layer.eval()
        plain_torch, plain_jax = layer_pair(12, 3, attn_drop=0.0)
        assert torch.equal(torch_layer(torch.from_numpy(self.x)), plain_torch(torch.from_numpy(self.x)))
        assert jnp.array_equal(jax_layer(self.jax_x), plain_jax(self.jax_x))
        jax_layer.train()
        assert jnp.array_equal(jax_layer(self.jax_x, deterministic=True), plain_jax(self.jax_x))

    @pytest.mark.parametrize(("attn_drop", "proj_drop"), [(0.5, 0.0), (0.0, 0.5)])
    def test_training_draws_anew_and_keeps_the_mean(self, attn_drop: float, proj_drop: float) -> None:
        torch_layer, jax_layer = layer_pair(12, 3, attn_drop=attn_drop, proj_drop=proj_drop)
        torch.manual_seed(0)
        x = torch.from_numpy(self.x)
        torch_draws = torch.stack([torch_layer(x) for _ in range(200)]).detach().numpy()
        graph, state = nnx.split(jax_layer)
        keys = jax.random.split(jax.random.key(0), 200)

        @jax.jit
        @jax.vmap
        def draw(key: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(self.jax_x, rngs=nnx.Rngs(dropout=key))

        jax_draws = np.asarray(draw(keys))
        expected = from_torch(torch_layer.eval()(x))
        for draws in (torch_draws, jax_draws):
            assert (draws[0] != draws[1]).any()
            # The mean of 200 draws lies within a few standard errors of the output without dropout.
            standard_error = draws.std(axis=0) / np.sqrt(len(draws))
            assert (np.abs(draws.mean(axis=0) - expected) < 5.5 * standard_error + 1e-12).all()
            assert standard_error.mean() > 1e-4

    def test_the_torch_part_decides_by_its_own_mode_and_rate_as_they_are_now(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(1, 8, 8, 12)

        def draws(layer: outlook_torch.OutlookAttention) -> bool:
            return not torch.equal(layer(x), layer(x))

        layer = outlook_torch.OutlookAttention(12, 3, attn_drop=0.5, proj_drop=0.0).eval()
        layer.attn_drop.train()  # Monte Carlo dropout
        assert draws(layer)
        layer.attn_drop.p = 0.0
        assert not draws(layer)
        later = outlook_torch.OutlookAttention(12, 3, attn_drop=0.0).train()
        later.attn_drop.p = 0.5
        assert draws(later)
        later.attn_drop = torch.nn.Identity()
        assert not draws(later)

    def test_the_jax_part_decides_by_its_own_mode_and_rate_as_they_are_now(self) -> None:
        x = jnp.asarray(self.x)

        def draws(layer: outlook_jax.OutlookAttention) -> bool:
            return bool((layer(x) != layer(x)).any())

        layer = outlook_jax.OutlookAttention(12, 3, attn_drop=0.5, proj_drop=0.0, rngs=nnx.Rngs(0))
        layer.eval()
        layer.attn_drop.deterministic = False  # Monte Carlo dropout
        assert draws(layer)
        layer.attn_drop.rate = 0.0
        assert not draws(layer)
        later = outlook_jax.OutlookAttention(12, 3, attn_drop=0.0, rngs=nnx.Rngs(0))
        later.attn_drop.rate = 0.5
        assert draws(later)

    def test_the_torch_seed_repeats_a_draw(self) -> None:
        torch_layer, _ = layer_pair(12, 3)
        x = torch.from_numpy(self.x)
        torch.manual_seed(7)
        first = torch_layer(x)
        torch.manual_seed(7)
        assert torch.equal(first, torch_layer(x))

    def test_the_jax_layer_draws_from_its_own_stream_or_from_the_one_given(self) -> None:
        _, jax_layer = layer_pair(12, 3)
        assert not jnp.array_equal(jax_layer(self.jax_x), jax_layer(self.jax_x))
        given_stream = [jax_layer(self.jax_x, rngs=nnx.Rngs(dropout=3)) for _ in range(2)]
        assert jnp.array_equal(*given_stream)

    def test_a_rate_of_one_leaves_the_projection_bias(self) -> None:
        torch_layer, jax_layer = layer_pair(12, 3, attn_drop=1.0, proj_drop=0.0)
        bias = draw_weights(torch_layer.config)["proj.bias"]
        np.testing.assert_allclose(from_torch(torch_layer(torch.from_numpy(self.x)))[0, 0, 0], bias)
        np.testing.assert_allclose(np.asarray(jax_layer(self.jax_x))[0, 0, 0], bias)


class TestPrecision:
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 48))
    jax_x = jnp.asarray(x)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_the_twins_err_alike_when_everything_is_of_one_dtype(self, dtype: str) -> None:
        truth = np.asarray(layer_pair(48, 3, stride=2, attn_drop=0.0)[1](self.jax_x))
        torch_layer, jax_layer = layer_pair(48, 3, stride=2, attn_drop=0.0, dtype=dtype)
        torch_out = torch_layer(torch.from_numpy(self.x).to(getattr(torch, dtype)))
        jax_out = jax_layer(jnp.asarray(self.x).astype(dtype))
        assert torch_out.dtype == getattr(torch, dtype)
        assert jax_out.dtype == jnp.dtype(dtype)
        self.assert_err_alike(torch_out, jax_out, truth)

    def test_torch_autocast_errs_as_jax_computing_in_bfloat16(self) -> None:
        truth = np.asarray(layer_pair(48, 3, stride=2, attn_drop=0.0)[1](self.jax_x))
        torch_layer, _ = layer_pair(48, 3, stride=2, attn_drop=0.0, dtype="float32")
        jax_layer = outlook_jax.OutlookAttention(48, 3, stride=2, attn_drop=0.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        copy_weights(torch_layer, jax_layer, draw_weights(torch_layer.config))
        with torch.autocast("cpu", torch.bfloat16):
            torch_out = torch_layer(torch.from_numpy(self.x).float())
        jax_out = jax_layer(jnp.asarray(self.x, jnp.float32))
        assert torch_out.dtype == torch.bfloat16
        assert jax_out.dtype == jnp.bfloat16
        self.assert_err_alike(torch_out, jax_out, truth)

    def test_torch_autocast_trains_float32_parameters(self) -> None:
        torch_layer, _ = layer_pair(48, 3, stride=2, dtype="float32")
        with torch.autocast("cpu", torch.bfloat16):
            torch_layer(torch.from_numpy(self.x).float()).square().mean().backward()
        for name, parameter in torch_layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0

    @staticmethod
    def assert_err_alike(torch_out: torch.Tensor, jax_out: jax.Array, truth: Array) -> None:
        torch_error = np.sqrt(np.square(torch_out.detach().double().numpy() - truth).mean())
        jax_error = np.sqrt(np.square(np.asarray(jax_out, np.float64) - truth).mean())
        assert torch_error > 0
        assert 2 / 3 < jax_error / torch_error < 3 / 2


class TestJax:
    x = np.random.default_rng(0).standard_normal((3, 5, 6, 8))
    jax_x = jnp.asarray(x)

    def test_the_op_serves_a_plain_function_with_a_dict_of_parameters(self) -> None:
        """Under jit, vmap, grad, jvp and remat, as from any JAX library."""
        torch_layer, jax_layer = layer_pair(8, 2, attn_drop=0.0)
        parameters = nnx.to_pure_dict(nnx.state(jax_layer, nnx.Param))

        def layer(parameters: dict, x: jax.Array) -> jax.Array:
            """One image, (H, W, C)."""
            H, W, C = x.shape
            value = (x @ parameters["v"]["kernel"]).reshape(1, H, W, 2, C // 2)
            logits = x @ parameters["attn"]["kernel"] + parameters["attn"]["bias"]
            logits = logits.reshape(1, H, W, 2, 9, 9) * (C // 2) ** -0.5
            out = outlook_jax.outlook_attention(value, logits).reshape(H, W, C)
            return out @ parameters["proj"]["kernel"] + parameters["proj"]["bias"]

        def loss(parameters: dict, x: jax.Array) -> jax.Array:
            return jnp.square(jax.vmap(layer, (None, 0))(parameters, x)).sum()

        batched = jax.jit(jax.vmap(layer, (None, 0)))(parameters, jnp.asarray(self.x))
        out = from_torch(torch_layer(torch.from_numpy(self.x)))
        assert relative_error(np.asarray(batched), out) <= 1e-12

        _, theirs = torch_gradients(torch_layer, self.x, 2 * out)
        gradients = jax.jit(jax.grad(jax.checkpoint(loss)))(parameters, jnp.asarray(self.x))
        for name in ("v", "attn", "proj"):
            assert relative_error(np.asarray(gradients[name]["kernel"]).T, theirs[f"{name}.weight"]) <= 1e-10

        tangent = np.random.default_rng(1).standard_normal(self.x.shape)
        _, slope = jax.jvp(lambda x: loss(parameters, x), (self.x,), (tangent,))
        assert relative_error(np.asarray(slope)[None], np.sum(theirs["x"] * tangent)[None]) <= 1e-10

    def test_gradients_equal_finite_differences(self) -> None:
        _, jax_layer = layer_pair(4, 2, stride=2, attn_drop=0.0)
        check_grads(jax.jit(jax_layer), (self.jax_x[:1, :3, :4, :4],), order=2, modes=("fwd", "rev"))

    def test_nnx_jit_and_training_steps(self) -> None:
        _, jax_layer = layer_pair(8, 2)
        optimizer = nnx.Optimizer(jax_layer, optax.sgd(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(layer: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
            loss, grads = nnx.value_and_grad(lambda layer: jnp.square(layer(x) - x).mean())(layer)
            optimizer.update(layer, grads)
            return loss

        losses = [float(step(jax_layer, optimizer, jnp.asarray(self.x))) for _ in range(30)]
        assert np.mean(losses[-5:]) < 0.7 * losses[0]

    def test_linen_computes_the_same_with_the_same_parameter_paths(self) -> None:
        _, jax_layer = layer_pair(8, 2, stride=2, qkv_bias=True)
        linen = outlook_jax.linen.OutlookAttention(
            8, num_heads=2, stride=2, qkv_bias=True, param_dtype="float64", name="attention"
        )
        variables = jax.jit(linen.init)(jax.random.key(0), self.jax_x)
        parameters = nnx.to_pure_dict(nnx.state(jax_layer, nnx.Param))
        assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, parameters)
        evaluated = linen.apply({"params": parameters}, self.jax_x, deterministic=True)
        assert relative_error(np.asarray(evaluated), np.asarray(jax_layer(self.jax_x, deterministic=True))) <= 1e-12
        assert jnp.array_equal(linen.apply({"params": parameters}, self.jax_x), evaluated)
        draws = [
            linen.apply({"params": parameters}, self.jax_x, train=True, rngs={"dropout": jax.random.key(k)})
            for k in (2, 2, 3)
        ]
        assert jnp.array_equal(draws[0], draws[1])
        assert not jnp.array_equal(draws[0], draws[2])

    def test_linen_trains_inside_a_linen_model(self) -> None:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
                x = outlook_jax.linen.OutlookAttention(8, num_heads=2, name="mix")(x, deterministic=not train)
                return nn.Dense(3)(x.mean(axis=(1, 2)))

        x = jnp.asarray(self.x, jnp.float32)
        variables = jax.jit(lambda key: Model().init(key, x, train=True))(jax.random.key(0))

        @jax.jit
        def gradients(parameters: dict, key: jax.Array) -> dict:
            return jax.grad(
                lambda p: jnp.square(Model().apply({"params": p}, x, train=True, rngs={"dropout": key})).sum()
            )(parameters)

        grads = gradients(variables["params"], jax.random.key(2))
        assert set(grads["mix"]) == {"v", "attn", "proj"}
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


class TestTorch:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4, 4)))

    def test_gradients_equal_finite_differences(self) -> None:
        torch_layer, _ = layer_pair(4, 2, stride=2, attn_drop=0.0)
        x = self.x.clone().requires_grad_()
        assert torch.autograd.gradcheck(torch_layer, (x,))
        assert torch.autograd.gradgradcheck(torch_layer, (x,), fast_mode=True)

    def test_functional_transforms(self) -> None:
        torch_layer, _ = layer_pair(4, 2, attn_drop=0.0)
        x = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 2, 3, 4, 4)))
        out = torch.stack([torch_layer(one) for one in x])
        assert relative_error(from_torch(torch.vmap(torch_layer)(x)), from_torch(out)) <= 1e-12
        tangent = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 3, 4, 4)))
        _, slope = torch.func.jvp(lambda x: torch_layer(x).square().sum(), (x[0],), (tangent,))
        gradient = torch.func.grad(lambda x: torch_layer(x).square().sum())(x[0])
        assert relative_error(from_torch(slope)[None], from_torch((gradient * tangent).sum())[None]) <= 1e-10

    def test_state_dict_keys_are_those_of_timm(self) -> None:
        torch_layer, _ = layer_pair(8, 2)
        assert list(torch_layer.state_dict()) == list(TimmOutlookAttention(8, 2).state_dict())

    def test_deepcopy_and_pickle(self) -> None:
        torch_layer, _ = layer_pair(4, 2, attn_drop=0.0)
        for twin in (copy.deepcopy(torch_layer), pickle.loads(pickle.dumps(torch_layer))):
            assert torch.equal(twin(self.x), torch_layer(self.x))

    def test_a_meta_device_layer_holds_no_memory(self) -> None:
        layer = outlook_torch.OutlookAttention(512, 8, device="meta")
        assert all(p.is_meta for p in layer.parameters())
        assert layer(torch.empty(2, 28, 28, 512, device="meta")).shape == (2, 28, 28, 512)
