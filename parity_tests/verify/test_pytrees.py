"""Twins that take several inputs and give several outputs, and layers whose weights Flax keeps in another shape."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from torch import nn
from typer.testing import CliRunner

from outlook_parity import NameMap, Report, load_torch_weights, verify
from outlook_parity.cli.app import app
from outlook_parity.core import pytree as trees
from outlook_parity.core.request import inputs_of
from outlook_parity.models.user import read_inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")

THEIRS = "parity_tests.verify.test_pytrees"
VOCABULARY, DIM, HEADS = 11, 6, 2


@dataclass
class Answer:
    """What both twins give, nested, with whole numbers among it."""

    logits: Any
    hidden: Any
    best: Any


class TorchReader(nn.Module):
    """Reads ids and a map, attends from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.conv = nn.Conv2d(3, DIM, 2, 2)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm = nn.GroupNorm(2, DIM)
        self.head = nn.Linear(DIM, 4)

    def forward(self, ids: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> Answer:
        words = self.embed(ids) * mask[..., None]
        pixels = self.conv(images)
        read, _ = self.attn(words, pixels.flatten(2).transpose(1, 2), pixels.flatten(2).transpose(1, 2))
        logits = self.head(self.norm(read.transpose(1, 2)).transpose(1, 2))
        return Answer(logits, {"words": words, "maps": [pixels]}, logits.argmax(-1))


class NNXReader(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, DIM, rngs=rngs)
        self.conv = nnx.Conv(3, DIM, (2, 2), (2, 2), rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs)
        self.norm = nnx.GroupNorm(DIM, 2, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(DIM, 4, rngs=rngs)

    def __call__(self, ids: Any, images: Any, mask: Any) -> Answer:
        words = self.embed(ids) * mask[..., None]
        pixels = self.conv(images)
        logits = self.head(self.norm(self.attn(words, pixels.reshape(len(pixels), -1, DIM))))
        return Answer(logits, {"words": words, "maps": [pixels]}, logits.argmax(-1))


class LinenReader(linen.Module):
    @linen.compact
    def __call__(self, ids: Any, images: Any, mask: Any) -> Answer:
        words = linen.Embed(VOCABULARY, DIM, name="embed")(ids) * mask[..., None]
        pixels = linen.Conv(DIM, (2, 2), (2, 2), name="conv")(images)
        attention = linen.MultiHeadDotProductAttention(HEADS, name="attn")
        read = attention(words, pixels.reshape(len(pixels), -1, DIM))
        read = linen.GroupNorm(2, epsilon=1e-5, name="norm")(read)
        logits = linen.Dense(4, name="head")(read)
        return Answer(logits, {"words": words, "maps": [pixels]}, logits.argmax(-1))


def reader_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(0, VOCABULARY, (3, 5)),
        "images": rng.standard_normal((3, 4, 4, 3)),
        "mask": rng.random((3, 5)) < 0.7,
    }


def torch_reader() -> nn.Module:
    torch.manual_seed(0)
    model = TorchReader()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return model


def nnx_reader() -> Any:
    return load_torch_weights(NNXReader(), torch_reader())


def linen_reader() -> Any:
    module = LinenReader()
    variables = module.init(jax.random.key(0), *map(jnp.asarray, reader_inputs().values()))
    return load_torch_weights((module, variables), torch_reader())


NAMES = NameMap(torch_axes=(0, 3, 1, 2))
LEAVES = ("output.logits", "output.hidden.words", "output.hidden.maps.0", "output.best")


def rows(report: Report, level: str, dtype: str = "float64") -> dict[str, str]:
    return {row.name: row.verdict for row in report.checks if (row.level, row.dtype) == (level, dtype)}


@pytest.mark.parametrize("make", [nnx_reader, linen_reader], ids=["NNX", "Linen"])
def test_several_inputs_and_outputs_and_attention_agree_leaf_by_leaf(make: Any) -> None:
    report = verify(torch_reader(), make(), reader_inputs(), dtypes=("float64", "float32"), steps=2, names=NAMES)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert rows(report, "forward") == dict.fromkeys(LEAVES, "pass")
    assert rows(report, "weights", "as given")["attn.in_proj_weight"] == "pass"
    graded = rows(report, "gradients")
    assert graded["input.images"] == graded["attn.in_proj_weight"] == graded["attn.out_proj.weight"] == "pass"
    assert graded["embed.weight"] == "pass"
    assert not {"input.ids", "input.mask"} & set(graded)
    assert rows(report, "layers")["attn"] == "pass"
    assert rows(report, "training")["AdamW: first moment of attn.in_proj_bias"] == "pass"
    assert {noise.how for noise in report.self_noise} == {"called twice", "batch reversed"}


def test_one_wrong_leaf_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = NNXReader.__call__

    def wrong(self: Any, *inputs: Any) -> Answer:
        answer = honest(self, *inputs)
        return Answer(answer.logits, answer.hidden | {"maps": [2 * answer.hidden["maps"][0]]}, answer.best)

    monkeypatch.setattr(NNXReader, "__call__", wrong)
    report = verify(
        torch_reader(), nnx_reader(), reader_inputs(), levels=("forward",), dtypes=("float64",), names=NAMES
    )
    assert report.verdict == "mismatch"
    assert [name for name, verdict in rows(report, "forward").items() if verdict == "mismatch"] == [
        "output.hidden.maps.0"
    ]


@pytest.mark.parametrize("missing", ["hidden", "best"])
def test_a_leaf_that_one_twin_lacks_is_a_mismatch(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = NNXReader.__call__

    def fewer(self: Any, *inputs: Any) -> Answer:
        answer = honest(self, *inputs)
        setattr(answer, missing, None)
        return answer

    monkeypatch.setattr(NNXReader, "__call__", fewer)
    report = verify(
        torch_reader(), nnx_reader(), reader_inputs(), levels=("forward",), dtypes=("float64",), names=NAMES
    )
    assert report.verdict == "mismatch"


@pytest.mark.parametrize(("projection", "part"), [("query", 0), ("value", 2)])
def test_a_wrong_projection_of_attention_is_a_wrong_weight(projection: str, part: int) -> None:
    model = nnx_reader()
    kernel = getattr(model.attn, projection).kernel
    kernel[...] = 2 * kernel[...]
    report = verify(torch_reader(), model, reader_inputs(), levels=("gradients",), dtypes=("float64",), names=NAMES)
    assert report.first_divergence == "attn"
    assert "weight attn.in_proj_weight" in str(report.cause)


def test_queries_and_keys_exchanged_across_layouts_are_told() -> None:
    model = nnx_reader()
    for leaf in ("kernel", "bias"):
        query, key = (getattr(getattr(model.attn, name), leaf) for name in ("query", "key"))
        query[...], key[...] = key[...], query[...]
    report = verify(torch_reader(), model, reader_inputs(), levels=("forward",), dtypes=("float64",), names=NAMES)
    assert "parts along axis 0 are in the order [1, 0, 2] in jax" in str(report.cause)


def test_several_inputs_of_one_file_go_through_the_command_line(tmp_path: Path) -> None:
    arrays = {f"{index}_{name}": array for index, (name, array) in enumerate(reader_inputs().items())}
    save_file(arrays, tmp_path / "inputs.safetensors")
    (tmp_path / "map.toml").write_text("torch_axes = [0, 3, 1, 2]\n")
    twins = ["--torch", f"{THEIRS}:torch_reader", "--jax", f"{THEIRS}:nnx_reader"]
    given = ["--inputs", str(tmp_path / "inputs.safetensors"), "--map", str(tmp_path / "map.toml")]
    levels = ["--level", "forward", "--dtype", "float64", "--verbose"]
    result = CliRunner().invoke(app, ["verify", *twins, *given, *levels])
    assert result.exit_code == 0, result.output
    assert all(leaf in result.output for leaf in LEAVES)
    assert "self-noise" in result.output


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 3, 2)
        self.down = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).flatten(2))


