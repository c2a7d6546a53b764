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

    def _parts(self) -> dict:
        model, scaler = self.accelerator.unwrap_model(self.model), self.accelerator.scaler
        return {"model": model, "averaged_model": self.averaged_model, "optimizer": self.optimizer, "scaler": scaler}

    def save(self, folder: RunFolder, limit: int):
        """Saves the state of this step; all processes call it. A failure is reported and does not stop training."""
        accumulated = self.monitor.gathered()
        if self.accelerator.is_main_process:
            state = {name: None if part is None else part.state_dict() for name, part in self._parts().items()}
            state |= {"progress": vars(self.progress), "accumulated": accumulated}
            with self.monitor.optional("saving the training state"):
                folder.save_state(self.progress.step, state, limit)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: RunFolder):
        """Continues from the newest state in the folder, if there is one."""
        state = folder.newest_state(self.monitor.say)
        if state is not None:
            for name, part in self._parts().items():
                if part is not None:
                    part.load_state_dict(state[name])
            vars(self.progress).update(state["progress"])
            self.monitor.restore(state["accumulated"])
            self.accelerator.print(f"continuing {folder.path} from step {self.progress.step}")
        if self.accelerator.is_main_process:
            folder.forget_metrics_after(self.progress.step)
