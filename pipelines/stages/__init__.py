"""The stages in the order in which they run: the only list of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.export import ExportStage
from ercsvd_deploy.pipelines.stages.factorize.damages.stage import DamagesStage
from ercsvd_deploy.pipelines.stages.factorize.stage import FactorizeStage
from ercsvd_deploy.pipelines.stages.factorize.vision.stage import VisionStage
from ercsvd_deploy.pipelines.stages.judge import JudgeOriginalStage, JudgeStage
from ercsvd_deploy.pipelines.stages.measured_export import MeasuredExportStage
from ercsvd_deploy.pipelines.stages.quantize.stage import QuantizeStage
from ercsvd_deploy.pipelines.stages.recover.stage import RecoverQuantizedStage, RecoverStage
from ercsvd_deploy.pipelines.stages.sensitivity.stage import SensitivityStage, TokenSensitivityStage

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.contract import Stage

STAGES: tuple[type[Stage], ...] = (
    JudgeOriginalStage,
    VisionStage,
    TokenSensitivityStage,
    SensitivityStage,
    DamagesStage,
    FactorizeStage,
    RecoverStage,
    QuantizeStage,
    RecoverQuantizedStage,
    JudgeStage,
    ExportStage,
    MeasuredExportStage,
)