class NNXDecoder(nnx.Module):
    def __init__(self, transpose_kernel: bool) -> None:
        rngs = nnx.Rngs(0)
        how = {"padding": "VALID", "transpose_kernel": transpose_kernel, "rngs": rngs}
        self.up = nnx.ConvTranspose(3, 3, (3, 3), (2, 2), **how)
        self.down = nnx.Conv(3, 4, (3,), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        y = self.up(x)
        return self.down(y.reshape(len(y), -1, 3))


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_convolutions_are_turned_as_either_convention_has_them(transpose_kernel: bool) -> None:
    torch.manual_seed(0)
    theirs = Decoder()
    ours = load_torch_weights(NNXDecoder(transpose_kernel), theirs)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 3))
    levels = ("forward", "gradients")
    report = verify(theirs, ours, x, levels=levels, dtypes=("float64",), names=NAMES)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)


class NNXRecurrent(nnx.Module):
    def __init__(self) -> None:
        self.rnn = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))


def test_layers_that_are_not_mapped_say_so_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"rnn.weight_ih_l0 .*one bias where it has two.*as parameters of these names"):
        load_torch_weights(NNXRecurrent(), Recurrent())


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, bias=False)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.attn(x, x, x)[0])


class BatchFirst(nnx.Module):
    def __init__(self) -> None:
        self.attn = nnx.MultiHeadAttention(HEADS, DIM, use_bias=False, decode=False, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(DIM, epsilon=1e-5, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.norm(x + self.attn(x))


def test_sequences_may_have_their_steps_first_in_torch() -> None:
    torch.manual_seed(0)
    theirs = TimeFirst()
    ours = load_torch_weights(BatchFirst(), theirs)
    x = np.random.default_rng(0).standard_normal((3, 5, DIM))
    names = NameMap(torch_axes=(1, 0, 2))
    levels = ("forward", "layers", "gradients")
    report = verify(theirs, ours, x, levels=levels, dtypes=("float64",), names=names)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    alone = {(row.name, row.view) for row in report.checks if row.level == "layers" and row.verdict == "pass"}
    assert {("attn", "torch"), ("norm", "jax")} <= alone


class StridedInTorch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class StridedInJax(nnx.Module):
    def __init__(self, channels: int = 3, swapped: bool = False) -> None:
        self.conv = nnx.Conv(channels, 8, (1, 1), 2, padding="VALID", rngs=nnx.Rngs(0))
        self.swapped = swapped

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.conv(x)
        return out.transpose(0, 3, 1, 2) if self.swapped else out


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [16, (16, 16), 15])
def test_an_output_whose_shape_fits_in_two_orders_has_the_one_that_fits_at_another_size(size: Any) -> None:
    theirs = StridedInTorch()
    ours = load_torch_weights(StridedInJax(), theirs)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    x = np.random.default_rng(0).standard_normal((2, rows, columns, 3))
    report = verify(theirs, ours, x, dtypes=("float64",), steps=2, names=NameMap(torch_axes=(0, 3, 1, 2)))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    (note,) = [note for note in report.notes if note.startswith("output of shape (2, 8, 8, 8) fits in 2 orders")]
    assert "taken in [0, 2, 3, 1], as alone fits for inputs half as large" in note


def test_axes_that_a_twin_exchanges_are_a_mismatch_though_the_shape_fits() -> None:
    theirs = StridedInTorch()
    ours = load_torch_weights(StridedInJax(), theirs)
    ours.swapped = True  # channels first, as in torch: the shapes at another size say so, whatever the inputs' order
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3))
    names = NameMap(torch_axes=(0, 3, 1, 2))
    levels = ("forward", "gradients")
    assert verify(theirs, ours, x, levels=levels, dtypes=("float64",), names=names).verdict == "pass"
    as_inputs = NameMap(torch_axes=(0, 3, 1, 2), out_axes={"output": (0, 2, 3, 1)})
    assert verify(theirs, ours, x, levels=levels, dtypes=("float64",), names=as_inputs).verdict == "mismatch"


