"""
Draws with a cascade: a small picture by one model, made larger by one upsampler or more. Or enlarges pictures of your
own.

    python examples/sample_cascade.py --base runs/small --upsamplers runs/upsampler --class_labels cat dog --count 8
    python examples/sample_cascade.py --images mine.png --upsamplers runs/upsampler
"""

import dataclasses
from pathlib import Path

from PIL import Image

from hf_genmod import load_pipeline
from hf_genmod.drawing.cascade import draw_cascade
from hf_genmod.drawing.grids import grid
from hf_genmod.errors import one_line_errors
from hf_genmod.recipes.arguments import parse_arguments


@dataclasses.dataclass
class CascadeArguments:
    upsamplers: list[str] = dataclasses.field(
        metadata={"help": "Checkpoints of train_upsampler.py, in the order in which they enlarge; folders or ids."}
    )
    base: str | None = dataclasses.field(
        default=None, metadata={"help": "The model of the small pictures: a folder, or an id on the Hub."}
    )
    images: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Pictures of your own to enlarge, instead of those of a base."}
    )
    class_labels: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Classes by name or number, each drawn --count times; by default all."}
    )
    prompts: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "What the pictures are to show, each drawn --count times."}
    )
    count: int = dataclasses.field(default=8, metadata={"help": "Pictures of each class or prompt, or in all."})
    seed: int = dataclasses.field(default=0, metadata={"help": "The first picture's; the next have the next ones."})
    noise_level: int = dataclasses.field(
        default=0, metadata={"help": "Noise put into the small pictures, in timesteps, for upsamplers to mend them."}
    )
    num_inference_steps: int = dataclasses.field(default=20, metadata={"help": "Steps of each model."})
    tile_size: int = dataclasses.field(
        default=512, metadata={"help": "Pixels of the result, in height and width, that are worked on at once."}
    )
    output_dir: str = dataclasses.field(default="runs/cascade", metadata={"help": "Folder of the pictures."})

    def __post_init__(self):
        if (self.base is None) == (not self.images):
            raise ValueError("base: give either it, a model that draws, or --images to enlarge")
        if self.count < 1:
            raise ValueError(f"count: {self.count} is not positive")


def requests(arguments: CascadeArguments, first) -> list[tuple[list[str], dict]]:
    """(names of the pictures, what the first model is asked by), of which each is drawn together."""
    count = arguments.count
    if arguments.images:
        names = [Path(file).stem for file in arguments.images]
        if len(set(names)) < len(names):
            raise ValueError("images: two of them have one name; enlarge them into folders of their own")
        return [([name], {"image": [Image.open(file)]}) for name, file in zip(names, arguments.images, strict=True)]
    takes_labels, takes_prompts = hasattr(first, "labels"), hasattr(first, "tokenizer")
    if (arguments.class_labels and not takes_labels) or bool(arguments.prompts) != takes_prompts:
        wanted = "prompts" if takes_prompts else "class_labels" if takes_labels else "neither class_labels nor prompts"
        raise ValueError(f"base: a {type(first).__name__} is asked by {wanted}")
    if takes_prompts:
        names = [f"{i}-{copy}" for i in range(len(arguments.prompts)) for copy in range(count)]
        return [(names, {"prompt": [prompt for prompt in arguments.prompts for _ in range(count)]})]
    if takes_labels:
        labels = arguments.class_labels or list(first.labels) or list(range(first.num_classes))
        labels = [label if label in first.labels or not str(label).isdecimal() else int(label) for label in labels]
        names = [f"{label}-{copy}".replace("/", "_") for label in labels for copy in range(count)]
        return [(names, {"class_labels": [label for label in labels for _ in range(count)]})]
    return [([str(i) for i in range(count)], {})]


with one_line_errors():
    (arguments,) = parse_arguments(CascadeArguments)
    stages = [load_pipeline(path) for path in ([arguments.base] if arguments.base else []) + arguments.upsamplers]
    drawn, seed, out = [], arguments.seed, Path(arguments.output_dir)
    for names, request in requests(arguments, stages[0]):
        drawn = draw_cascade(
            stages,
            range(seed, seed + len(names)),
            arguments.noise_level,
            arguments.num_inference_steps,
            arguments.tile_size,
            all_stages=True,
            **request,
        )
        seed += len(names)
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names, drawn[-1], strict=True):
            picture.save(out / f"{name}-{picture.width}x{picture.height}.png")
    if arguments.base:
        grid([row[:8] for row in drawn]).save(out / "stages.png")
    print(f"{seed - arguments.seed} drawn into {out}{', beside stages.png' if arguments.base else ''}")
