"""The configuration of a run: one TOML file, checked at birth, every fault reported at once.

Imports no torch: ``clipdistill --help`` and a faulty file answer at once.
"""

from clipdistill.config.base import Section
from clipdistill.config.compress import CompressConfig, TargetConfig
from clipdistill.config.data import DataConfig, HoldOut, SourceConfig, Sources
from clipdistill.config.export import ExportConfig
from clipdistill.config.features import BlockConfig, FeaturesConfig
from clipdistill.config.loss import LossConfig
from clipdistill.config.measure import EvaluateConfig, IndexConfig, ReportConfig
from clipdistill.config.run import RunConfig, evaluation_sets, known_sets
from clipdistill.config.student import InheritConfig, StudentConfig
from clipdistill.config.sweep import RangeConfig, SweepConfig
from clipdistill.config.task import TaskConfig
from clipdistill.config.teacher import CacheConfig, MemberConfig, TeacherConfig
from clipdistill.config.train import MutualConfig, TrainConfig

__all__ = [
    "BlockConfig",
    "CacheConfig",
    "CompressConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FeaturesConfig",
    "HoldOut",
    "IndexConfig",
    "InheritConfig",
    "LossConfig",
    "MemberConfig",
    "MutualConfig",
    "RangeConfig",
    "ReportConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "Sources",
    "StudentConfig",
    "SweepConfig",
    "TargetConfig",
    "TaskConfig",
    "TeacherConfig",
    "TrainConfig",
    "evaluation_sets",
    "known_sets",
]
