"""
Fréchet distance against the number of forward passes, for several samplers of one checkpoint, at γ = 1.

    python benchmarks/sampling.py --model runs/mnist/hf_genmod --dataset ../shared/data/mnist --resolution 32 \
        --output_dir runs/mnist
"""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from judge import Judge, draw, parser

from hf_genmod import AncestralDDPMScheduler, load_pipeline

SAMPLERS = {  # class, settings, forward passes a step
    "ancestral": (AncestralDDPMScheduler, {}, 1),
    "DDIM": (DDIMScheduler, {}, 1),
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {}, 1),
    "DPM-Solver++ 2M SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 1),
    "UniPC": (UniPCMultistepScheduler, {}, 1),
    "Heun": (HeunDiscreteScheduler, {}, 2),
}

parser = parser(__doc__)
parser.add_argument("--model", required=True, help="The checkpoint.")
parser.add_argument("--passes", type=int, nargs="+", default=[10, 20, 50])
parser.add_argument("--reference", type=int, default=250, help="Forward passes of the ancestral reference.")
parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
arguments = parser.parse_args()
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, arguments.output_dir)
pipeline = load_pipeline(arguments.model)
process = pipeline.scheduler
calls = []
pipeline.unet.register_forward_hook(lambda *_: calls.append(None))


def measure(name, passes) -> str:
    scheduler, settings, passes_per_step = SAMPLERS[name]
    pipeline.scheduler = scheduler.from_config(process.config, **settings)
    calls.clear()
    pictures = draw(pipeline, judge.labels, guidance_scale=1.0, num_inference_steps=-(-passes // passes_per_step))
    batches = -(-arguments.samples // 100)
    return f"{judge(pictures)['frechet_distance']:.3f} ({len(calls) // batches})"


print(f"{arguments.model}: Fréchet distance (and forward passes) of {arguments.samples} samples; floor "
      f"{judge.floor['frechet_distance']:.3f}\n")  # fmt: skip
print("| sampler | " + " | ".join(f"{passes} passes" for passes in arguments.passes) + " |")
print("|---|" + "---|" * len(arguments.passes))
for name in arguments.samplers:
    print(f"| {name} | " + " | ".join(measure(name, passes) for passes in arguments.passes) + " |", flush=True)
print(f"\nancestral, {arguments.reference} passes: {measure('ancestral', arguments.reference)}")
