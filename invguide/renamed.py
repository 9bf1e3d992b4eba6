"""Where modules and names have gone: imports by their old names work for one version, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name -> new one, both within the package.
MODULES = {
    "arrays": "arguments.arrays",
    "ascent": "sampling.ascent",
    "augmentation": "numerics.augmentation",
    "candidates": "sampling.zeroth_order",
    "certificate": "diagnostics.operator",
    "checkpoint": "engine.checkpoint",
    "cli_bench": "cli.bench",
    "condition_options": "restoration.conditions",
    "content_code": "system.content_code",
    "content_hash": "system.content_hash",
    "data_size": "problem.data_size",
    "deepinv_noise": "adapters.deepinv_noise",
    "deepinv_physics": "adapters.deepinv",
    "degradation": "restoration.degradation",
    "demo": "restoration.demo",
    "devices": "system.devices",
    "divergence": "engine.divergence",
    "edict": "adjoint.edict",
    "edit_reward": "reward",
    "ensemble": "sampling.ensemble",
    "estimate": "images.noise_level",
    "export": "images.export",
    "farm": "restoration.workers",
    "fault": "engine.fault",
    "features": "numerics.hooks",
    "folder": "restoration.folder",
    "function_reward": "adapters.rewards",
    "harmonic": "numerics.harmonic",
    "identity": "engine.run_identity",
    "inspection": "engine.inspection",
    "jpeg_file": "images.jpeg_file",
    "jpeg_grid": "images.jpeg_grid",
    "jpeg_measurement": "restoration.jpeg_measurement",
    "jpeg_reading": "images.jpeg_reading",
    "keepsakes": "images.keepsakes",
    "known_pixels": "images.known_pixels",
    "lbfgs": "numerics.lbfgs",
    "likely_noise": "restoration.likely_noise",
    "linearisation": "sampling.linearisation",
    "masks": "restoration.masks",
    "memory": "system.memory",
    "metrics": "diagnostics.metrics",
    "noise_blocks": "images.noise_blocks",
    "noise_counts": "noise.counts",
    "noise_covariance": "noise.covariance",
    "noise_model": "noise.model",
    "noise_tails": "noise.tails",
    "particles": "sampling.particles",
    "picture_files": "images.picture_files",
    "priors._exact": "priors.exact.algebra",
    "priors.adm": "priors.networks.adm",
    "priors.adm_checkpoints": "priors.checkpoints.adm",
    "priors.catalogue": "priors.checkpoints.catalogue",
    "priors.checkpoint_file": "priors.checkpoints.file",
    "priors.conditions": "priors.networks.conditions",
    "priors.convention": "priors.doctor.convention",
    "priors.deepinv_denoiser": "priors.checkpoints.deepinv",
    "priors.diffusers_folder": "priors.checkpoints.diffusers_folder",
    "priors.diffusers_models": "priors.checkpoints.diffusers_models",
    "priors.diffusers_pipeline": "priors.checkpoints.diffusers_pipeline",
    "priors.diffusers_weights": "priors.checkpoints.diffusers_weights",
    "priors.edm2": "priors.networks.edm2",
    "priors.edm2_checkpoints": "priors.checkpoints.edm2",
    "priors.edm_checkpoints": "priors.checkpoints.edm",
    "priors.embedded": "priors.checkpoints.embedded",
    "priors.field": "priors.exact.field",
    "priors.gaussian": "priors.exact.gaussian",
    "priors.grey": "priors.wrappers.grey",
    "priors.hub": "priors.checkpoints.hub",
    "priors.labels": "priors.networks.labels",
    "priors.latent": "priors.wrappers.latent",
    "priors.loading": "priors.checkpoints.loading",
    "priors.mixture": "priors.exact.mixture",
    "priors.nvidia_pickle": "priors.checkpoints.nvidia_pickle",
    "priors.padding": "priors.wrappers.padding",
    "priors.preconditioning": "priors.networks.preconditioning",
    "priors.recompute": "priors.networks.recompute",
    "priors.text_encoders": "priors.text.encoders",
    "priors.tiled": "priors.wrappers.tiled",
    "priors.unet": "priors.networks.unet",
    "profiles": "images.profiles",
    "progress": "system.progress",
    "proximal": "problem.proximal",
    "report": "images.panel",
    "reward_certificate": "diagnostics.reward",
    "rules": "arguments.rules",
    "run_file": "system.run_file",
    "run_state": "engine.run_state",
    "seen": "problem.seen",
    "single": "restoration.single",
    "smooth_blocks": "images.smooth_blocks",
    "strength": "sampling.step_size",
    "surroundings": "system.surroundings",
    "symmetry": "numerics.symmetry",
    "tableaus": "numerics.tableaus",
    "tables": "system.tables",
    "tasks": "restoration.tasks",
    "terminal": "cli.terminal",
    "threads": "system.threads",
    "transparency": "images.transparency",
    "trial": "numerics.trial",
    "truncated_normal": "numerics.truncated_normal",
    "twist": "sampling.twist",
    "whitened_map": "problem.whitened_map",
}


# Names that have left a module which is still there: module -> old name -> its home (and its name there).
NAMES = {
    "adapters": {"from_deepinv": "adapters.deepinv"},
    "diagnostics.operator": {
        "Certificate": "diagnostics.operator OperatorCheck",
        "Row": "diagnostics.operator Property",
    },
    "priors.doctor": {
        "check_loaded": "priors.doctor.examine",
        "linear_error": "priors.doctor.examine",
        "Report": "priors.doctor.examine",
    },
    "priors.network": {
        "EDM": "priors.networks.clocks",
        "VE": "priors.networks.clocks",
        "Flow": "priors.networks.clocks",
        "Schedule": "priors.networks.clocks Clock",
        "cosine_betas": "priors.networks.clocks",
        "linear_betas": "priors.networks.clocks",
        "scaled_linear_betas": "priors.networks.clocks",
    },
    "problem": {"Guidance": "problem TargetGradient", "OPEN": "problem.problem"},
    "sampling.zeroth_order": {
        "Seen": "sampling.zeroth_order Evaluated",
        "look_around": "sampling.zeroth_order evaluate_around",
    },
    "restoration": {
        "Job": "restoration.settings",
        "Settings": "restoration.settings",
        "plan_picture": "restoration.restore",
        "restore_picture": "restoration.restore",
    },
}


def old_names(package: str) -> Callable[[str], Any]:
    """Return `__getattr__` of a module of NAMES."""
    here = package.partition(".")[2]

    def find(name: str) -> Any:
        if name not in NAMES[here]:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, _, new = NAMES[here][name].partition(" ")
        text = f"{package}.{name} is invguide.{home}.{new or name} now; the old name goes with the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(import_module(f"invguide.{home}"), new or name)

    return find


class _Renamed(MetaPathFinder, Loader):
    """Makes a module of the old name that asks the new one for everything."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "invguide" or name not in MODULES:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        new = f"invguide.{MODULES[module.__name__.partition('.')[2]]}"
        warnings.warn(
            f"{module.__name__} is {new} now; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        there = import_module(new)
        vars(module)["__getattr__"] = lambda name: getattr(there, name)
        vars(module)["__doc__"] = there.__doc__


def keep_old_names() -> None:
    """Let imports by old names find the modules of today; once a process."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.append(_Renamed())
