"""The PyTorch twin's VOLO under torch.func: what timm's can do there, it can."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

import outlook_torch
from parity_tests.support.volo import draw_images, draw_weights, small_config, timm_volo, torch_volo

pytestmark = [
    pytest.mark.unchecked,  # inside of vmap tensors lack the mapped axis
    # PyTorch's own attention loops over the mapped axis.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

CONFIG = small_config(layers=(1, 1))


@pytest.fixture(scope="module")
def ours() -> outlook_torch.VOLO:
    return torch_volo(CONFIG, draw_weights(CONFIG)).eval()


def test_a_batch_of_batches_gives_what_each_batch_gives(ours: outlook_torch.VOLO) -> None:
    batches = torch.from_numpy(np.stack([draw_images(CONFIG, seed=seed) for seed in range(3)]))
    expected = torch.stack([ours(batch) for batch in batches])
    torch.testing.assert_close(vmap(ours)(batches), expected, rtol=1e-12, atol=1e-12)


def test_gradients_per_sample_are_timms(ours: outlook_torch.VOLO) -> None:
    theirs = timm_volo(CONFIG, draw_weights(CONFIG)).eval()
    images = torch.from_numpy(draw_images(CONFIG, batch=3))
    gradients = []
    for model in (ours, theirs):

        def loss(parameters: dict, image: torch.Tensor, model: torch.nn.Module = model) -> torch.Tensor:
            return functional_call(model, parameters, (image[None],)).square().sum()

        parameters = {name: value.detach() for name, value in model.named_parameters()}
        gradients.append(vmap(grad(loss), (None, 0))(parameters, images))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        bound = 1e-10 * gradients[1][name].abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=bound)
