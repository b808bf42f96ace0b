"""Inversion: from data to the noise that makes it, and back."""

from ebbflow.inversion.invert import Inversion as Inversion
from ebbflow.inversion.invert import invert as invert
from ebbflow.inversion.schemes import bdia as bdia
from ebbflow.inversion.schemes import edict as edict
from ebbflow.inversion.schemes import leapfrog as leapfrog
