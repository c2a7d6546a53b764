"""The training state: everything that the rest of a run depends on."""

import dataclasses

import torch
from accelerate import Accelerator

from hf_genmod.training.clock import Progress
from hf_genmod.training.monitor import Monitor
from hf_genmod.training.run_folder import RunFolder


@dataclasses.dataclass
class TrainingState:
    """The objects that a run changes while it trains. Any number of processes can continue from a saved state."""

    model: torch.nn.Module
    averaged_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    monitor: Monitor
    accelerator: Accelerator

    def save(self, folder: RunFolder, limit: int):
        """Saves the state of this step; all processes call it. A failure is reported and does not stop training."""
        accumulated = self.monitor.gathered()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "averaged_model": self.averaged_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": vars(self.progress),
                "accumulated": accumulated,
            }
            with self.monitor.optional("saving the training state"):
                folder.save_state(self.progress.step, state, limit)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: RunFolder):
        """Continues from the newest state in the folder, if there is one."""
        state = folder.newest_state(self.monitor.say)
        if state is not None:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.averaged_model.load_state_dict(state["averaged_model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            vars(self.progress).update(state["progress"])
            self.monitor.restore(state["accumulated"])
            self.accelerator.print(f"continuing {folder.path} from step {self.progress.step}")
        if self.accelerator.is_main_process:
            folder.forget_metrics_after(self.progress.step)
