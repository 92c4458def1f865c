"""Every pair of other packages is mapped without a map."""

import numpy as np
import pytest

from benchmarks.torchvision_stub import declare_missing_torchvision_operators
from outlook_parity import NameMap
from outlook_parity.backends.jax.model import as_jax_model, weights_of
from outlook_parity.backends.names import names_of_models
from outlook_parity.backends.torch.model import weights_of as torch_weights_of
from parity_tests.world.pairs import PAIRS, Pair


@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
def test_every_weight_of_a_foreign_pair_corresponds_without_a_map(pair: Pair) -> None:
    declare_missing_torchvision_operators()
    pytest.importorskip("transformers")
    made = pair.make()
    params = made.jax_model.params
    variables = params if "params" in params else {"params": params}
    model = as_jax_model((made.jax_model.module, variables))
    names = names_of_models(made.torch_model, model, NameMap())
    assert not names.found.left
    assert not names.found.candidates
    found = names.under_torch_names({name: np.asarray(value) for name, value in weights_of(model).items()})
    theirs = torch_weights_of(made.torch_model)
    assert found
    for name, array in found.items():
        assert np.array_equal(array, theirs[name].detach().numpy()), name
