"""Train one net on phantoms with first and with second order, from the same start and on the same episodes.

    python docs/examples/compare_orders.py

The run is short, so the losses only show that both work; use `prism-meta compare` for a real comparison.
"""

# %% Phantoms with missing files, prepared on the model's grid
import copy
import tempfile
from pathlib import Path

import torch
from monai.networks.nets.unet import UNet

import prism_meta as pm
from prism_meta.data.cache import prepare
from prism_meta.data.episodes import Episodes
from prism_meta.data.phantom import write_phantoms

folder = Path(tempfile.mkdtemp())
available = pm.draw_availability(6, (0.2, 0.4, 0.6, 0.8), seed=0)
write_phantoms(folder / "cases", available, shape=(40, 48, 36), spacing=4.0)
cases = prepare(
    pm.load_cases(folder / "cases"),
    folder / "cache",
    preprocessing=pm.Preprocessing((4.0, 4.0, 4.0)),
    labels=pm.BRATS_LABELS,
)
episodes = Episodes(cases, patch=(32, 32), batch_size=2, steps=5, seed=0)

# %% The same net twice; only the strategy differs
torch.manual_seed(0)
start = pm.wrap(UNet(spatial_dims=2, in_channels=4, out_channels=4, channels=(8, 16), strides=(2,)))
for strategy in (pm.FirstOrder(pm.SGD(0.05)), pm.SecondOrder(pm.SGD(0.05))):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    learner = pm.MetaLearner(model, pm.PrismObjective(weighted=False), strategy, optimizer)
    losses = [learner.step(*episodes[step]).meta_loss.item() for step in range(5)]
    print(type(strategy).__name__, [round(loss, 3) for loss in losses])
