"""Low-rank adapters (LoRA) of a pipeline as files."""

import os

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE


def save(
    pipeline: DiffusionPipeline,
    save_directory: str | os.PathLike,
    adapter_name: str | None = None,
    weight_name: str = LORA_WEIGHT_NAME_SAFE,
) -> None:
    """
    Writes an adapter of a pipeline, by default the only one, to the file `weight_name` in a folder, in the format of
    diffusers and peft, with the classes that it brought.

    Raises:
        ValueError: If there is no such adapter.
        NotADirectoryError: If `save_directory` is a file.
    """
    from peft import get_peft_model_state_dict

    if os.path.isfile(save_directory):
        raise NotADirectoryError(f"save_directory: {os.fspath(save_directory)!r} is a file; give a folder")
    known = pipeline._attached()
    adapter_name = known[0] if adapter_name is None and len(known) == 1 else adapter_name
    if adapter_name not in known:
        raise ValueError(f"adapter_name: {adapter_name!r} is not one of the adapters {known}; name one of them")
    state, metadata = {}, {}
    for component, adapters in pipeline.get_list_adapters().items():
        if adapter_name in adapters:
            model = getattr(pipeline, component)
            state |= pipeline.pack_weights(get_peft_model_state_dict(model, adapter_name=adapter_name), component)
            config = model.peft_config[adapter_name].to_dict()
            config["base_model_name_or_path"] = None  # which may be a path on this machine
            config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
            metadata |= pipeline.pack_weights(config, component)
    if names := pipeline._brought.get(adapter_name):
        rows = pipeline.unet.class_embedding.weight.detach()[[pipeline.labels[name] for name in names]]
        state["class_embedding"], metadata["class_names"] = rows, names
    state = {name: weight.contiguous() for name, weight in state.items()}
    pipeline.write_lora_layers(state, save_directory, True, weight_name, None, True, metadata)
