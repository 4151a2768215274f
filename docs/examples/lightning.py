"""Train a net with PyTorch Lightning, whose training step is a strategy's, and resume it.

    python docs/examples/lightning.py

The run is short, so the losses only show that it works.
"""

# %% Phantoms with missing files, prepared on the model's grid
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from monai.networks.nets.unet import UNet
from torch.utils.data import DataLoader

import prism_meta as pm
from prism_meta.data.cache import prepare
from prism_meta.data.episodes import Episodes
from prism_meta.data.phantom import write_phantoms
from prism_meta.integrations.lightning import MetaModule

folder = Path(tempfile.mkdtemp())
available = pm.draw_availability(6, (0.2, 0.4, 0.6, 0.8), seed=0)
write_phantoms(folder / "cases", available, shape=(40, 48, 36), spacing=4.0)
cases = prepare(
    pm.load_cases(folder / "cases"),
    folder / "cache",
    preprocessing=pm.Preprocessing((4.0, 4.0, 4.0)),
    labels=pm.BRATS_LABELS,
)
episodes = Episodes(cases, patch=(32, 32), batch_size=2, steps=4, seed=0)
# An episode is a batch already, and a tuple of two.
loader = DataLoader(episodes, batch_size=None, collate_fn=tuple)


# %% A net and its learner; Lightning takes both in one module
def module() -> MetaModule:
    torch.manual_seed(0)
    net = pm.wrap(
        UNet(spatial_dims=2, in_channels=4, out_channels=4, channels=(8, 16), strides=(2,))
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    strategy = pm.FirstOrder(pm.AdamW(0.01))
    learner = pm.MetaLearner(
        net, pm.PrismObjective(), strategy, optimizer, inner_state="carried", clip_norm=10.0
    )
    return MetaModule(learner)


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(folder, name="log"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# %% Two epochs, then one more from a checkpoint, which has the state of the inner optimizer
first = trainer(epochs=2)
first.fit(module(), loader)
first.save_checkpoint(folder / "two.ckpt")
second = trainer(epochs=3)
second.fit(module(), loader, ckpt_path=folder / "two.ckpt")
for name in ("train_loss", "meta_loss", "grad_norm"):
    print(f"{name} after {second.global_step} steps: {second.callback_metrics[name]:.3f}")
