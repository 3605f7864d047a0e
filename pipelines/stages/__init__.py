"""The stages in the order in which they run: the only list of them.

When a recipe has a stage, its `plan` says; in short:

    judge_original, judge                   there are texts or questions to judge on
    vision                                  a section `vision` factorizes parts of the tower or the projector
    token_sensitivity                       `calibration: {token_weight: sensitivity}`
    sensitivity                             what is chosen, cut off or corrected is weighed by its damage
    damages                                 ranks or bits are chosen by damage: `target`, or error control
    factorize                               the stage `factorize`, or a `target` without it
    recover, quantize, recover_quantized    the stages `quantize`, and `recover` before and behind it
    export, measured_export                 `export.path`; gates or tasks that need the export
"""

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
