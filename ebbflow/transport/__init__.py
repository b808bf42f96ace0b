"""Optimal transport between laws, of which nothing here knows what they are for."""

from ebbflow.transport.semi_discrete import Cells as Cells
from ebbflow.transport.semi_discrete import NotConverged as NotConverged
from ebbflow.transport.semi_discrete import SemiDiscrete as SemiDiscrete
from ebbflow.transport.semi_discrete import monotone as monotone
from ebbflow.transport.semi_discrete import semi_discrete as semi_discrete
from ebbflow.transport.semi_discrete import standard_normal as standard_normal
