"""The training state: everything that the rest of a run depends on."""

import dataclasses

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_genmod.errors import TrainingError
from hf_genmod.training.averaging import EarlyWeights
from hf_genmod.training.clock import Progress
from hf_genmod.training.monitor import Monitor
from hf_genmod.training.run_folder import RunFolder
from hf_genmod.training.sharding import state_in_shards, whole_state


@dataclasses.dataclass
class TrainingState:
    """The objects that a run changes while it trains. Any number of processes can continue from a saved state."""

    model: torch.nn.Module
    averaged_model: torch.nn.Module
    early_weights: EarlyWeights
    optimizer: torch.optim.Optimizer
    progress: Progress
    monitor: Monitor
    accelerator: Accelerator

    def __post_init__(self):
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        self._frozen = {"model": set(frozen), "averaged_model": {f"module.{name}" for name in frozen}}

    def _parts(self) -> dict:
        names = ("model", "averaged_model", "early_weights", "optimizer")
        return {**{name: getattr(self, name) for name in names}, "scaler": self.accelerator.scaler}

    def save(self, folder: RunFolder, limit: int):
        """Saves the state of this step, without weights that are not trained; all processes call it. A failure is
        reported and does not stop training."""
        with self.monitor.doing("saving the training state"):
            self._save(folder, limit)

    def _save(self, folder: RunFolder, limit: int):
        accumulated, is_main = self.monitor.gathered(), self.accelerator.is_main_process
        state = {name: None if part is None else part.state_dict() for name, part in self._parts().items()}
        for name, frozen in self._frozen.items():
            state[name] = {key: value for key, value in state[name].items() if key not in frozen}
        state = whole_state(state, keep=is_main)
        if is_main:
            state |= {"progress": vars(self.progress), "accumulated": accumulated}
            with self.monitor.optional("saving the training state"):
                folder.save_state(self.progress.step, state, limit)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: RunFolder):
        """Continues from the newest state in the folder, if there is one. Raises a `TrainingError` if that is not the
        same on all processes."""
        state = folder.newest_state(self.monitor.say)
        check_all_alike(0 if state is None else state["progress"]["step"], "the step of the newest state", folder)
        if state is not None:
            for name, part in self._parts().items():
                if part is not None:
                    _load(part, state.get(name, {}), self._frozen.get(name))
            vars(self.progress).update(state["progress"])
            self.monitor.restore(state["accumulated"])
            self.accelerator.print(f"continuing {folder.path} from step {self.progress.step}")
        if self.accelerator.is_main_process:
            folder.forget_metrics_after(self.progress.step)


def _load(part, state: dict, frozen: set[str] | None):
    if frozen is None:
        part.load_state_dict(state_in_shards(part, state) if isinstance(part, torch.optim.Optimizer) else state)
        return
    state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}  # of a compiled model, once
    state = state_in_shards(part, state)
    missing, unexpected = part.load_state_dict(state, strict=False)
    if unexpected or set(missing) - frozen:
        part.load_state_dict(state)  # raises an error with the names


def check_all_alike(value, what: str, folder: RunFolder):
    """Raises a `TrainingError` if a value that the folder determines is not the same on all processes."""
    values = gather_object([value])
    if len(set(values)) > 1:
        raise TrainingError(
            f"output_dir: the processes see different files in {folder.path} ({what}: {', '.join(map(str, values))}); "
            "give them one folder that all machines share, or wait until it has reached all of them"
        )
