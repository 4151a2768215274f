"""Bi-level meta-learning for multi-modal medical image segmentation with missing modalities."""

from importlib.metadata import PackageNotFoundError, version

from prism_meta.bilevel.functional.fast_derivatives import use_fast_derivatives
from prism_meta.bilevel.inner import SGD, Adam, AdamW, InnerOptimizer, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.preflight import Preflight, preflight
from prism_meta.bilevel.strategies import (
    ALL_STRATEGIES,
    FiniteDifference,
    FirstOrder,
    FunctionalStrategy,
    HiddenParameterError,
    ImplicitMAML,
    Joint,
    MetaGradient,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
    StepBatches,
    register_strategy,
)
from prism_meta.data.availability import draw_availability
from prism_meta.data.cases import Case
from prism_meta.data.episodes import Episodes
from prism_meta.data.following_masks import GroupDROMask, HardMask
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.masking import (
    BalancedMask,
    DynamicMask,
    FullMask,
    SingleModalityMask,
    StaticMask,
)
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.data.subset_masks import OneSubsetMask
from prism_meta.data.tasks import TaskEpisodes
from prism_meta.errors import CaseError, ConfigError, PrismError
from prism_meta.evaluation.cleanup import Cleanup, RegionRule
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.shortcuts import evaluate, predict
from prism_meta.modalities import BRATS, Batch, subset, subset_name, subsets
from prism_meta.networks.fusion import AttentionFusion, Fusion, MeanFusion, RegionAwareFusion
from prism_meta.networks.multi_encoder import MultiEncoderNet
from prism_meta.networks.prediction import Prediction, SegmentationModel
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import WrappedNet, wrap
from prism_meta.objective import losses
from prism_meta.objective.meta_losses import Ranking, SoftWorst
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import (
    LearnedSubsetWeights,
    LearnedWeights,
    RelativePreference,
)
from prism_meta.records import Record, read_records, write_records
from prism_meta.report import compare, summarize
from prism_meta.training.adapt import Adapted, adapt
from prism_meta.training.config import Config, load_config
from prism_meta.training.fit import fit
from prism_meta.training.run import Run
from prism_meta.training.train import Trained, train
from prism_meta.training.trainer import Trainer

try:
    __version__ = version("prism-meta")
except PackageNotFoundError:  # a source folder that was not installed
    __version__ = "0+unknown"

__all__ = [
    "ALL_STRATEGIES",
    "BRATS",
    "BRATS_LABELS",
    "SGD",
    "Adam",
    "AdamW",
    "Adapted",
    "AttentionFusion",
    "BalancedMask",
    "Batch",
    "Case",
    "CaseError",
    "Cleanup",
    "Config",
    "ConfigError",
    "DynamicMask",
    "Episodes",
    "FiniteDifference",
    "FirstOrder",
    "FullMask",
    "FunctionalStrategy",
    "Fusion",
    "GroupDROMask",
    "HardMask",
    "HiddenParameterError",
    "ImplicitMAML",
    "InnerOptimizer",
    "Joint",
    "LabelSet",
    "LearnedSubsetWeights",
    "LearnedWeights",
    "MeanFusion",
    "MetaGradient",
    "MetaLearner",
    "MetaSGD",
    "MetaStrategy",
    "MultiEncoderNet",
    "OneSubsetMask",
    "Prediction",
    "Predictor",
    "Preflight",
    "Preprocessing",
    "PrismError",
    "PrismNet",
    "PrismObjective",
    "Ranking",
    "Record",
    "RegionAwareFusion",
    "RegionRule",
    "RelativePreference",
    "Reptile",
    "Run",
    "SecondOrder",
    "SegmentationModel",
    "SingleLevel",
    "SingleModalityMask",
    "SoftWorst",
    "StaticMask",
    "StepBatches",
    "TaskEpisodes",
    "Trained",
    "Trainer",
    "WrappedNet",
    "adapt",
    "compare",
    "draw_availability",
    "evaluate",
    "fit",
    "load_cases",
    "load_config",
    "losses",
    "predict",
    "preflight",
    "read_records",
    "register_strategy",
    "subset",
    "subset_name",
    "subsets",
    "summarize",
    "train",
    "use_fast_derivatives",
    "wrap",
    "write_records",
]
