"""Train a net with a MONAI engine, whose iteration is a strategy's, and MONAI's own handlers.

    python docs/examples/monai_engine.py

The run is short, so the Dice only shows that it works.
"""

# %% Phantoms with missing files, prepared on the model's grid
import tempfile
from pathlib import Path

import torch
from monai.engines import SupervisedEvaluator
from monai.handlers import (
    CheckpointSaver,
    LrScheduleHandler,
    MeanDice,
    StatsHandler,
    ValidationHandler,
    from_engine,
)
from monai.networks.nets.unet import UNet
from monai.networks.utils import one_hot
from torch.utils.data import DataLoader

import prism_meta as pm
from prism_meta.data.cache import prepare
from prism_meta.data.episodes import Episodes
from prism_meta.data.phantom import write_phantoms
from prism_meta.integrations.monai import MetaTrainer

folder = Path(tempfile.mkdtemp())
available = pm.draw_availability(6, (0.2, 0.4, 0.6, 0.8), seed=0)
write_phantoms(folder / "cases", available, shape=(40, 48, 36), spacing=4.0)
cases = prepare(
    pm.load_cases(folder / "cases"),
    folder / "cache",
    preprocessing=pm.Preprocessing((4.0, 4.0, 4.0)),
    labels=pm.BRATS_LABELS,
)
episodes = Episodes(cases[:4], patch=(32, 32), batch_size=2, steps=4, seed=0)
held_out = Episodes(cases[4:], patch=(32, 32), batch_size=1, steps=4, seed=0)

# %% A net, its learner and the schedule of its rate
torch.manual_seed(0)
net = pm.wrap(UNet(spatial_dims=2, in_channels=4, out_channels=4, channels=(8, 16), strides=(2,)))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
learner = pm.MetaLearner(net, pm.PrismObjective(), pm.FirstOrder(pm.SGD(0.05)), optimizer)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


# %% Validation is MONAI's own: the Dice of the classes, on cases that are held out
def prepare_batch(batch: pm.Batch, device: torch.device, non_blocking: bool) -> tuple:
    batch = batch.to(device)
    return batch.image, batch.target[:, None], (batch.mask,), {}


def inferer(image: torch.Tensor, network: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    return one_hot(network.segment(image, mask).argmax(1, keepdim=True), num_classes=4)


best = CheckpointSaver(
    save_dir=folder, save_dict={"net": net}, save_key_metric=True, key_metric_filename="best.pt"
)
validator = SupervisedEvaluator(
    device="cpu",
    val_data_loader=[held_out[step][1] for step in range(len(held_out))],
    network=net,
    prepare_batch=prepare_batch,
    inferer=inferer,
    key_val_metric={"dice": MeanDice(False, output_transform=from_engine(["pred", "label"]))},
    val_handlers=[best],
    decollate=False,
)

# %% The trainer takes the learner; the last handler keeps what a resumed training needs
trainer = MetaTrainer(
    device="cpu",
    max_epochs=3,
    train_data_loader=DataLoader(episodes, batch_size=None, collate_fn=tuple),
    learner=learner,
    train_handlers=[
        StatsHandler(output_transform=from_engine(["loss"], first=True)),
        LrScheduleHandler(scheduler, print_lr=False),
        ValidationHandler(interval=1, validator=validator),
        CheckpointSaver(
            save_dir=folder,
            save_dict={"net": net, "optimizer": optimizer, "learner": learner},
            save_final=True,
            final_filename="last.pt",
        ),
    ],
)
trainer.run()
(output,) = trainer.state.output
print(f"meta loss after {trainer.state.iteration} steps: {output['loss']:.3f}")
print(f"best Dice: {validator.state.best_metric:.3f}, epoch {validator.state.best_metric_epoch}")
print("files:", ", ".join(sorted(path.name for path in folder.glob("*.pt"))))
