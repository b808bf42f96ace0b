"""Other libraries' samplers, imported alone, as the benchmark drives them."""

from __future__ import annotations

from ebbflow.benchmark.peers.imports import azula as azula
from ebbflow.benchmark.peers.imports import diffusers as diffusers
from ebbflow.benchmark.peers.imports import k_diffusion as k_diffusion