def test_an_output_whose_shape_fits_in_two_orders_at_every_size_follows_the_inputs_unless_the_map_says() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 3))  # too small to be halved
    axes = (0, 3, 1, 2)
    report = verify(torch.tanh, jnp.tanh, x, dtypes=("float64",), names=NameMap(torch_axes=axes))
    assert report.verdict == "pass"
    assert any("taken in [0, 2, 3, 1], the order said for the inputs" in note for note in report.notes)
    names = NameMap(torch_axes=axes, out_axes={"output": (0, 1, 2, 3)})
    assert verify(torch.tanh, jnp.tanh, x, dtypes=("float64",), names=names).verdict == "mismatch"


def test_an_output_that_nothing_tells_the_order_of_is_taken_as_it_is_and_noted() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 3))
    report = verify(torch.tanh, jnp.tanh, x, dtypes=("float64",))
    assert report.verdict == "pass"
    assert any("taken in [0, 1, 2, 3], as it is, for nothing says otherwise" in note for note in report.notes)
    turned = verify(channels_first, jnp.tanh, x, dtypes=("float64",))
    assert turned.verdict == "mismatch"


def test_out_axes_of_an_unknown_output_are_an_error() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4))
    pair = (torch.tanh, jnp.tanh)
    with pytest.raises(ValueError, match="out_axes names logits; the torch model gives output"):
        verify(*pair, x, dtypes=("float64",), names=NameMap(out_axes={"logits": (0,)}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NameMap(torch_axes=(0, 3, 1, 1)), r"torch_axes of input, .*, must not be \[0, 3, 1, 1\]"),
        (NameMap(torch_axes=[(0, 4, 1, 2)]), r"torch_axes of input, .*, must not be \[0, 4, 1, 2\]"),
        (NameMap(out_axes={"output": (0, 0, 1, 2)}), r"out_axes of output, .*, must not be \[0, 0, 1, 2\]"),
        (NameMap(out_axes={"output": (0, 2, 1)}), r"out_axes of output, .*, must not be \[0, 2, 1\]"),
    ],
)
def test_axes_in_an_order_that_is_none_are_refused_with_the_shape(names: NameMap, message: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    with pytest.raises(ValueError, match=message) as error:
        verify(torch.tanh, jnp.tanh, x, dtypes=("float64",), names=names)
    assert "(2, 3, 4, 5)" in str(error.value)


def test_a_name_of_the_map_that_is_not_there_is_answered_with_one_that_is() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, DIM))
    with pytest.raises(ValueError, match=r"modules, of JAX, name 'atn', which is not there; of the \d+: .*\battn\b"):
        verify(TimeFirst(), BatchFirst(), x, names=NameMap(modules={"atn": "attn"}))


