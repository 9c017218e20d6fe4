"""The four loops of a run: epoch, step, evaluation and prediction."""

from loopkit.loops.auto_micro_batch import AutoMicroBatchStep
from loopkit.loops.closure import ClosureStep
from loopkit.loops.epoch import EpochLoop
from loopkit.loops.evaluate import EvalLoop
from loopkit.loops.predict import PredictLoop
from loopkit.loops.step import StepLoop

__all__ = ["AutoMicroBatchStep", "ClosureStep", "EpochLoop", "EvalLoop", "PredictLoop", "StepLoop"]
