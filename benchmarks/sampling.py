"""
Fréchet distance against the number of forward passes, for several samplers of one checkpoint, at γ = 1, as the mean of
several draws; first for the one that the checkpoint holds, and last for its process in many ancestral steps.

    python benchmarks/sampling.py --model runs/mnist/hf_genmod --dataset ../shared/data/mnist --resolution 32 \
        --output_dir runs/mnist
"""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from judge import Judge, draw, parser

from hf_genmod import AncestralDDPMScheduler, FewStepDDPMScheduler, load_pipeline

SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {  # class, settings, forward passes a step
    "ancestral": (AncestralDDPMScheduler, {}, 1),
    "few-step DDPM": (FewStepDDPMScheduler, {}, 1),
    "DDIM": (DDIMScheduler, {}, 1),
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}, 1),
    "DPM-Solver++ 2M SDE": (DPMSolverMultistepScheduler, SDE, 1),
    "DPM-Solver++ 3M SDE": (DPMSolverMultistepScheduler, {**SDE, "solver_order": 3}, 1),
    "UniPC": (UniPCMultistepScheduler, {}, 1),
    "Heun": (HeunDiscreteScheduler, {}, 2),
}

parser = parser(__doc__)
parser.add_argument("--model", required=True, help="The checkpoint.")
parser.add_argument("--passes", type=int, nargs="+", default=[10, 20, 50])
parser.add_argument("--reference", type=int, default=250, help="Ancestral steps of the reference.")
parser.add_argument("--draws", type=int, default=4, help="Draws of each, with other seeds.")
parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS), choices=SAMPLERS)
arguments = parser.parse_args()
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, arguments.output_dir)
pipeline = load_pipeline(arguments.model)
recommended = pipeline.scheduler
calls = []
pipeline.unet.register_forward_hook(lambda *_: calls.append(None))


def measure(name, passes) -> str:
    passes_per_step = 1
    pipeline.scheduler = recommended
    if name != "recommended":
        scheduler, settings, passes_per_step = SAMPLERS[name]
        pipeline.scheduler = scheduler.from_config(recommended.config, **settings)
    request = {"guidance_scale": 1.0, "num_inference_steps": -(-passes // passes_per_step)}
    calls.clear()
    draws = [judge(draw(pipeline, judge.labels, first_seed=10_000 * i, **request)) for i in range(arguments.draws)]
    batches = arguments.draws * -(-arguments.samples // 100)
    distances = [metrics["frechet_distance"] for metrics in draws]
    recognised = sum(metrics["recognised_share"].value for metrics in draws) / len(draws)
    return (
        f"{sum(distances) / len(draws):.3f} ({min(distances):.3f}–{max(distances):.3f}), {recognised:.1%} "
        f"({len(calls) // batches})"
    )


print(f"{arguments.model}: Fréchet distance (least–largest), recognised share (and forward passes), {arguments.draws} "
      f"draws of {arguments.samples} samples each; floor {judge.floor['frechet_distance']:.3f}\n")  # fmt: skip
print("| sampler | " + " | ".join(f"{passes} passes" for passes in arguments.passes) + " |")
print("|---|" + "---|" * len(arguments.passes))
for name in ("recommended", *arguments.samplers):
    print(f"| {name} | " + " | ".join(measure(name, passes) for passes in arguments.passes) + " |", flush=True)
print(f"\nancestral, {arguments.reference} steps: {measure('ancestral', arguments.reference)}")
