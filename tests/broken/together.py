"""Overrides that are valid one by one and contradict each other."""

from __future__ import annotations

#: Networks that are named by their module have sizes of their own.
_OWN_SIZES = ("model.width=8", "model.depth=4")

#: Overrides that are valid one by one, and what is said of them together.
TOGETHER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "patch 1": (("data.patch=[1, 1]",), ("data.patch, model.depth", "use more than 2")),
    "patch 3, depth 4": (
        ("data.patch=[3, 3]", "model.depth=4"),
        ("data.patch, model.depth", "use more than 8"),
    ),
    "depth 12": (("model.depth=12",), ("data.patch, model.depth", "smaller depth")),
    "width 4096": (
        ("model.width=4096", "model.depth=8", "data.patch=[256, 256]"),
        ("model.width", "of memory", "smaller"),
    ),
    "batch of a million": (
        ("data.batch_size=1000000", "data.patch=[256, 256]"),
        ("data.batch_size", "of memory", "smaller"),
    ),
    "all sizes at once": (
        ("data.patch=[4096, 4096, 4096]", "model.depth=12", "model.width=4096"),
        ("data.batch_size, data.patch, model.width, model.depth",),
    ),
    "U-Net, patch 10": (
        ("model.network=unet", "data.patch=[10, 10]", "model.depth=3"),
        ("data.patch: the U-Net halves it 2 times", "multiples of 4"),
    ),
    "U-Net with a fusion": (
        ("model.network=unet", "model.fusion=mean"),
        ("fusion: mean needs network = prism",),
    ),
    "two weights for four modalities": (
        ("objective.beta=[1, 2]",),
        ("objective.beta: got 2 weights for 4 modalities",),
    ),
    "weighting without unimodal": (
        ("objective.unimodal=false", "objective.weighting=preference"),
        ("weighting: preference has nothing to weigh",),
    ),
    "learned weights from 0": (
        ("objective.weighting=learned", "objective.beta=0"),
        ("beta, delta: learned weights start at numbers > 0",),
    ),
    "learned weights without a meta-gradient": (
        ("objective.weighting=learned", "meta.strategy=reptile"),
        ("objective.weighting: learned weights follow the gradient",),
    ),
    "learned subsets without a meta-gradient": (
        ("objective.subset_weights=learned", "meta.strategy=joint"),
        ("objective.subset_weights: learned weights follow the gradient",),
    ),
    "a meta loss that is only measured": (
        ("objective.meta_loss=ranking", "meta.strategy=single_level"),
        ("objective.meta_loss: meta.strategy single_level only measures the meta loss",),
    ),
    "a temperature of no soft worst": (
        ("objective.meta_temperature=1", "objective.meta_loss=ranking"),
        ("meta_temperature: only meta_loss = soft_worst has one",),
    ),
    "shared state of SGD": (
        ("meta.inner_state=shared", "meta.strategy=first_order"),
        ("inner_state: shared needs inner = adamw",),
    ),
    "shared state without inner steps": (
        ("meta.inner_state=shared", "meta.inner=adamw", "meta.strategy=single_level"),
        (
            "inner: single_level takes no inner steps; leave it out",
            "inner_state: single_level takes no inner steps; leave it out",
        ),
    ),
    "epsilon without Reptile": (
        ("meta.epsilon=0.5",),
        ("meta: epsilon: single_level has none; leave it out, or use reptile",),
    ),
    "parameters of nobody": (
        ("meta.strategy=first_order", "meta.outer_parameters=fusions.*", "meta.alpha=0"),
        ("meta: alpha, outer_parameters: with alpha 0",),
    ),
    "hard masks without all subsets": (
        ("masks.train=hard", "masks.meta=full"),
        ("masks: meta: hard masks follow the losses", "use dynamic"),
    ),
    "a network that cannot be imported": (
        (*_OWN_SIZES, "model.network=nomodule:Net"),
        ("model.network: nomodule:Net cannot be imported (No module named 'nomodule')", "give an"),
    ),
    "a network of MONAI in small letters": (
        (*_OWN_SIZES, "model.network=monai:segresnet"),
        (
            "model.network: monai.networks.nets has no function or class 'segresnet'",
            "did you mean SegResNet?",
        ),
    ),
    "a function that returns no network": (
        (*_OWN_SIZES, "model.network=builtins:dict"),
        ("model.network: builtins:dict returned dict, expected a torch.nn.Module", "correct it"),
    ),
    "a network without its arguments": (
        (*_OWN_SIZES, "model.network=monai:UNet"),
        ("model.arguments: UNet() missing 2 required", "correct them"),
    ),
    "a network with an unknown argument": (
        (*_OWN_SIZES, "model.network=monai:SegResNet", "model.arguments={filters = 4}"),
        (
            "model.arguments: SegResNet() got an unexpected keyword argument 'filters'",
            "correct them",
        ),
    ),
    "a network of MONAI with a width": (
        ("model.network=monai:SegResNet", "model.width=4"),
        ("model: width: monai:SegResNet has no such size", "use arguments"),
    ),
    "a network of MONAI with a fusion": (
        ("model.network=monai:SegResNet", "model.fusion=mean"),
        ("model: fusion: mean needs network = prism, because monai:SegResNet has no fusion",),
    ),
    "warm-up longer than the training": (
        ("training.warmup=50", "training.steps=50"),
        ("training: warmup: got 50 steps of 50", "use fewer"),
    ),
    "a logger twice": (
        ("training.loggers=['wandb', 'wandb']",),
        ("training: loggers: one of them occurs twice; give each name once",),
    ),
    "patience without validation": (
        ("validation.patience=3",),
        ("validation: patience: needs validation", "set cases"),
    ),
    "a validation case twice": (
        ('validation.cases=["p1", "p1"]',),
        ("validation: cases: a case occurs twice",),
    ),
    "a power of no hard masks": (("masks.power=2",), ("power: only hard masks have one",)),
    "a step of no group DRO": (
        ("masks.step=2", "masks.train=hard"),
        ("step: only dro masks have one; leave it out, or use dro for train",),
    ),
    "group DRO without all subsets": (
        ("masks.train=dro", "masks.meta=single"),
        ("masks: meta: dro masks follow the losses", "use dynamic"),
    ),
    "support without tasks": (
        ("episodes.support=2",),
        ("support: 2 support cases need kind = task",),
    ),
    "tasks with masks": (
        ("episodes.kind=task", "masks.train=static"),
        ("masks, episodes.kind: all samples of a task show one subset",),
    ),
    "more support cases than there are": (
        ("episodes.kind=task", "episodes.support=50"),
        ("no task can be drawn", "use fewer support cases", "episodes.support"),
    ),
    "rates and a table": (
        ("data.missing_rates=[0, 0, 0, 0]", "data.availability=a.csv"),
        ("missing_rates, availability: got both",),
    ),
    "three rates for four modalities": (
        ("data.missing_rates=[0, 0, 0]",),
        ("missing_rates: got 3 rates; give 4",),
    ),
    "rates that leave nothing": (
        ("data.missing_rates=[0.99, 0.99, 0.99, 0.99]",),
        ("leave 0 files for 3 cases", "data.missing_rates"),
    ),
    "test cases and a holdout": (
        ("data.test_cases=['p0']", "data.holdout=1"),
        ("test_cases, holdout: got both",),
    ),
    "a test case twice": (("data.test_cases=['p0', 'p0']",), ("test_cases: a case occurs twice",)),
    "an unknown test case": (("data.test_cases=['p9']",), ("data.test_cases", "p9")),
    "folds and a holdout": (
        ("data.folds=3", "data.fold=0", "data.holdout=1"),
        ("folds: got test_cases or holdout, too",),
    ),
    "folds without a fold": (("data.folds=3",), ("folds, fold: got one without the other",)),
    "a fold without folds": (("data.fold=0",), ("folds, fold: got one without the other",)),
    "the fold after the last": (
        ("data.folds=3", "data.fold=3"),
        ("fold: got 3, expected at most 2",),
    ),
    "more folds than patients": (
        ("data.folds=4", "data.fold=0"),
        ("got 4 folds for 3 patients", "(set data.folds)"),
    ),
    "sites that are not known": (
        ("data.split=site", "data.holdout=1"),
        ("3 cases have no site (p0, p1, p2)", "(set data.split)"),
    ),
    "all cases held out": (("data.holdout=3",), ("data.holdout: leaves none of 3 cases",)),
    "one case to train on": (("data.holdout=2",), ("1 training case", "data.holdout")),
    "no modalities": (("data.modalities=[]",), ("modalities",)),
    "no labels": (("data.labels={}",), ("labels: none given",)),
    "a label value twice": (("data.labels={a=1, b=1}",), ("labels", "its own value")),
    "a region of an unknown class": (("data.regions={WT=['x']}",), ("'WT'", "unknown class 'x'")),
    "an unknown key": (
        ("data.pach=[8, 8]",),
        ("data.pach: unknown key; did you mean data.patch?",),
    ),
    "an unknown section": (
        ("trainning.steps=5",),
        ("trainning: unknown section; did you mean training?",),
    ),
    "a section that is a value": (("data=5",), ("data: got 5, expected a section of keys",)),
    "a value that is a section": (("training.steps.x=5",), ("training.steps",)),
    "half precision on a CPU": (
        ("fabric.precision=16-mixed", "fabric.accelerator=cpu"),
        ("fabric.precision: got '16-mixed' on a CPU", "use bf16-mixed"),
    ),
    "nodes without a launcher": (
        ("fabric.nodes=2", "fabric.accelerator=cpu"),
        ("fabric.nodes: got 2", "torchrun"),
    ),
    "a thousand processes": (
        ("fabric.devices=1000", "fabric.accelerator=cpu"),
        ("fabric.devices: got 1000 processes",),
    ),
    "an index of a CPU": (
        ("fabric.devices='3,'", "fabric.accelerator=cpu"),
        ("fabric.devices: got '3,' with accelerator 'cpu'",),
    ),
    "three faults at once": (
        ("training.steps=0", "model.network=x", "data.foo=1"),
        ("training.steps: got 0", "model.network: got 'x'", "data.foo: unknown key"),
    ),
}
