"""PyTorch's twin in two ranks: DistributedDataParallel and FSDP2 are each rank's part by one process, bit for bit."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common.config import volo_config
from outlook_common.weights import table_for
from outlook_jax.losses import TokenLabelCrossEntropy
from outlook_parity.models.builtin import draw_weights
from parity_tests.support.across_frameworks import BOX, CONFIG, batch
from parity_tests.support.subprocesses import run_in_processes
from parity_tests.support.torch_ranks import distance

pytestmark = pytest.mark.long(reason="trains in two ranks")

SIZES: dict[str, Any] = {"layers": (1, 1, 1, 1), "img_size": 32, "embed_dims": (16, 32, 32, 32), "num_heads": (4,) * 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Any:
    return run_in_processes("parity_tests.support.torch_ranks", 2, 2, None, folder)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_training_in_two_ranks_is_the_mean_of_both_parts_with_statistics_of_each(ranks: Any, engine: str) -> None:
    for found in ranks:
        assert found[engine].keys() == {"losses", "gradient", "weights", "statistics"}
        assert max(found[engine].values()) <= 1e-12, found[engine]
        assert found["statistics apart"] > 0.1  # of the ranks from each other


@pytest.mark.usefixtures("ranks", "quick_compilation")
def test_training_with_ghost_batches_in_jax_is_that_of_ranks_of_ddp(folder: Path) -> None:
    first, second = (dict(np.load(folder / f"ddp_{rank}.npz")) for rank in range(2))
    with jax.enable_x64(True):
        model = outlook_jax.VOLO(CONFIG, param_dtype=jnp.float64, ghost_batches=2, rngs=nnx.Rngs(0))
        outlook_jax.load_weights(model, draw_weights(CONFIG))
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3, eps=1e-3, weight_decay=1e-2), wrt=nnx.Param)
        losses, gradients = trained_in_jax(model, optimizer, *map(jnp.asarray, batch(0)))
    entries = table_for(CONFIG).names("flax")
    expected = {"losses": (first["losses"] + second["losses"]) / 2}
    expected |= {name: array for name, array in first.items() if name != "losses"}
    flat = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(gradients)}
    found = {f"gradient of {entries[path].torch}": entries[path].to_torch(np.asarray(x)) for path, x in flat.items()}
    found |= {"losses": np.array(losses), **outlook_jax.export_weights(model)}
    errors = distance(found, expected)
    assert errors.keys() == {"losses", "gradient", "weights", "statistics"}
    assert max(errors.values()) <= 1e-12, errors
    # The statistics of the other rank are others, and the gradients are of both.
    assert distance(second, first)["statistics"] > 0.1
    assert distance(second, first)["gradient"] == 0


def trained_in_jax(model: Any, optimizer: Any, images: jax.Array, targets: jax.Array) -> tuple[list[float], Any]:
    """Return the losses of two steps and the first gradients."""

    @nnx.jit
    def step(model: Any, optimizer: Any, images: jax.Array, targets: jax.Array) -> Any:
        def loss_of(model: Any) -> jax.Array:
            return TokenLabelCrossEntropy()(model.forward_train(images, BOX), targets)

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss, gradients

    (one, gradients), (other, _) = (step(model, optimizer, images, targets) for _ in range(2))
    return [float(one), float(other)], gradients


def test_forward_train_of_a_sharded_model_needs_no_wrapper(ranks: Any) -> None:
    assert [found["forward_train"] for found in ranks] == [0.0, 0.0]


def test_weights_and_moments_that_ranks_share_are_saved_and_loaded_where_they_were(ranks: Any) -> None:
    for found in ranks:
        files = found["files"]
        assert files["equal"]
        assert files["moments"]
        assert files["step"] == 1
        assert files["kept"]
        assert files["split along"] == "(Shard(dim=1),)"  # embed, as in JAX


def test_a_file_that_cannot_be_written_is_an_error_in_every_rank(ranks: Any) -> None:
    first, second = (found["files"]["refused"] for found in ranks)
    assert "there is no folder" in first
    assert second.startswith("rank 0 could not write the file: ")


def test_drawn_weights_do_not_depend_on_the_number_of_ranks(ranks: Any) -> None:
    assert all(found["drawn"]["alike"] for found in ranks)


@pytest.fixture
def model() -> outlook_torch.VOLO:
    torch.manual_seed(0)
    return outlook_torch.volo("volo_d1_224", **SIZES)


def test_init_weights_draws_what_a_new_model_has(model: outlook_torch.VOLO) -> None:
    empty = outlook_torch.VOLO(model.config, device="meta").to_empty(device="cpu")
    empty.init_weights()
    for (name, new), drawn in zip(model.state_dict().items(), empty.state_dict().values(), strict=True):
        if new.numel() == 1 or new.std() == 0:
            assert torch.equal(new, drawn), name
        else:
            assert not torch.equal(new, drawn), name
            if new.numel() > 200:
                torch.testing.assert_close(drawn.std(), new.std(), rtol=0.2, atol=0)


def test_the_plan_has_every_parameter_in_one_block_or_in_the_model_itself(model: outlook_torch.VOLO) -> None:
    plan = outlook_torch.fsdp_plan(model)
    assert list(plan)[:4] == ["patch_embed.conv", "patch_embed.proj", "network.0.0", "network.1.proj"]
    assert list(plan)[-1] == ""
    units = [{id(parameter) for parameter in module.parameters()} for path, module in plan.items() if path]
    assert sum(map(len, units)) == len(set().union(*units))
    left = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in set().union(*units)}
    assert left == {"pos_embed", "cls_token", "norm", "head", "aux_head"}


def test_the_model_itself_gives_what_forward_train_does(model: outlook_torch.VOLO) -> None:
    images, box = torch.randn(2, 3, 32, 32), (0, 1, 2, 2)
    twin = copy.deepcopy(model)
    ours, theirs = model(images, token_labels=True, mix_box=box), twin.forward_train(images, box)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(a, b)
    assert ours[2] == theirs[2] == box
    model.eval()
    assert torch.equal(model(images, token_labels=True), model(images))


def test_so_does_the_jax_twin() -> None:
    def call() -> tuple[jax.Array, jax.Array]:
        model = outlook_jax.VOLO(volo_config("volo_d1_224", **SIZES), rngs=nnx.Rngs(0))
        cls, aux, _ = model(jnp.ones((2, 32, 32, 3)), token_labels=True, mix_box=(0, 1, 2, 2))
        return cls, aux

    assert [shape.shape for shape in jax.eval_shape(call)] == [(2, 1000), (2, 4, 1000)]
