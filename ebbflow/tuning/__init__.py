"""Tuning: better plans and better denoisers for the model at hand."""

from ebbflow.tuning.calibration import Calibrated as Calibrated
from ebbflow.tuning.calibration import calibrate as calibrate
from ebbflow.tuning.evolution import search_times as search_times
from ebbflow.tuning.expressway import Expressway as Expressway
from ebbflow.tuning.expressway import expressway as expressway
from ebbflow.tuning.flow_turbo import FlowTurbo as FlowTurbo
from ebbflow.tuning.learned import tune as tune
from ebbflow.tuning.polish import polish as polish
from ebbflow.tuning.quantisation import CalibrationSet as CalibrationSet
from ebbflow.tuning.quantisation import Quantised as Quantised
from ebbflow.tuning.quantisation import denoising_states as denoising_states
from ebbflow.tuning.quantisation import quantise as quantise
from ebbflow.tuning.references import References as References
from ebbflow.tuning.references import references as references
from ebbflow.tuning.refiner import Refiner as Refiner
from ebbflow.tuning.refiner import cost_share as cost_share
from ebbflow.tuning.refiner import train_refiner as train_refiner
from ebbflow.tuning.residual_form import ResidualForm as ResidualForm
from ebbflow.tuning.skipping import Skipping as Skipping
from ebbflow.tuning.skipping import search_blocks as search_blocks
from ebbflow.tuning.solver_search import search_solvers as search_solvers
from ebbflow.tuning.stitching import Choice as Choice
from ebbflow.tuning.stitching import MomentMatched as MomentMatched
from ebbflow.tuning.stitching import Stitched as Stitched
from ebbflow.tuning.stitching import choose_switch as choose_switch
from ebbflow.tuning.stitching import flops as flops
