"""The networks in the form that graphs can hold: the same logits, whatever hidden modalities hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shaken import NETS, shaken_run
from torch import Tensor, nn

from prism_meta.export.network import GraphNet
from prism_meta.modalities import subsets
from prism_meta.networks.wrapped import wrap

SIZES = {2: (16, 24), 3: (8, 16, 12)}


@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("net", NETS)
def test_logits_of_every_subset(net: str, dims: int, tmp_path: Path) -> None:
    patch = f"data.patch={[16] * dims}"
    model: Any = shaken_run(tmp_path / "run", *NETS[net], patch).load_model()
    mask = subsets(4)
    image = torch.randn(15, 4, *SIZES[dims])
    damaged = image.clone()
    damaged[~mask] = torch.nan
    with torch.no_grad():
        wanted, found = model.segment(image, mask), GraphNet(model)(damaged, mask)
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class TwoEncoders(nn.Module):
    """A net with an encoder per modality, see ``MultiEncoderNet``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Conv2d(1, 4, 3, padding=1) for _ in range(2))
        self.fused = nn.Conv2d(4, 3, 1)

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([e(x) for e, x in zip(self.encoders, image.split(1, 1), strict=True)], 1)

    def decode_fused(self, encoded: Tensor, sample: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        shown = mask[:, :, None, None, None]
        logits = self.fused((shown * encoded[sample]).sum(1))
        return logits, logits[:, :, ::2, ::2]

    def decode_unimodal(self, encoded: Tensor, sample: Tensor, modality: Tensor) -> Tensor:
        logits: Tensor = self.fused(encoded[sample, modality])
        return logits


def test_a_net_with_several_encoders_and_maps() -> None:
    model = wrap(TwoEncoders(), modalities=("t1", "t2"))
    image, mask = torch.randn(3, 2, 8, 8), subsets(2)
    with torch.no_grad():
        assert torch.equal(GraphNet(model)(image, mask), model.segment(image, mask))
