"""Tuning: better plans and better denoisers for the model at hand."""

from ebbflow.tuning.calibration import Calibrated as Calibrated
from ebbflow.tuning.calibration import calibrate as calibrate
from ebbflow.tuning.learned import tune as tune
from ebbflow.tuning.references import References as References
from ebbflow.tuning.references import references as references
from ebbflow.tuning.residual_form import ResidualForm as ResidualForm
