"""How good a learned field is: conservative, calibrated, straight."""

from ebbflow.diagnostics.conservative import Estimate as Estimate
from ebbflow.diagnostics.conservative import asymmetry as asymmetry
from ebbflow.diagnostics.conservative import circulation as circulation
from ebbflow.diagnostics.paths import Paths as Paths
from ebbflow.diagnostics.paths import paths as paths
from ebbflow.diagnostics.report import EndTime as EndTime
from ebbflow.diagnostics.report import MeanScore as MeanScore
from ebbflow.diagnostics.report import Report as Report
from ebbflow.diagnostics.report import diagnose as diagnose
from ebbflow.diagnostics.report import mean_score as mean_score
from ebbflow.diagnostics.report import prior_gap as prior_gap
