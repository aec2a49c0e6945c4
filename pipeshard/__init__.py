"""Runs language models that are larger than the VRAM they are given, from GGUF files, on CPU and CUDA."""

from __future__ import annotations

from ._profile import Profile
from ._version import __version__
from .emu import EmuDevice, Fault
from .engine import Engine
from .errors import (
    BudgetError,
    BusyError,
    ClosedError,
    DeviceError,
    FileError,
    FormatError,
    HostMemoryError,
    PipeshardError,
    PlanError,
    RequestError,
    UnsupportedError,
)
from .model import Model
from .placement import Place, Placement, Split, Tier, Unit
from .plan import Plan
from .profiling import profile
from .sched_policies import PolicyContext, Prediction
from .sched_policies import names as policies
from .simulate import simulate
from .sweep import Sweep, sweep
from .tokenizer import Tokenizer
from .trace import Trace

__all__ = [
    "BudgetError",
    "BusyError",
    "ClosedError",
    "DeviceError",
    "EmuDevice",
    "Engine",
    "Fault",
    "FileError",
    "FormatError",
    "HostMemoryError",
    "Model",
    "PipeshardError",
    "Place",
    "Placement",
    "Plan",
    "PlanError",
    "PolicyContext",
    "Prediction",
    "Profile",
    "RequestError",
    "Split",
    "Sweep",
    "Tier",
    "Tokenizer",
    "Trace",
    "Unit",
    "UnsupportedError",
    "__version__",
    "policies",
    "profile",
    "simulate",
    "sweep",
]