def test_levels_may_be_asked_for_in_any_order() -> None:
    torch.manual_seed(0)
    theirs = TimeFirst()
    pair = (theirs, load_torch_weights(BatchFirst(), theirs))
    x = np.random.default_rng(0).standard_normal((3, 5, DIM))
    ask = partial(verify, *pair, x, dtypes=("float64",), names=NameMap(torch_axes=(1, 0, 2)))
    usual, turned = ask(levels=("forward", "layers")), ask(levels=("layers", "forward", "layers"))
    assert turned.checks == usual.checks
    assert len(turned.self_noise) == len(usual.self_noise) == 4


class Named(NamedTuple):
    a: Any
    b: Any


def test_trees_are_read_and_rebuilt_whatever_they_are_made_of() -> None:
    arrays = [np.arange(3.0) + index for index in range(4)]
    tree = Answer((arrays[0], [arrays[1]]), {"z": Named(arrays[2], arrays[0]), "a": None}, arrays[3])
    is_leaf = lambda leaf: isinstance(leaf, np.ndarray)  # noqa: E731
    assert list(trees.named_leaves(tree, is_leaf, "x")) == [
        "x.logits.0",
        "x.logits.1.0",
        "x.hidden.z.a",
        "x.hidden.z.b",
        "x.best",
    ]
    assert len(list(trees.leaves(tree, is_leaf))) == 4  # the one that is there twice is one
    new = trees.replaced(tree, is_leaf, {id(array): -array for array in arrays})
    assert isinstance(new.hidden["z"], Named)
    assert np.array_equal(new.hidden["z"].b, -arrays[0])
    assert np.array_equal(tree.hidden["z"].b, arrays[0])
    with pytest.raises(TypeError, match=r"x\.logits is a str"):
        trees.named_leaves(Answer("a", None, None), is_leaf, "x")


