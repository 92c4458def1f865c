"""Bad input to VOLO: one clear error each, of the same type and words in both twins."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import VOLOConfig
from parity_tests.support.volo import draw_weights, jax_volo, small_config

pytestmark = pytest.mark.unchecked

Attempt = Callable[[], Any]


def words(attempt: Attempt) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (type and words are what is compared)
        attempt()
    return caught.type, str(caught.value)


@pytest.fixture(scope="module")
def twins() -> tuple[outlook_torch.VOLO, outlook_jax.VOLO]:
    config = small_config(layers=(1, 1), img_size=(32, 16))
    model = outlook_torch.VOLO(config, device="meta")
    # Its arrays have shapes only: what is wrong with an input must show before any arithmetic.
    return model.eval(), nnx.eval_shape(lambda: outlook_jax.VOLO(config, deterministic=True, rngs=nnx.Rngs(0)))


IMAGES = {
    "rank": ((3, 32, 16), "got 3 axes: "),
    "channels": ((2, 4, 32, 16), "images must have in_chans=3 channels on axis "),
    "not_a_multiple": ((2, 3, 35, 16), "images of 35x16 pixels do not fit: both sides must be multiples of 8 "),
    "another_size": ((2, 3, 16, 32), "images of 16x32 pixels, but the model was made for img_size=32x16; "),
    "no_pixels": ((2, 3, 0, 16), "8x16 would fit"),
}


@pytest.mark.parametrize(("shape", "message"), IMAGES.values(), ids=IMAGES.keys())
def test_images_that_do_not_fit(twins: Any, shape: tuple[int, ...], message: str) -> None:
    model, twin = twins
    last = (*shape[:-3], *shape[-2:], shape[-3])
    for forward in ("__call__", "forward_train", "forward_features", "forward_intermediates"):
        (kind, ours), (their_kind, theirs) = (
            words(lambda: getattr(model, forward)(torch.zeros(shape, device="meta"))),  # noqa: B023
            words(lambda: getattr(twin, forward)(jnp.zeros(last))),  # noqa: B023
        )
        assert kind is their_kind is ValueError
        assert message in ours
        assert message in theirs
        # Only the order of the axes differs.
        assert re.sub(r"\(.*\)|axis \d", "", ours) == re.sub(r"\(.*\)|axis \d", "", theirs)


def test_images_of_the_other_frameworks_order_are_recognised(twins: Any) -> None:
    model, twin = twins
    assert words(lambda: model(torch.zeros(2, 32, 16, 3)))[1].endswith("axis 3 is 3: are they channels last?")
    assert words(lambda: twin(jnp.zeros((2, 3, 32, 16))))[1].endswith("axis 1 is 3: are they channels first?")


NAMES = {
    "unknown_variant": (
        {"name": "volo_d1_256"},
        ValueError,
        "unknown variant 'volo_d1_256'; did you mean 'volo_d1_224'? Known: 'volo_d1_224', 'volo_d1_384', ",
    ),
    "nothing_like_a_variant": ({"name": "resnet50"}, ValueError, "unknown variant 'resnet50'; did you mean 'volo_"),
    "unknown_field": (
        {"name": "volo_d1_224", "num_class": 3},
        TypeError,
        "'num_class' is not a field of VOLOConfig; did you mean 'num_classes'?",
    ),
    "nothing_like_a_field": (
        {"name": "volo_d1_224", "zero_init": 3},
        TypeError,
        "'zero_init' is not a field of VOLOConfig; known: layers, img_size, ",
    ),
    "timms_way_to_trained_weights": (
        {"name": "volo_d1_224", "pretrained": True},
        TypeError,
        "'pretrained' is not a field of VOLOConfig; from_pretrained(name) makes a model with its released weights",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), NAMES.values(), ids=NAMES.keys())
def test_names_that_do_not_exist(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    ours = words(lambda: outlook_torch.volo(**arguments))
    assert ours == words(lambda: outlook_jax.volo(**arguments, rngs=nnx.Rngs(0)))
    assert ours[0] is kind
    assert ours[1].startswith(message)


REQUESTS = {
    "too_many_stages": ({"indices": 3}, "indices=3 asks for the last 3 of 2 stages"),
    "no_such_stage": ({"indices": [0, 2]}, "indices=(0, 2): there is no stage 2 among 2"),
    "no_stage": ({"indices": []}, "indices is empty; None means every stage"),
    "unknown_layout": ({"output_fmt": "NLC"}, "output_fmt must be one of 'NCHW', 'NHWC', got 'NLC'"),
}


@pytest.mark.parametrize(("request_", "message"), REQUESTS.values(), ids=REQUESTS.keys())
def test_intermediates_that_do_not_exist(twins: Any, request_: dict[str, Any], message: str) -> None:
    model, twin = twins
    ours = words(lambda: model.forward_intermediates(torch.zeros(1, 3, 32, 16, device="meta"), **request_))
    assert ours == words(lambda: twin.forward_intermediates(jnp.zeros((1, 32, 16, 3)), **request_))
    assert ours == (ValueError, message)
    if "indices" in request_:
        assert ours == words(lambda: model.prune_intermediate_layers(**request_))
        assert ours == words(lambda: twin.prune_intermediate_layers(**request_))


@pytest.mark.parametrize("outlook", [True, False])
def test_an_implementation_that_does_not_exist_shows_when_the_model_is_made(outlook: bool) -> None:
    config = small_config(outlook_attention=(outlook, False), out_stride=2)
    for kind, words_ in (
        words(lambda: outlook_torch.VOLO(config, implementation="composit", device="meta")),
        words(lambda: outlook_jax.VOLO(config, implementation="composit", rngs=nnx.Rngs(0))),
        words(lambda: outlook_torch.from_pretrained("missing.safetensors", implementation="composit")),
        words(lambda: outlook_jax.from_pretrained("missing.safetensors", implementation="composit")),
    ):
        assert kind is ValueError
        assert re.fullmatch(
            r"unknown implementation 'composit'; known: .*'composite', 'reference'; did you mean 'composite'\?", words_
        )


BOXES = {
    "outside": ((0, 0, 5, 2), "must have 0 <= lower <= upper <= 4 for its rows: the map has 4x2 tokens"),
    "out_of_order": ((0, 2, 1, 1), "must have 0 <= lower <= upper <= 2 for its columns: the map has 4x2 tokens"),
    "negative": ((-1, 0, 1, 1), "for its rows"),
}


@pytest.fixture(scope="module")
def trained() -> tuple[outlook_torch.VOLO, outlook_jax.VOLO]:
    config = small_config(layers=(1, 1), img_size=(32, 16))
    return outlook_torch.VOLO(config, device="meta"), jax_volo(config, draw_weights(config))


@pytest.mark.parametrize(("box", "message"), BOXES.values(), ids=BOXES.keys())
def test_boxes_that_do_not_fit(trained: Any, box: tuple[int, ...], message: str) -> None:
    model, twin = trained
    ours = words(lambda: model.forward_train(torch.zeros(1, 3, 32, 16, device="meta"), box))
    theirs = words(lambda: nnx.eval_shape(lambda twin, x: twin.forward_train(x, box), twin, jnp.zeros((1, 32, 16, 3))))
    assert ours == theirs
    assert ours[0] is ValueError
    assert message in ours[1]


def test_a_box_in_evaluation(twins: Any) -> None:
    model, twin = twins
    ours = words(lambda: model.forward_train(torch.zeros(1, 3, 32, 16, device="meta"), (0, 0, 1, 1)))
    assert ours == words(lambda: twin.forward_train(jnp.zeros((1, 32, 16, 3)), (0, 0, 1, 1)))
    assert ours == (ValueError, "mix_box=(0, 0, 1, 1) needs training mode and the auxiliary head")


CONFIGS = {
    "patch_size": ({"patch_size": 7}, "patch_size must be one of 4, 8, 16, got 7"),
    "pooling": ({"global_pool": "max"}, "global_pool must be one of '', 'avg', 'token', got 'max'"),
    "post_layers": ({"post_layers": ("sa",)}, "post_layers must be one of 'ca', got 'sa'"),
    "classes": ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
    "rate": ({"drop_path_rate": 1.5}, "drop_path_rate must be a rate between 0 and 1, got 1.5"),
    "image_size": ({"img_size": 230}, "images of 230x230 pixels do not fit: both sides must be multiples of 8"),
    "one_entry_per_stage": ({"num_heads": (2, 4, 4)}, "num_heads must have one entry per stage: 2, got 3"),
    "no_blocks": ({"layers": (2, 0)}, "layers must hold at least one block per stage, got (2, 0)"),
    "ratio": ({"mlp_ratio": 0}, "mlp_ratio must be positive, got (0, 0)"),
    "heads": ({"num_heads": (2, 5)}, "dim must be divisible by num_heads: 24 % 5 = 4"),
    "change_of_channels": (
        {"downsamples": (False, False), "pooling_scale": 1},
        "embed_dims change from 12 to 24 behind stage 0, which downsamples[0]=False leaves as it is",
    ),
    "downsampling_at_the_end": ({"downsamples": (True, True)}, "downsamples[-1] must be False"),
    "no_place_for_pos_embed": (
        {"downsamples": (False, False), "pooling_scale": 1, "embed_dims": (24, 24)},
        "pos_embed is added before network[2], but the network has only 2 parts",
    ),
    "pooling_scale": ({"pooling_scale": 4}, "pooling_scale must be 2 for 1 downsamplings by 2, got 4"),
    "class_token": ({"post_layers": None}, "global_pool='token' needs the class token, which post_layers=None"),
    "tokens_of_the_auxiliary_head": (
        {"post_layers": None, "global_pool": "avg"},
        "use_aux_head needs the class token, which post_layers=None leaves out",
    ),
    "mixing": (
        {"use_mix_token": True, "use_aux_head": False},
        "use_mix_token needs use_aux_head=True and global_pool='token', got use_aux_head=False",
    ),
    "window": ({"out_padding": 0}, "the window grid does not fit the map's rows: 8 rows with kernel_size=3"),
}


@pytest.mark.parametrize(("overrides", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_that_do_not_fit(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_config(**overrides)


def test_a_downsampling_behind_pos_embed() -> None:
    with pytest.raises(ValueError, match=re.escape("pos_embed is added before network[2], but network[3] downsamples")):
        VOLOConfig(
            (1, 1, 1),
            32,
            patch_size=4,
            embed_dims=(12, 12, 12),
            num_heads=(2, 2, 2),
            downsamples=(True, True, False),
            outlook_attention=(True, False, False),
            pooling_scale=4,
        )
