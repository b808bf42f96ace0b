"""Tuning: from a plan to a better plan for one model."""

from ebbflow.tuning.learned import tune as tune
from ebbflow.tuning.references import References as References
from ebbflow.tuning.references import references as references
from ebbflow.tuning.residual_form import ResidualForm as ResidualForm