def test_inputs_have_an_order_and_names(tmp_path: Path) -> None:
    arrays = {name: np.arange(3.0) for name in ("10", "2", "1")}
    save_file(arrays, tmp_path / "x.safetensors")
    assert list(read_inputs(tmp_path / "x.safetensors")) == ["1", "2", "10"]
    assert list(inputs_of([np.ones(2), np.ones(2)])) == ["input.0", "input.1"]
    assert list(inputs_of({"mask": np.ones(2), "a": np.ones(2)})) == ["input.mask", "input.a"]
    assert list(inputs_of([[1.0, 2.0], [3.0, 4.0]])) == ["input"]
    with pytest.raises(TypeError, match="at least one array"):
        inputs_of({})


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rms, self.tied = nn.RMSNorm(DIM, eps=1e-5), nn.Linear(DIM, DIM, bias=False)
        self.again = nn.Linear(DIM, DIM, bias=False)
        self.again.weight = self.tied.weight
        nn.init.normal_(self.rms.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.tied(self.rms(x)).tanh())


class NNXNorms(nnx.Module):
    def __init__(self, tied: bool = True) -> None:
        rngs = nnx.Rngs(0)
        self.rms = nnx.RMSNorm(DIM, epsilon=1e-5, rngs=rngs)
        self.tied, self.again = (nnx.Linear(DIM, DIM, use_bias=False, rngs=rngs) for _ in range(2))
        if tied:
            # Flax takes the first in the order of names, PyTorch in that of their making.
            self.again.kernel = self.tied.kernel

    def __call__(self, x: Any) -> Any:
        return self.again(jnp.tanh(self.tied(self.rms(x))))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_tied_in_one_twin_must_be_in_the_other(tied: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = Norms(), NNXNorms(tied)
    weight = jnp.asarray(theirs.tied.weight.detach().numpy().T)
    ours.tied.kernel[...], ours.again.kernel[...] = weight, weight
    ours.rms.scale[...] = jnp.asarray(theirs.rms.weight.detach().numpy())
    x = np.random.default_rng(0).standard_normal((3, 5, DIM))
    names = NameMap(weights={"again.kernel": "tied.weight"} if tied else {})
    report = verify(theirs, ours, x, levels=("forward", "gradients"), dtypes=("float64",), names=names)
    assert report.verdict == ("pass" if tied else "mismatch"), [r for r in report.checks if r.verdict == "mismatch"]


class Dropping(nnx.Module):
    def __init__(self) -> None:
        self.attn = nnx.MultiHeadAttention(HEADS, DIM, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.attn(x)


class TorchDropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def test_dropout_that_cannot_be_shared_drops_nothing_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    theirs = TorchDropping()
    ours = load_torch_weights(Dropping(), theirs)
    x = np.random.default_rng(0).standard_normal((3, 5, DIM))
    report = verify(theirs, ours, x, dtypes=("float64",))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    (note,) = report.notes
    assert "nothing was dropped in training" in note
    assert (
        "attention in attn draws a dropout mask of shape (6, 5, 5) in torch, in JAX one of shape (1, 1, 5, 5)" in note
    )
    theirs.attn.dropout = 0.25
    assert verify(theirs, ours, x, levels=("training",), dtypes=("float64",)).verdict == "mismatch"


def test_a_model_that_fails_on_its_inputs_is_named_with_them() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, DIM + 1))
    with pytest.raises(ValueError, match=r"the torch model fails in rms on input of shape \(3, 5, 7\): RuntimeError"):
        verify(Norms(), NNXNorms(), x)
    with pytest.raises(TypeError, match="the torch model is a NNXNorms of Flax: are the two exchanged"):
        verify(NNXNorms(), Norms(), x[..., 1:])
    with pytest.raises(TypeError, match="the JAX model is a Norms of PyTorch: are the two exchanged"):
        verify(Norms(), Norms(), x[..., 1:])


def test_twins_that_were_not_given_the_same_weights_are_told_so() -> None:
    report = verify(torch_reader(), NNXReader(), reader_inputs(), levels=("forward",), dtypes=("float64",), names=NAMES)
    assert "11 weights differ, so the twins were not given the same" in str(report.cause)
